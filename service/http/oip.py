"""Routes of the Open Inference Protocol, version 2; its messages and tensors are in `tensors.py`."""

import hmac
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from dropserve.service import errors
from dropserve.service.http import routes, tensors
from dropserve.service.http.body import BodyLimits, from_pixels, json_memory, load_json, read_each
from dropserve.service.http.decoding import Pixels, Steps, finish
from dropserve.service.http.images import (
    SMALL_PNG_BYTES,
    ImageSource,
    encoded,
    is_small_png,
    prepared,
)
from dropserve.service.http.options import invalid, limit_samples
from dropserve.service.http.tensors import PLAIN, SAMPLED, InferRequest
from dropserve.service.inference.classifier import Answer, Classifier
from dropserve.service.inference.tasks import Predict, Task, Uncertainty

if TYPE_CHECKING:
    from dropserve.service.inference.inference import Read

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
Message = TypeVar("Message", bound=BaseModel)
_SAMPLING = ("samples", "seed", "masks", "level")


@router.get("/", include_in_schema=False)
@router.get("")
async def server_metadata(request: Request) -> dict[str, str | list[str]]:
    """Say what the server is, and which extensions it has."""
    repository = request.app.state.settings.admin_token is not None
    extensions = ["binary_tensor_data", *["model_repository"] * repository]
    return {"name": "dropserve", "version": version("dropserve"), "extensions": extensions}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/health/ready", responses=routes.errors(503))
async def ready(request: Request) -> dict[str, bool]:
    """Models are loaded: nothing listens before they are, nor from the moment of shutdown."""
    if not any(routes.inference_of(request).registry):
        raise errors.Overloaded("no model is served", "no_model")
    return {"ready": True}


async def model_ready(request: Request) -> dict[str, str | bool]:
    """Say that a model can answer."""
    return {"name": routes.find_model(request).name, "ready": True}


async def metadata(request: Request) -> Response:
    """Name a model's versions and tensors."""
    model = routes.find_model(request)
    image = [-1, -1, -1, model.details()["input"]["channels"]]
    content = {
        "name": model.name,
        "versions": [str(n) for n in routes.inference_of(request).registry.versions(model.name)],
        "platform": "pytorch",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": image}],
        "outputs": [tensors.describe(name, len(model.classes)) for name in PLAIN + SAMPLED],
    }
    return routes.JsonResponse(content)


async def infer(request: Request) -> Response:
    """Classify images: in eval mode, by Monte Carlo dropout, or both."""
    inference, model = routes.inference_of(request), routes.find_model(request, log=True)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("", "application/json", "application/octet-stream"):  # Triton's has none
        raise errors.UnsupportedMediaType("send application/json or application/octet-stream")
    lengths, state = request.headers.getlist(tensors.HEADER), request.app.state
    body = await state.reader.read(request)
    size, parsing = len(body), _parse(body, lengths, model, state.reader.limits)
    del body  # its memory is free as soon as it is parsed
    try:
        async with routes.while_connected(request.receive):
            small = size <= SMALL_PNG_BYTES
            parsed = finish(parsing) if small else await inference.decode(parsing)
            sent, images, quick = parsed
            request.state.log["images"] = len(images)
            outputs, tasks = _plan(sent, state.settings.max_samples)
            decoding = prepared(images, model.prepare, model.draft_size)
            pixels: Pixels | Read
            if small and quick:  # the first task decodes, for both
                pixels = cache(lambda: finish(decoding))
            else:
                pixels = await inference.decode(decoding)
            max_wait = sent.parameters.timeout / 1e6
            answers = [
                await inference.run(model, task, pixels, len(images), max_wait) for task in tasks
            ]
    finally:
        state.reader.release(size)
    written = _write(sent, outputs, answers)
    content: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version)}
    if sent.id is not None:
        content["id"] = sent.id
    if isinstance(tasks[-1], Uncertainty):
        used = {name: getattr(tasks[-1], name) for name in _SAMPLING}
        content["parameters"] = {"method": "dropout", "log_base": "e", **used}
    head = routes.to_json({**content, "outputs": [tensor for tensor, _ in written]})
    if not any("parameters" in tensor for tensor, _ in written):
        return Response(head, media_type="application/json")
    binary = b"".join([head, *(data for _, data in written)])
    return Response(binary, 200, {tensors.HEADER: str(len(head))}, "application/octet-stream")


def _parse(
    body: bytes, lengths: Sequence[str], model: Classifier, limits: BodyLimits
) -> Steps[tuple[InferRequest, list[ImageSource], bool]]:
    """Read a request and its images, and say whether decoding them takes next to no time."""
    head, binary = tensors.split(body, lengths)
    yield json_memory(head) + 3 * len(body)
    try:
        request = InferRequest.model_validate(load_json(head))
    except ValidationError as error:
        raise invalid(error) from None
    if request.model_name not in (None, "", model.name):
        raise errors.InvalidRequest("model_name: is not the model of the path: leave it out")
    if request.model_version not in (None, "", str(model.version)):
        raise errors.InvalidRequest(
            "model_version: is not the version that answers: ask for it in the path"
        )
    data = tensors.read(request.inputs[0], binary, limits, request.parameters.scale)
    if isinstance(data, np.ndarray):
        return request, from_pixels(data), True
    images = read_each(data, lambda image: encoded(image, None, limits.image))
    return request, images, len(data) == 1 and is_small_png(data[0], "image/png")


def _plan(request: InferRequest, max_samples: int) -> tuple[dict[str, bool], list[Task]]:
    """Return the outputs to send, each with whether as binary data, and the tasks they need."""
    parameters, binary = request.parameters, request.parameters.binary_data_output
    outputs: dict[str, bool] = {}
    for output in request.outputs:
        wish = output.parameters.binary_data
        outputs[output.name] = binary if wish is None else wish
    if len(outputs) < len(request.outputs):
        raise errors.InvalidRequest("outputs: one is there twice")
    sampled = not outputs.keys().isdisjoint(SAMPLED)
    uncertainty = sampled if parameters.mode is None else parameters.mode == "uncertainty"
    if sampled and not uncertainty:
        raise errors.InvalidRequest('outputs: one needs the mode "uncertainty"')
    if not uncertainty and not parameters.model_fields_set.isdisjoint(_SAMPLING):
        raise errors.InvalidRequest('parameters: one needs the mode "uncertainty"')
    outputs = outputs or dict.fromkeys(PLAIN + SAMPLED if uncertainty else PLAIN, binary)
    tasks: list[Task] = [] if outputs.keys().isdisjoint(PLAIN) else [Predict()]
    if not outputs.keys().isdisjoint(SAMPLED):
        samples = limit_samples(parameters, max_samples)
        tasks.append(Uncertainty(samples, parameters.seed, parameters.masks, parameters.level))
    return outputs, tasks


def _write(
    request: InferRequest, outputs: dict[str, bool], answers: Sequence[Answer]
) -> list[tuple[dict[str, Any], bytes]]:
    """Write the outputs; one that cannot be estimated is left out, or refused if asked for."""
    rows: list[dict[str, Any]] = [{} for _ in answers[0]["predictions"]]
    for answer in reversed(answers):  # label and index are those of the prediction, the first
        for row, prediction in zip(rows, answer["predictions"], strict=True):
            row |= {**prediction, **prediction.get("interval", {})}
    missing = [name for name in outputs if rows[0][name] is None]
    if missing and request.outputs:
        raise errors.InvalidRequest(f"{missing[0]} needs more samples")
    return [
        tensors.write(name, [row[name] for row in rows], binary=binary)
        for name, binary in outputs.items()
        if name not in missing
    ]


def _describe(path: str, body: type[BaseModel], *, required: bool = False) -> dict[str, Any]:
    schema = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
    body = {"required": required, "content": {"application/json": schema}}
    return routes.described(path, body=body)


for _path in ("/models/{name}", "/models/{name}/versions/{version}"):
    _model: dict[str, Any] = {
        "responses": routes.errors(404),
        "openapi_extra": routes.described(_path),
    }
    router.get(_path, response_model=tensors.ModelMetadata, **_model)(metadata)
    router.get(_path + "/ready", **_model)(model_ready)
    router.post(
        _path + "/infer",
        response_model=tensors.InferResponse,
        responses=routes.errors(*routes.TASK_ERRORS),
        openapi_extra=_describe(_path, InferRequest, required=True),
    )(infer)


def _repository(path: str, body: type[BaseModel]) -> Callable[..., Any]:
    """Declare a route of the model repository, whose body may be left out."""
    return router.post(
        "/repository" + path,
        responses=routes.errors(401, 403, *routes.TASK_ERRORS),
        openapi_extra=_describe(path, body),
    )


@_repository("/index", tensors.IndexRequest)
async def index(request: Request) -> list[dict[str, str]]:
    """List every version there is, and why those that are not ready are not."""
    sent = await _read(request, tensors.IndexRequest)
    listed = routes.inference_of(request).repository.index()
    return [entry for entry in listed if entry["state"] == "READY" or not sent.ready]


@_repository("/models/{name}/load", tensors.LoadRequest)
async def load(request: Request) -> dict[str, str]:
    """Serve a model again, or try refused versions again; in every worker."""
    await _read(request, tensors.LoadRequest)
    await routes.inference_of(request).repository.load(request.path_params["name"])
    return {}


@_repository("/models/{name}/unload", tensors.UnloadRequest)
async def unload(request: Request) -> dict[str, str]:
    """Stop serving a model, in every worker; its open requests are finished."""
    await _read(request, tensors.UnloadRequest)
    await routes.inference_of(request).repository.unload(request.path_params["name"])
    return {}


async def _read(request: Request, kind: type[Message]) -> Message:
    """Check the admin token, and read a body that may be left out."""
    token = request.app.state.settings.admin_token
    if token is None:
        raise errors.Forbidden("the repository is closed here: DROPSERVE_ADMIN_TOKEN opens it")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), token.get_secret_value().encode())
    if scheme.lower() != "bearer" or not right:
        raise errors.Unauthorized("the admin token is needed: Authorization: Bearer ...")
    reader = request.app.state.reader
    body = await reader.read(request)
    try:
        return kind.model_validate(load_json(body) if body else {})
    except ValidationError as error:
        raise invalid(error) from None
    finally:
        reader.release(len(body))
