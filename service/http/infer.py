"""Infer, of the Open Inference Protocol: the same tasks as predict and uncertainty, as tensors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from dropserve.service.errors import InvalidRequest, UnsupportedMediaType
from dropserve.service.http.body import BodyLimits, BodyReader, json_memory, load_json
from dropserve.service.http.front import Front, invalid
from dropserve.service.http.images import SMALL_PNG_BYTES, is_small_png, prepared
from dropserve.service.http.orders import held_to
from dropserve.service.http.protocol import INTEGERS, PLAIN, SAMPLED, InferRequest
from dropserve.service.http.tensors import Pictures, Values, pictures, read, split, write
from dropserve.service.http.waiting import WhileConnected
from dropserve.service.inference.classifier import Answer, Classifier, Predict, Task, Uncertainty
from dropserve.service.inference.decoder import Pixels, Steps, finish
from dropserve.service.schemas import PredictOptions, SamplingOptions
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.inference.inference import Inference, Read

_LENGTH = b"inference-header-content-length"
_OUTPUTS = {*PLAIN, *SAMPLED}
_OPTIONS = set(SamplingOptions.model_fields) - set(PredictOptions.model_fields)
_MEDIA = (b"", b"application/json", b"application/octet-stream")


@dataclass(frozen=True)
class _ParsedInfer:
    """What is asked for.

    Attributes:
        request: as it was sent.
        found: the pictures in it.
        outputs: names of those to return, and which of them as binary data.
        sampling: how to sample, if an output needs it.
    """

    request: InferRequest
    found: Pictures
    outputs: Mapping[str, bool]
    sampling: Uncertainty | None

    @property
    def tasks(self) -> Iterator[Task]:
        """What to run for the outputs."""
        if not self.outputs.keys().isdisjoint(PLAIN):
            yield Predict()
        if self.sampling is not None:
            yield self.sampling

    @property
    def is_small_png(self) -> bool:
        """Whether the pictures of a small body are decoded in no time."""
        if isinstance(self.found, np.ndarray):
            return True
        return len(self.found) == 1 and is_small_png(self.found[0], "image/png")

    @property
    def head(self) -> dict[str, Any]:
        """What the answer repeats."""
        repeated: dict[str, Any] = {} if self.request.id is None else {"id": self.request.id}
        if self.sampling is not None:
            options = asdict(self.sampling) | {"method": "dropout", "log_base": "e"}
            del options["include_samples"]
            repeated["parameters"] = options
        return repeated

    def write(self, answers: Sequence[Answer]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Turn the tasks' answers into tensors.

        Raises:
            InvalidRequest: an output that was asked for by name cannot be estimated.
        """
        columns: dict[str, Values] = {}
        for answer in reversed(answers):  # a prediction, the first, says what `index` is
            columns |= _columns(answer["predictions"])
        for name, binary in self.outputs.items():
            if name in columns:
                yield write(name, columns[name], binary=binary)
            elif self.request.outputs:
                raise InvalidRequest(f"{name} needs more samples")


def _columns(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """Gather each figure of all pictures; what could not be estimated is left out."""
    rows = [{**p, **p.get("interval", {})} for p in predictions]
    columns: dict[str, Values] = {}
    for name, value in rows[0].items():
        if name in _OUTPUTS and value is not None:
            column = [row[name] for row in rows]
            kind = np.int64 if name in INTEGERS else np.float32
            columns[name] = column if name == "label" else np.array(column, kind)
    return columns


class InferRoutes(Front):
    """ASGI application: answers what asks for inference, and leaves the rest to another one.

    Args:
        behind: gets every other path and method.
        settings: for the most samples.
        reader: of bodies.
    """

    paths = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")

    def __init__(self, behind: ASGIApp, settings: Settings, reader: BodyReader) -> None:
        super().__init__(behind)
        self._max_samples = settings.max_samples
        self._reader = reader

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the model, read the tensor, run what the outputs need, write them."""
        name, version = scope["path_params"].values()
        log = scope["state"]["log"]
        log["route"] = "/v2/models/{name}" + ("/versions/{version}" if version else "") + "/infer"
        inference: Inference = scope["app"].state.inference
        model = inference.store.find(name, version)
        log.update(model=model.name, version=model.version)
        given = dict(reversed(scope["headers"]))  # the first of a name counts
        _check_media_type(given.get(b"content-type", b""))
        lengths = [value for name, value in scope["headers"] if name == _LENGTH]
        sent = await self._reader.read(given, receive)
        size = len(sent)
        try:

            def order() -> Steps[_ParsedInfer]:
                nonlocal sent
                limits, most = self._reader.limits, self._max_samples
                found = yield from _parse(sent, lengths, model, limits, most)
                sent = b""
                return found

            def prepare() -> Steps[Pixels]:
                found = pictures(asked.found, self._reader.limits)
                return (yield from prepared(found, model.prepare))

            with WhileConnected(receive):
                small = size <= SMALL_PNG_BYTES
                asked = finish(order()) if small else await inference.decode(order())
                log["images"] = images = len(asked.found)
                pixels: Pixels | Read
                if small and asked.is_small_png:
                    pixels = lambda: finish(prepare())  # noqa: E731  a name for both ways
                else:
                    pixels = await inference.decode(prepare())
                timeout = asked.request.parameters.timeout / 1e6
                answers = [
                    await inference.run(model, task, pixels, images, timeout)
                    for task in asked.tasks
                ]
        finally:
            self._reader.release(size)
        head = {"model_name": model.name, "model_version": str(model.version)}
        await _send(send, head | asked.head, list(asked.write(answers)))


def _check_media_type(value: bytes) -> None:
    """Refuse what is sent as something else; Triton's client sends no type."""
    if value.partition(b";")[0].strip().lower() not in _MEDIA:
        raise UnsupportedMediaType(
            "send application/json, or application/octet-stream with binary data"
        )


def _parse(
    body: bytes, lengths: Sequence[bytes], model: Classifier, limits: BodyLimits, max_samples: int
) -> Steps[_ParsedInfer]:
    """Read a request, all but the pictures' decoding.

    Raises:
        RequestError: says what is wrong with it.
    """
    head, binary = split(body, lengths)
    yield json_memory(head) + 3 * len(body)
    try:
        request = InferRequest.model_validate(load_json(head))
    except ValidationError as error:
        raise invalid(error) from None
    _check_names(request, model)
    parameters = request.parameters
    found = read(request.inputs[0], binary, limits, parameters.scale)
    outputs = _outputs(request)
    sampling = None
    if not outputs.keys().isdisjoint(SAMPLED):
        options = parameters.model_dump(include=_OPTIONS)
        sampling = Uncertainty(**options | {"samples": held_to(max_samples, parameters)})
    return _ParsedInfer(request, found, outputs, sampling)


def _check_names(request: InferRequest, model: Classifier) -> None:
    """Refuse a body that names another model or version than its path; KServe's client names it."""
    if request.model_name not in (None, "", model.name):
        raise InvalidRequest("model_name: is not the model of the path: leave it out")
    if request.model_version not in (None, "", str(model.version)):
        raise InvalidRequest(
            "model_version: is not the version that answers: ask for it in the path, "
            "/v2/models/.../versions/.../infer"
        )


def _outputs(request: InferRequest) -> dict[str, bool]:
    """Name the outputs to return, and say which of them are to be binary data."""
    parameters = request.parameters
    usual = parameters.binary_data_output
    asked: dict[str, bool] = {}
    for output in request.outputs:
        if output.name in asked:
            raise InvalidRequest("outputs: one is there twice")
        wish = output.parameters.binary_data
        asked[output.name] = usual if wish is None else wish
    sampled = not asked.keys().isdisjoint(SAMPLED)
    if parameters.mode == "predict" and sampled:
        raise InvalidRequest('outputs: one needs the mode "uncertainty"')
    mode = parameters.mode or ("uncertainty" if sampled else "predict")
    if mode == "predict" and parameters.model_fields_set & _OPTIONS:
        raise InvalidRequest('parameters: one needs the mode "uncertainty"')
    every = (*PLAIN, *SAMPLED) if mode == "uncertainty" else PLAIN
    return asked or dict.fromkeys(every, usual)


async def _send(
    send: Send, head: Mapping[str, Any], outputs: Sequence[tuple[dict[str, Any], bytes]]
) -> None:
    """Write the answer: JSON, and binary data after it if an output has any."""
    message = {**head, "outputs": [tensor for tensor, _ in outputs]}
    body = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = [(b"content-type", b"application/json")]
    if any("parameters" in tensor for tensor, _ in outputs):
        length = b"%d" % len(body)
        headers = [(b"content-type", b"application/octet-stream"), (_LENGTH, length)]
        body = b"".join([body, *(data for _, data in outputs)])
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
