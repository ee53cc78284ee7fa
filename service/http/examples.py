"""Pictures of the test set that were saved with a model, to try it with."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from dropserve.service.errors import NotFound
from dropserve.service.http.native import Find, errors, named_model, versioned_model
from dropserve.service.inference.classifier import Classifier
from dropserve.service.inference.model_store import plain_number
from dropserve.service.schemas import ExampleList

router = APIRouter(tags=["models"])

_MODEL = "/v1/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
_HEADERS = {
    "Cache-Control": "private, max-age=86400",  # a version does not change
    "X-Content-Type-Options": "nosniff",
}
_PNG: Mapping[str, Any] = {"image/png": {"schema": {"type": "string", "format": "binary"}}}


def _add_list(path: str, find: Find) -> None:
    @router.get(path, responses=errors(404))
    async def examples(model: Annotated[Classifier, Depends(find)]) -> ExampleList:
        """List pictures of the test set; none where the model was saved without."""
        base = f"/v1/models/{model.name}/versions/{model.version}/examples"
        listed = [
            {"label": model.classes[example.index], "index": example.index, "url": f"{base}/{i}"}
            for i, example in enumerate(model.examples)
        ]
        return ExampleList.model_validate(
            {"model": model.name, "version": model.version, "examples": listed}
        )


_add_list(_MODEL + "/examples", named_model)
_add_list(_VERSION + "/examples", versioned_model)


@router.get(
    _VERSION + "/examples/{number}",
    response_class=Response,
    responses={200: {"content": _PNG, "description": "The picture."}, **errors(404)},
)
async def example(model: Annotated[Classifier, Depends(versioned_model)], number: str) -> Response:
    """Send one as a PNG: posted back, it is the test set's picture to the bit."""
    found = plain_number(number)
    if not 0 <= found < len(model.examples):
        raise NotFound("no such example; GET .../examples lists them")
    return Response(model.examples[found].file, media_type="image/png", headers=_HEADERS)
