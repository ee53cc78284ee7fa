"""Routes that describe models: list, details, example images."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dropserve.service.errors import NotFound
from dropserve.service.http.common import JsonResponse, described, errors, find_model, inference_of
from dropserve.service.http.options import MODEL, VERSION
from dropserve.service.inference.model_store import plain_number
from dropserve.service.schemas import ExampleList, ModelDetails, ModelList

if TYPE_CHECKING:
    from dropserve.service.inference.classifier import Classifier
    from dropserve.service.inference.inference import Inference

router = APIRouter(tags=["models"])
_IMAGE_HEADERS = {"Cache-Control": "private, max-age=86400"}  # a version does not change
_PNG = {"image/png": {"schema": {"type": "string", "format": "binary"}}}


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """List the models that are served, those that are loaded on request included."""
    inference = inference_of(request)
    listed = []
    for name in inference.store:
        served = inference.store.versions(name)
        answers = inference.store.state(name)["version"]
        listed.append(_summary(inference, name, served.get(answers)))
    return JsonResponse({"models": listed})


async def details(request: Request) -> Response:
    """Describe a version: classes, input, dropout sites, evaluation, digest."""
    model = await find_model(request)
    about = _summary(inference_of(request), model.name, model)
    return JsonResponse({**about, **model.details()})


def _summary(inference: "Inference", name: str, model: "Classifier | None") -> dict[str, Any]:
    return {
        "name": name,
        **inference.store.state(name),
        "version": model and model.version,
        "default": name == inference.store.default,
        "manifest_sha256": model and model.manifest_sha256,
    }


async def examples(request: Request) -> Response:
    """List test images of the version; empty if it has none."""
    model = await find_model(request)
    base = f"/v1/models/{model.name}/versions/{model.version}/examples"
    listed = [
        {"label": model.classes[example.index], "index": example.index, "url": f"{base}/{i}"}
        for i, example in enumerate(model.examples)
    ]
    return JsonResponse({"model": model.name, "version": model.version, "examples": listed})


for _path in (MODEL, VERSION):
    _how: dict[str, Any] = {"responses": errors(404), "openapi_extra": described(_path)}
    router.get(_path, response_model=ModelDetails, **_how)(details)
    router.get(_path + "/examples", response_model=ExampleList, **_how)(examples)
_EXAMPLE = VERSION + "/examples/{number}"


@router.get(
    _EXAMPLE,
    response_class=Response,
    responses={200: {"content": _PNG, "description": "The image."}, **errors(404)},
    openapi_extra=described(_EXAMPLE),
)
async def example(request: Request) -> Response:
    """Send an example as a PNG. Posted to a task, it gives exactly the test set's pixels."""
    model = await find_model(request)
    number = plain_number(request.path_params["number"])
    if not 0 <= number < len(model.examples):
        raise NotFound("no such example; GET .../examples lists them")
    return Response(model.examples[number].file, media_type="image/png", headers=_IMAGE_HEADERS)
