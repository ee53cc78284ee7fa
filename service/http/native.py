"""The native routes: models; and predict, uncertainty and compare as the document shows them."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from dropserve.service.events import StreamEvent
from dropserve.service.http.stream import EventStream
from dropserve.service.inference.classifier import Classifier
from dropserve.service.inference.inference import Inference
from dropserve.service.schemas import (
    CompareOptions,
    CompareResponse,
    ModelDetails,
    ModelList,
    PredictOptions,
    PredictResponse,
    SamplingOptions,
    UncertaintyOptions,
    UncertaintyResponse,
)

router = APIRouter(tags=["models"])

Result = TypeVar("Result")
Find = Callable[..., Awaitable[Classifier]]
_MODEL = "/v1/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_TASK_ERRORS = (400, 404, 408, 413, 415, 422, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare errors by their statuses alone: `document.py` says the same of each everywhere."""
    return {status: {} for status in statuses}


def inference_of(request: Request) -> Inference:
    """Return the app's inference."""
    inference: Inference = request.app.state.inference
    return inference


async def default_model(request: Request) -> Classifier:
    """Find the default model's version that answers."""
    return inference_of(request).store.find()


async def named_model(request: Request, name: str) -> Classifier:
    """Find a model's version that answers."""
    return inference_of(request).store.find(name)


async def versioned_model(request: Request, name: str, version: str) -> Classifier:
    """Find one version of a model."""
    return inference_of(request).store.find(name, version)


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """List the models that are served."""
    registry = inference_of(request).store
    listed = [_summary(inference_of(request), registry.find(name)) for name in registry]
    return _json({"models": listed})


def _describe(request: Request, model: Classifier) -> Response:
    return _json({**_summary(inference_of(request), model), **model.details()})


def _summary(inference: Inference, model: Classifier) -> dict[str, Any]:
    return {
        "name": model.name,
        **inference.store.state(model.name),
        "version": model.version,
        "default": model.name == inference.store.default,
        "manifest_sha256": model.manifest_sha256,
    }


def _add_details(path: str, find: Find) -> None:
    @router.get(path, response_model=ModelDetails, responses=errors(404))
    async def details(request: Request, model: Annotated[Classifier, Depends(find)]) -> Response:
        """Describe a version: classes, input, dropout sites, evaluation, digest."""
        return _describe(request, model)


def _add_tasks(prefix: str, find: Find) -> None:
    """Declare predict, uncertainty and compare under a prefix that says which model.

    For the OpenAPI document, and for 405 on other methods; `tasks.py` answers them.
    """
    Model = Annotated[Classifier, Depends(find)]  # noqa: N806  a type

    def post(path: str, response: type[BaseModel]) -> Callable[..., Any]:
        return router.post(
            prefix + path,
            response_model=response,
            responses=errors(*_TASK_ERRORS),
        )

    @post("/predict", PredictResponse)
    async def predict(model: Model, options: Annotated[PredictOptions, Query()]) -> Response:
        """Classify pictures in eval mode."""
        raise NotImplementedError

    @post("/uncertainty", UncertaintyResponse)
    async def uncertainty(
        model: Model, options: Annotated[UncertaintyOptions, Query()]
    ) -> Response:
        """Classify pictures by Monte Carlo dropout, and say how sure the answer is."""
        raise NotImplementedError

    @router.post(
        prefix + "/uncertainty/stream",
        response_class=EventStream,
        response_model=StreamEvent,
        responses=errors(*_TASK_ERRORS),
    )
    async def uncertainty_stream(
        model: Model, options: Annotated[SamplingOptions, Query()]
    ) -> Response:
        """Stream Monte Carlo dropout of one picture: events start, sample (T of them) and end."""
        raise NotImplementedError

    @post("/compare", CompareResponse)
    async def compare(model: Model, options: Annotated[CompareOptions, Query()]) -> Response:
        """Show pictures in train mode and in eval mode, layer by layer."""
        raise NotImplementedError


for _prefix, _find in (("", default_model), (_MODEL, named_model), (_VERSION, versioned_model)):
    if _prefix:
        _add_details(_prefix, _find)
    _add_tasks(_prefix, _find)


def _json(content: object) -> Response:
    return Response(
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )
