"""Routes of the Open Inference Protocol, version 2; the messages and tensors are in `tensors.py`."""

import hmac
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from dropserve.service import errors
from dropserve.service.http import body as bodies
from dropserve.service.http import routes, tensors
from dropserve.service.http.decoding import Pixels, Steps, finish, prepared
from dropserve.service.http.images import SMALL_PNG_BYTES, ImageSource, encoded, is_small_png
from dropserve.service.http.options import invalid, limit_samples
from dropserve.service.inference.classifier import Answer, Classifier
from dropserve.service.inference.tasks import Predict, Task, Uncertainty

if TYPE_CHECKING:
    from dropserve.service.inference.inference import Read

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
Message = TypeVar("Message", bound=BaseModel)
PLAIN, SAMPLED = tensors.PLAIN, tensors.SAMPLED
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


async def metadata(request: Request) -> dict[str, Any]:
    """Name a model's versions and tensors."""
    model = routes.find_model(request)
    image = [-1, -1, -1, model.details()["input"]["channels"]]
    return {
        "name": model.name,
        "versions": [str(n) for n in routes.inference_of(request).registry.versions(model.name)],
        "platform": "pytorch",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": image}],
        "outputs": [tensors.describe(name, len(model.classes)) for name in PLAIN + SAMPLED],
    }


async def infer(request: Request) -> Response:
    """Classify images: in eval mode, by Monte Carlo dropout, or both."""
    inference, model = routes.inference_of(request), routes.find_model(request, log=True)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("", "application/json", "application/octet-stream"):  # Triton's has none
        raise errors.UnsupportedMediaType(
            "send application/json, or application/octet-stream with binary data"
        )
    lengths, settings = request.headers.getlist(tensors.HEADER), request.app.state.settings
    reader: bodies.BodyReader = request.app.state.reader
    body = await reader.read(request)
    size, parsing = len(body), _parse(body, lengths, model, reader.limits)
    del body  # its memory is free as soon as it is parsed
    try:
        async with routes.while_connected(request.receive):
            small = size <= SMALL_PNG_BYTES
            parsed = finish(parsing) if small else await inference.decode(parsing)
            sent, images, quick = parsed
            request.state.log["images"] = len(images)
            outputs, tasks = _plan(sent, settings.max_samples)
            decoding, timeout = prepared(images, model.prepare), sent.parameters.timeout / 1e6
            pixels: Pixels | Read
            if small and quick:  # the first task decodes, for both
                pixels = cache(lambda: finish(decoding))
            else:
                pixels = await inference.decode(decoding)
            answers = [
                await inference.run(model, task, pixels, len(images), timeout) for task in tasks
            ]
    finally:
        reader.release(size)
    head = {"model_name": model.name, "model_version": str(model.version)}
    if sent.id is not None:
        head["id"] = sent.id
    for task in tasks:
        if isinstance(task, Uncertainty):
            head["parameters"] = {name: getattr(task, name) for name in _SAMPLING}
            head["parameters"] |= {"method": "dropout", "log_base": "e"}
    return _respond(head, outputs, answers, named=bool(sent.outputs))


def _parse(
    body: bytes, lengths: Sequence[str], model: Classifier, limits: bodies.BodyLimits
) -> Steps[tuple[tensors.InferRequest, list[ImageSource], bool]]:
    """Read a request and its images, and say whether decoding them takes next to no time."""
    head, binary = tensors.split(body, lengths)
    yield bodies.json_memory(head) + 3 * len(body)
    try:
        request = tensors.InferRequest.model_validate(bodies.load_json(head))
    except ValidationError as error:
        raise invalid(error) from None
    if request.model_name not in (None, "", model.name):
        raise errors.InvalidRequest("model_name: is not the model of the path: leave it out")
    if request.model_version not in (None, "", str(model.version)):
        raise errors.InvalidRequest(
            "model_version: is not the version that answers: ask for it in the path, "
            "/v2/models/.../versions/.../infer"
        )
    data = tensors.read(request.inputs[0], binary, limits, request.parameters.scale)
    if isinstance(data, np.ndarray):
        return request, bodies.from_pixels(data), True
    images = bodies.read_each(data, lambda image: encoded(image, None, limits.image))
    return request, images, len(data) == 1 and is_small_png(data[0], "image/png")


def _plan(request: tensors.InferRequest, max_samples: int) -> tuple[dict[str, bool], list[Task]]:
    """Return the outputs to send, and whether as binary data; and the tasks that they need."""
    parameters, wishes = request.parameters, {o.name: o.parameters for o in request.outputs}
    if len(wishes) < len(request.outputs):
        raise errors.InvalidRequest("outputs: one is there twice")
    sampled = not wishes.keys().isdisjoint(SAMPLED)
    uncertainty = sampled if parameters.mode is None else parameters.mode == "uncertainty"
    if sampled and not uncertainty:
        raise errors.InvalidRequest('outputs: one needs the mode "uncertainty"')
    if not uncertainty and not parameters.model_fields_set.isdisjoint(_SAMPLING):
        raise errors.InvalidRequest('parameters: one needs the mode "uncertainty"')
    usual = parameters.binary_data_output
    outputs = {n: usual if w.binary_data is None else w.binary_data for n, w in wishes.items()}
    outputs = outputs or dict.fromkeys(PLAIN + SAMPLED if uncertainty else PLAIN, usual)
    tasks: list[Task] = [] if outputs.keys().isdisjoint(PLAIN) else [Predict()]
    if not outputs.keys().isdisjoint(SAMPLED):
        options = parameters.model_dump(include=set(_SAMPLING))
        options["samples"] = limit_samples(parameters, max_samples)
        tasks.append(Uncertainty(**options))
    return outputs, tasks


def _respond(
    head: Mapping[str, Any], outputs: Mapping[str, bool], answers: Sequence[Answer], *, named: bool
) -> Response:
    """Write the outputs: JSON, and binary data after it if an output has any.

    Raises:
        InvalidRequest: an output that was asked for by name cannot be estimated.
    """
    rows: list[dict[str, Any]] = [{} for _ in answers[0]["predictions"]]
    for answer in reversed(answers):  # label and index are those of the prediction, the first
        for row, prediction in zip(rows, answer["predictions"], strict=True):
            row |= {**prediction, **prediction.get("interval", {})}
    missing = [name for name in outputs if rows[0][name] is None]
    if missing and named:
        raise errors.InvalidRequest(f"{missing[0]} needs more samples")
    written = [
        tensors.write(name, [row[name] for row in rows], binary=binary)
        for name, binary in outputs.items()
        if name not in missing
    ]
    content = routes.to_json({**head, "outputs": [tensor for tensor, _ in written]})
    if not any("parameters" in tensor for tensor, _ in written):
        return Response(content, media_type="application/json")
    headers = {tensors.HEADER: str(len(content))}
    content = b"".join([content, *(data for _, data in written)])
    return Response(content, 200, headers, "application/octet-stream")


def _describe(path: str, body: type[BaseModel], *, required: bool = False) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"application/json": {"schema": schema}}
    return routes.described(path, body={"required": required, "content": content})


for _path in ("/models/{name}", "/models/{name}/versions/{version}"):
    _about: dict[str, Any] = {
        "responses": routes.errors(404),
        "openapi_extra": routes.described(_path),
    }
    router.get(_path, response_model=tensors.ModelMetadata, **_about)(metadata)
    router.get(_path + "/ready", **_about)(model_ready)
    router.post(
        _path + "/infer",
        response_model=tensors.InferResponse,
        responses=routes.errors(*routes.TASK_ERRORS),
        openapi_extra=_describe(_path, tensors.InferRequest, required=True),
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
    reader: bodies.BodyReader = request.app.state.reader
    body = await reader.read(request)
    try:
        return kind.model_validate(bodies.load_json(body) if body else {})
    except ValidationError as error:
        raise invalid(error) from None
    finally:
        reader.release(len(body))
