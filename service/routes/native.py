"""The native routes: models, predict, uncertainty, compare."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Annotated, Any, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from service.bodies import BodyReader, parse_images
from service.classifier import Classifier, Compare, Pixels, Predict, Task, Uncertainty
from service.errors import InvalidRequest, TooLarge
from service.images import is_quick
from service.inference import Inference
from service.schemas import (
    CompareOptions,
    CompareResponse,
    ModelDetails,
    ModelList,
    PredictOptions,
    PredictResponse,
    Problem,
    UncertaintyOptions,
    UncertaintyResponse,
)

router = APIRouter(tags=["models"])

Result = TypeVar("Result")
Find = Callable[..., Awaitable[Classifier]]
_MODEL = "/v1/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_MAX_NUMBERS = 1_000_000
"""Sampled probabilities in one answer: about 12 MB of JSON."""

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PICTURES: dict[str, Any] = {
    "required": True,
    "content": {
        "image/png": _BINARY,
        "image/jpeg": _BINARY,
        "image/webp": _BINARY,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "array", "items": {"type": "string", "format": "binary"}}
                },
            }
        },
        "application/json": {
            "schema": {
                "oneOf": [
                    {
                        "type": "object",
                        "required": ["images"],
                        "properties": {
                            "images": {
                                "type": "array",
                                "items": {"type": "string", "contentEncoding": "base64"},
                            }
                        },
                    },
                    {
                        "type": "object",
                        "required": ["instances"],
                        "properties": {
                            "instances": {
                                "type": "array",
                                "description": "Numbers 0 to 255, each HxW or HxWxC.",
                                "items": {"type": "array"},
                            }
                        },
                    },
                ]
            }
        },
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {"application/problem+json": {}}}
    for status in (400, 404, 408, 413, 415, 422, 500, 503)
}


def inference_of(request: Request) -> Inference:
    """Return the app's inference."""
    inference: Inference = request.app.state.inference
    return inference


async def default_model(request: Request) -> Classifier:
    """Find the default model's latest version."""
    return inference_of(request).registry.find()


async def named_model(request: Request, name: str) -> Classifier:
    """Find a model's latest version."""
    return inference_of(request).registry.find(name)


async def versioned_model(request: Request, name: str, version: str) -> Classifier:
    """Find one version of a model."""
    return inference_of(request).registry.find(name, version)


@router.get("/v1/models", response_model=ModelList, responses={503: _ERRORS[503]})
async def models(request: Request) -> Response:
    """List the models that are served."""
    registry = inference_of(request).registry
    listed = [_summary(inference_of(request), registry.find(name)) for name in registry]
    return _json({"models": listed})


def _describe(request: Request, model: Classifier) -> Response:
    return _json({**_summary(inference_of(request), model), **model.details()})


def _summary(inference: Inference, model: Classifier) -> dict[str, Any]:
    return {
        "name": model.name,
        "version": model.version,
        "versions": inference.registry.versions(model.name),
        "default": model.name == inference.registry.default,
    }


def _add_details(path: str, find: Find) -> None:
    @router.get(path, response_model=ModelDetails, responses={404: _ERRORS[404]})
    async def details(request: Request, model: Annotated[Classifier, Depends(find)]) -> Response:
        """Describe a version: classes, input, dropout sites, evaluation, digest."""
        return _describe(request, model)


def _add_tasks(prefix: str, find: Find) -> None:
    """Register predict, uncertainty and compare under a prefix that says which model."""
    Model = Annotated[Classifier, Depends(find)]  # noqa: N806  a type

    def post(path: str, response: type[BaseModel]) -> Callable[..., Any]:
        return router.post(
            prefix + path,
            response_model=response,
            responses=_ERRORS,
            openapi_extra={"requestBody": _PICTURES},
        )

    @post("/predict", PredictResponse)
    async def predict(
        request: Request,
        model: Model,
        options: Annotated[PredictOptions, Query()],  # noqa: ARG001  refuses unknown ones
    ) -> Response:
        """Classify pictures in eval mode."""
        return _json(await _answer(request, model, Predict(), {}))

    @post("/uncertainty", UncertaintyResponse)
    async def uncertainty(
        request: Request,
        model: Model,
        options: Annotated[UncertaintyOptions, Query()],
    ) -> Response:
        """Classify pictures by Monte Carlo dropout, and say how sure the answer is."""
        most = request.app.state.settings.max_samples
        if options.samples > most:
            raise InvalidRequest(f"samples: at most {most} here")
        head = {
            "method": "dropout",
            "samples": options.samples,
            "seed": options.seed,
            "masks": options.masks,
            "log_base": "e",
        }
        return _json(await _answer(request, model, Uncertainty(**dict(options)), head))

    @post("/compare", CompareResponse)
    async def compare(
        request: Request,
        model: Model,
        options: Annotated[CompareOptions, Query()],
    ) -> Response:
        """Show pictures in train mode and in eval mode, layer by layer."""
        return _json(await _answer(request, model, Compare(**dict(options)), dict(options)))


for _prefix, _find in (("", default_model), (_MODEL, named_model), (_VERSION, versioned_model)):
    if _prefix:
        _add_details(_prefix, _find)
    _add_tasks(_prefix, _find)


async def _answer(
    request: Request, model: Classifier, task: Task, head: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the pictures, run the task, and put the answer together."""
    inference = inference_of(request)
    pixels = await _read_pixels(request, inference, model)
    if isinstance(task, Uncertainty) and task.include_samples:
        _check_length(task.samples * len(pixels) * len(model.classes))
    request.state.log.update(model=model.name, version=model.version, images=len(pixels))
    answer = await _while_connected(request, inference.run(model, task, pixels))
    return {"model": model.name, "version": model.version, **head, **answer}


def _check_length(numbers: int) -> None:
    """Refuse, before the work, an answer that would be too long to write."""
    if numbers > _MAX_NUMBERS:
        raise TooLarge(
            f"samples x images x classes is more than {_MAX_NUMBERS}: ask for less at once, or "
            f"without include_samples"
        )


async def _read_pixels(request: Request, inference: Inference, model: Classifier) -> Pixels:
    """Read a body into the network's pixels [B, C, H, W], off the event loop unless it is quick."""
    reader: BodyReader = request.app.state.body_reader
    content_type = request.headers.get("content-type", "")
    async with reader.read(request) as body:

        def work() -> Pixels:
            images = parse_images(body, content_type, reader.limits)
            return np.stack([model.prepare(image) for image in images])

        if is_quick(body, content_type):
            return work()
        return await _while_connected(request, inference.decode(work))


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for work; give it up, and with it its place in the queue, if the client goes away."""
    result = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnection(request))
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        result.cancel()
        gone.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: object) -> Response:
    return Response(
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )
