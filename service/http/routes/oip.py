"""Open Inference Protocol, version 2: messages, routes, and tensors from and to arrays.

https://github.com/kserve/open-inference-protocol, with Triton's extensions: model repositories, and
binary data after a message's JSON. An element of BYTES is its length (4 bytes) and then its bytes.
"""

import hmac
import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from dropserve.service import errors
from dropserve.service.http import body as bodies
from dropserve.service.http import common, images
from dropserve.service.http.options import invalid, limit_samples
from dropserve.service.inference.classifier import Answer, Classifier, Predict, Task, Uncertainty
from dropserve.service.inference.decoder import Pixels, Steps
from dropserve.service.inference.wait_limit import WaitLimit
from dropserve.service.schemas import SamplingOptions, Sent
from dropserve.service.settings import Settings

HEADER = "Inference-Header-Content-Length"
Output = StrEnum(
    "Output",
    "probabilities index label mean variance standard_error degrees_of_freedom predictive_entropy "
    "expected_entropy mutual_information variation_ratio lower upper",
)
PLAIN, SAMPLED = (*Output,)[:3], (*Output,)[3:]  # of eval mode, and of Monte Carlo dropout
ROWS = ("probabilities", "mean", "variance", "standard_error", "lower", "upper")  # of all classes
DATATYPES = {"index": "INT64", "degrees_of_freedom": "INT64", "label": "BYTES"}  # others: FP32
Ignored = str | int | float | bool | None
_SAMPLING = ("samples", "seed", "masks", "level")
Message = TypeVar("Message", bound=BaseModel)
router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
infer_router = APIRouter(prefix="/v2", tags=router.tags, route_class=common.PlainRoute)


def _allow_null(schema: dict[str, Any]) -> None:
    """Say in a schema that null stands for a member that is left out."""
    for name, member in schema["properties"].items():
        if name not in schema.get("required", ()) and "null" not in str(member):
            about = {k: member.pop(k) for k in ("title", "description", "default") if k in member}
            schema["properties"][name] = {"anyOf": [member, {"type": "null"}], **about}


class Strict(Sent):
    """Part of a message: an unknown name is refused, and no type is converted."""

    model_config = ConfigDict(strict=True, json_schema_extra=_allow_null)


class InferParameters(Strict, SamplingOptions):
    """How to answer: uncertainty adds Monte Carlo dropout; from `priority` on, all is ignored."""

    mode: Literal["predict", "uncertainty"] | None = None
    binary_data_output: bool = Field(False, description="All outputs as binary data.")
    timeout: int = Field(
        0, ge=0, lt=2**63, description="Microseconds to wait; 0: as long as the service allows."
    )
    priority: Ignored = None
    content_type: Ignored = None
    sequence_id: Ignored = None
    sequence_start: Ignored = None
    sequence_end: Ignored = None


class InputParameters(Strict):
    """Parameters of the input; `content_type` is ignored."""

    binary_data_size: int | None = Field(None, ge=0)
    content_type: Ignored = None


class InputTensor(Strict):
    """Images: pixels [B, H, W] or [B, H, W, C], C 1 or 3; or encoded ones, [B] or [B, 1]."""

    name: Literal["image"]
    shape: list[Annotated[int, Field(ge=1)]] = Field(max_length=4)
    datatype: Literal["UINT8", "FP32", "BYTES"]
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = Field(None, description="Nested or flat; BYTES are base64 strings.")


class OutputParameters(Strict):
    """Parameters of a requested output."""

    binary_data: bool | None = None


class RequestedOutput(Strict):
    """An output to return."""

    name: Annotated[Output, Field(strict=False), WithJsonSchema({"enum": [*Output]})]
    parameters: OutputParameters = OutputParameters()


class InferRequest(Strict):
    """Body of `infer`, or the part of it before binary data; no outputs: all of the mode."""

    # half a surrogate pair, which no answer could repeat, cannot be encoded
    id: Annotated[str, AfterValidator(lambda text: text.encode().decode())] | None = None
    model_name: str | None = Field(None, description="The path's; KServe's client sends it.")
    model_version: str | None = Field(None, description="The one that answers, or empty.")
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] = Field([], max_length=len(Output))


class Tensor(BaseModel):
    """A tensor; in metadata without data, and -1 stands for any size."""

    name: str
    datatype: Literal["UINT8", "FP32", "INT64", "BYTES"]
    shape: list[int]
    parameters: dict[Literal["binary_data_size"], int] | None = None
    data: list[float | int | str] | None = Field(None, description="Row-major and flat.")


class InferResponse(BaseModel):
    """Answer of `infer`."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="How the model was sampled.")
    outputs: list[Tensor]


class ModelMetadata(BaseModel):
    """Versions and tensors of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class IndexRequest(Strict):
    """Which versions to list."""

    ready: bool = Field(False, description="Only those that are ready.")


class LoadRequest(Strict):
    """Body of `load`; Triton's parameters (a configuration, files) are refused."""

    parameters: Strict = Strict()


class UnloadParameters(Strict):
    """Parameters of `unload`."""

    unload_dependents: bool = Field(False, description="Ignored: no model has dependents.")


class UnloadRequest(Strict):
    """Body of `unload`."""

    parameters: UnloadParameters = UnloadParameters()


class ProtocolError(BaseModel):
    """Any failure under /v2."""

    error: str


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


@router.get("/health/ready", responses=common.errors(503))
async def ready(request: Request) -> dict[str, bool]:
    """Models are loaded, and can run. The port is closed before, and from a shutdown's start."""
    common.require_ready(request)
    return {"ready": True}


async def model_ready(request: Request) -> dict[str, str | bool]:
    """Say that a model can answer."""
    common.require_serving(request)
    name = request.path_params["name"]
    common.inference_of(request).store.check(name, request.path_params.get("version"))
    return {"name": name, "ready": True}


async def metadata(request: Request) -> Response:
    """Name a model's versions and tensors."""
    model = await common.find_model(request)
    image, rows = [-1, -1, -1, model.details()["input"]["channels"]], [-1, len(model.classes)]
    kinds = [(n, DATATYPES.get(n, "FP32"), rows if n in ROWS else [-1]) for n in Output]
    content = {
        "name": model.name,
        "versions": [*map(str, common.inference_of(request).store.versions(model.name))],
        "platform": "pytorch",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": image}],
        "outputs": [{"name": n, "datatype": kind, "shape": shape} for n, kind, shape in kinds],
    }
    return common.JsonResponse(content)


async def infer(request: Request) -> Response:
    """Classify images: in eval mode, by Monte Carlo dropout, or both."""
    inference, model = common.inference_of(request), await common.find_model(request, log=True)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("", "application/json", "application/octet-stream"):  # Triton's has none
        raise errors.UnsupportedMediaType("send application/json or application/octet-stream")
    lengths, state = request.headers.getlist(HEADER), request.app.state
    seconds = common.admit(request, urgent=True)  # its mode is in the body
    body = await state.reader.read(request)
    limit = WaitLimit(seconds)
    size, parsing = len(body), _parse(body, lengths, model, state.settings)
    del body  # its memory is free as soon as it is parsed
    try:
        async with common.while_connected(request.receive):
            sent, sources = await common.parsed(inference, parsing, size, limit)
            request.state.log["images"] = count = len(sources)
            outputs, tasks = _plan(sent, state.settings.max_samples)
            if sent.parameters.timeout:
                limit.lower(sent.parameters.timeout / 1e6)
            inference.check_wait(limit.left, urgent=isinstance(tasks[0], Predict))
            pixels = await common.decoded(inference, model, sources, limit)
            del sources  # and with them the body
            if callable(pixels):
                pixels = cache(pixels)  # by the first task, once for both
            left = limit.left
            answers = {
                task: await inference.run(model, task, pixels, count, WaitLimit(left))
                for task in tasks
            }
    finally:
        state.reader.release(size)
    return _respond(model, sent, outputs, answers)


def _parse(
    body: bytes, lengths: Sequence[str], model: Classifier, limits: Settings
) -> Steps[tuple[InferRequest, list[images.ImageSource]]]:
    """Read a request and its images, which are not decoded yet."""
    head, binary = _split(body, lengths)
    yield bodies.json_memory(head) + 3 * len(body)
    try:
        request = InferRequest.model_validate(bodies.load_json(head))
    except ValidationError as error:
        raise invalid(error) from None
    if request.model_name not in (None, "", model.name):
        raise errors.InvalidRequest("model_name: is not the model of the path: leave it out")
    if request.model_version not in (None, "", str(model.version)):
        raise errors.InvalidRequest("model_version: is not the version that answers: use the path")
    data = _read_images(request.inputs[0], binary, limits, request.parameters.scale)
    if isinstance(data, np.ndarray):
        return request, bodies.from_pixels(data)
    return request, bodies.read_each(data, lambda data: images.encoded(data, None, limits))


def _split(body: bytes, lengths: Sequence[str]) -> tuple[bytes, memoryview]:
    """Split a message into its JSON, as long as the header's values say, and its binary data."""
    if not lengths:
        return body, memoryview(b"")
    end = int(lengths[0]) if lengths[0].isdecimal() and len(lengths[0]) < 19 else 0
    if len(lengths) > 1 or not 0 < end <= len(body):
        raise errors.MalformedRequest(f"{HEADER} must occur once, from 1 to the body's length")
    return body[:end], memoryview(body)[end:]


def _read_images(
    tensor: InputTensor, binary: memoryview, limits: Settings, scale: int
) -> Pixels | list[bytes]:
    """Return the pixels [B, H, W] or [B, H, W, C] of an input, or its encoded images."""
    shape, size = tuple(tensor.shape), tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise errors.InvalidRequest("the input needs `data` or the parameter binary_data_size")
    if len(binary) != (size or 0):
        raise errors.MalformedRequest("binary_data_size is not the size of the data after the JSON")
    encoded, whole = tensor.datatype == "BYTES", tensor.datatype == "UINT8"
    if encoded and (not shape or shape[1:] not in ((), (1,))):
        raise errors.InvalidRequest("the shape of encoded images must be [B] or [B, 1]")
    if not encoded and (len(shape) < 3 or shape[3:] not in ((), (1,), (3,))):
        raise errors.InvalidRequest("the shape of pixels must be [B, H, W] or [B, H, W, 1 or 3]")
    bodies.check_count(shape[0], limits)
    if encoded:
        bodies.check_encoded(scale)
        if size is not None:
            return _split_bytes(binary, shape[0])
        return [bodies.from_base64(item) for item in _elements(tensor).flat]
    images.check_size((shape[2], shape[1]), limits)
    if size is None:
        kinds = frozenset([int]) if whole else bodies.NUMBERS
        return bodies.to_pixels(_elements(tensor), scale, kinds)
    if size != (1 if whole else 4) * math.prod(shape):
        raise errors.MalformedRequest("the size of the binary data does not fit the shape")
    numbers = np.frombuffer(binary, np.uint8 if whole else "<f4").reshape(shape)
    return numbers if whole and scale == 255 else bodies.to_pixels(numbers, scale)


def _elements(tensor: InputTensor) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Return the elements of a tensor's JSON in its shape."""
    elements = np.array(tensor.data, dtype=object)  # lists of different lengths are elements
    if elements.shape not in (tuple(tensor.shape), (math.prod(tensor.shape),)):
        raise errors.InvalidRequest("the data does not fit the shape")
    return elements.reshape(tensor.shape)


def _split_bytes(data: memoryview, count: int) -> list[bytes]:
    """Split BYTES into its elements: exactly as many, and nothing left over."""
    elements, end = [], 0
    for _ in range(count):
        start = end + 4
        end = start + int.from_bytes(data[end:start], "little")
        elements.append(bytes(data[start:end]))
    if end != len(data):
        raise errors.MalformedRequest("the binary data is not as many elements as the shape says")
    return elements


def _plan(request: InferRequest, max_samples: int) -> tuple[dict[str, bool], list[Task]]:
    """Return the outputs to send, each with whether as binary data, and the tasks they need."""
    parameters, asked = request.parameters, {o.name: o.parameters for o in request.outputs}
    if len(asked) < len(request.outputs):
        raise errors.InvalidRequest("outputs: a duplicate name")
    sampled = not asked.keys().isdisjoint(SAMPLED)
    uncertainty = sampled if parameters.mode is None else parameters.mode == "uncertainty"
    if not uncertainty and (sampled or not parameters.model_fields_set.isdisjoint(_SAMPLING)):
        raise errors.InvalidRequest('an output or a parameter needs the mode "uncertainty"')
    names = asked or (Output if uncertainty else PLAIN)
    outputs = dict.fromkeys(names, parameters.binary_data_output)
    outputs |= {name: p.binary_data for name, p in asked.items() if p.binary_data is not None}
    tasks: list[Task] = [] if outputs.keys().isdisjoint(PLAIN) else [Predict()]
    if not outputs.keys().isdisjoint(SAMPLED):
        samples = limit_samples(parameters, max_samples)
        tasks.append(Uncertainty(samples, parameters.seed, parameters.masks, parameters.level))
    return outputs, tasks


def _respond(
    model: Classifier, request: InferRequest, outputs: dict[str, bool], answers: dict[Task, Answer]
) -> Response:
    """Write the outputs: JSON, and binary data after it if one is sent as that."""
    predictions = [answer["predictions"] for answer in answers.values()]
    rows = [{**p, **p.get("interval", {})} for p in predictions[-1]]
    for row, prediction in zip(rows, predictions[0], strict=True):
        row |= prediction  # label and index are those of eval mode
    for name in [name for name in outputs if rows[0][name] is None]:  # at T = 1, say
        if request.outputs:
            raise errors.InvalidRequest(f"{name} needs more samples")
        del outputs[name]
    tensors = [_write(name, [row[name] for row in rows], binary=b) for name, b in outputs.items()]
    content: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version)}
    if request.id is not None:
        content["id"] = request.id
    for task in answers:
        if isinstance(task, Uncertainty):
            used = {name: getattr(task, name) for name in _SAMPLING}
            content["parameters"] = {"method": "dropout", "log_base": "e", **used}
    head = common.to_json({**content, "outputs": [tensor for tensor, _ in tensors]})
    if not any("parameters" in tensor for tensor, _ in tensors):
        return Response(head, media_type="application/json")
    body = b"".join([head, *(data for _, data in tensors)])
    return Response(body, 200, {HEADER: str(len(head))}, "application/octet-stream")


def _write(name: str, values: Sequence[Any], *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """Return an output's part of the JSON, and its binary data."""
    datatype, shape = DATATYPES.get(name, "FP32"), [len(values)]
    flat: object = values
    if datatype == "BYTES":
        data = b"".join(len(text).to_bytes(4, "little") + text for text in map(str.encode, values))
    else:
        array = np.array(values, "<i8" if datatype == "INT64" else "<f4")
        shape, flat, data = list(array.shape), array.ravel(), array.tobytes()
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    if binary:
        return tensor | {"parameters": {"binary_data_size": len(data)}}, data
    return tensor | {"data": flat}, b""


def _post(path: str, body: type[BaseModel], response: object) -> Callable[..., Any]:
    infers = body is InferRequest  # the others are the repository's: bodies may be left out
    schema = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
    content = {"required": infers, "content": {"application/json": schema}}
    return (infer_router if infers else router).post(
        path,
        response_model=response,
        responses=common.errors(*common.TASK_ERRORS, *(() if infers else (403,))),
        openapi_extra=common.described(path, body=content),
    )


for _path in ("/models/{name}", "/models/{name}/versions/{version}"):
    _get: Any = {"responses": common.errors(404), "openapi_extra": common.described(_path)}
    router.get(_path, response_model=ModelMetadata, **_get)(metadata)
    router.get(_path + "/ready", **_get)(model_ready)
    _post(_path + "/infer", InferRequest, InferResponse)(infer)


@_post("/repository/index", IndexRequest, list[dict[str, str]])
async def index(request: Request) -> list[dict[str, str]]:
    """List every version there is, and why those that are not ready are not."""
    sent = await _read(request, IndexRequest)
    listed = common.inference_of(request).store.index()
    return [entry for entry in listed if entry["state"] == "READY" or not sent.ready]


@_post("/repository/models/{name}/load", LoadRequest, dict[str, str])
async def load(request: Request) -> dict[str, str]:
    """Serve a model again, or try refused versions again; in every worker."""
    await _read(request, LoadRequest)
    await common.inference_of(request).store.load(request.path_params["name"])
    return {}


@_post("/repository/models/{name}/unload", UnloadRequest, dict[str, str])
async def unload(request: Request) -> dict[str, str]:
    """Stop serving a model, in every worker; its open requests are finished."""
    await _read(request, UnloadRequest)
    await common.inference_of(request).store.unload(request.path_params["name"])
    return {}


async def _read(request: Request, kind: type[Message]) -> Message:
    """Check the admin token, and read a body that may be left out."""
    token, reader = request.app.state.settings.admin_token, request.app.state.reader
    if token is None:
        raise errors.Forbidden("the repository is disabled: set DROPSERVE_ADMIN_TOKEN")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), token.get_secret_value().encode())
    if scheme.lower() != "bearer" or not right:
        raise errors.Unauthorized("the admin token is needed: Authorization: Bearer ...")
    body = await reader.read(request)
    try:
        return kind.model_validate(bodies.load_json(body) if body else {})
    except ValidationError as error:
        raise invalid(error) from None
    finally:
        reader.release(len(body))
