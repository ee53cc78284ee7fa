"""Open Inference Protocol v2: health, metadata and model repository; `infer.py` answers infer."""

import hmac
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, SecretStr, ValidationError

from dropserve.service.errors import Forbidden, Overloaded, Unauthorized
from dropserve.service.http.body import BodyReader, load_json
from dropserve.service.http.front import invalid
from dropserve.service.http.native import Find, errors, inference_of, named_model, versioned_model
from dropserve.service.http.protocol import (
    INTEGERS,
    PLAIN,
    ROWS,
    SAMPLED,
    IndexEntry,
    IndexRequest,
    InferRequest,
    InferResponse,
    Live,
    LoadRequest,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
    TensorMetadata,
    UnloadRequest,
)
from dropserve.service.inference.classifier import Classifier

if TYPE_CHECKING:
    from dropserve.service.settings import Settings

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

Sent = TypeVar("Sent", bound=BaseModel)


@router.get("/", include_in_schema=False)
@router.get("")
async def server_metadata(request: Request) -> ServerMetadata:
    """Say what the server is, and which extensions it has."""
    extensions = ["binary_tensor_data"]
    if _token(request) is not None:
        extensions.append("model_repository")
    return ServerMetadata(name="dropserve", version=version("dropserve"), extensions=extensions)


@router.get("/health/live")
async def live() -> Live:
    """The process answers."""
    return Live(live=True)


@router.get("/health/ready", responses=errors(503))
async def ready(request: Request) -> Ready:
    """Models are loaded: nothing listens before they are, nor from the moment of shutdown."""
    if not any(inference_of(request).registry):
        raise Overloaded("no model is served", reason="no_model")
    return Ready(ready=True)


def _add_model(prefix: str, find: Find) -> None:
    """Declare a model's routes under a prefix that says which one."""
    Model = Annotated[Classifier, Depends(find)]  # noqa: N806  a type

    @router.get(prefix, responses=errors(404))
    async def metadata(request: Request, model: Model) -> ModelMetadata:
        """Name a model's versions and tensors."""
        return _describe(model, list(inference_of(request).registry.versions(model.name)))

    @router.get(prefix + "/ready", responses=errors(404))
    async def model_ready(model: Model) -> ModelReady:
        """Say that a model may be asked."""
        return ModelReady(name=model.name, ready=True)

    @router.post(prefix + "/infer", responses=errors(400, 404, 408, 413, 415, 422, 503))
    async def infer(model: Model, body: InferRequest) -> InferResponse:
        """Classify pictures: in eval mode, by Monte Carlo dropout, or both.

        For the document, and for 405 on other methods; `infer.py` answers.
        """
        raise NotImplementedError


for _prefix, _find in (
    ("/models/{name}", named_model),
    ("/models/{name}/versions/{version}", versioned_model),
):
    _add_model(_prefix, _find)


def _describe(model: Classifier, versions: Sequence[int]) -> ModelMetadata:
    classes, channels = len(model.classes), model.details()["input"]["channels"]

    def output(name: str) -> TensorMetadata:
        kind = "INT64" if name in INTEGERS else "BYTES" if name == "label" else "FP32"
        shape = [-1, classes] if name in ROWS else [-1]
        return TensorMetadata(name=name, datatype=kind, shape=shape)

    return ModelMetadata(
        name=model.name,
        versions=[str(version) for version in versions],
        platform="pytorch",
        inputs=[TensorMetadata(name="image", datatype="UINT8", shape=[-1, -1, -1, channels])],
        outputs=[output(name) for name in (*PLAIN, *SAMPLED)],
    )


async def _admin(request: Request) -> None:
    """Let the bearer of the admin token pass.

    Raises:
        Forbidden: there is no such token: the repository's routes are off.
        Unauthorized: it is missing or wrong.
    """
    token = _token(request)
    if token is None:
        raise Forbidden("the repository is closed here: DROPSERVE_ADMIN_TOKEN opens it")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), token.get_secret_value().encode())
    if scheme.lower() != "bearer" or not right:
        raise Unauthorized("the admin token is needed: Authorization: Bearer ...")


def _token(request: Request) -> SecretStr | None:
    settings: Settings = request.app.state.settings
    return settings.admin_token


def _repository(path: str, body: type[BaseModel]) -> Callable[..., Any]:
    """Declare a route of the model repository, whose body may be left out."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"application/json": {"schema": schema}}
    return router.post(
        "/repository" + path,
        dependencies=[Depends(_admin)],
        responses=errors(400, 401, 403, 404, 408, 413, 415, 422, 503),
        openapi_extra={"requestBody": {"required": False, "content": content}},
    )


@_repository("/index", IndexRequest)
async def index(request: Request) -> list[IndexEntry]:
    """List every version there is, and why those that are not ready are not."""
    asked = await _read(request, IndexRequest)
    listed = inference_of(request).repository.index()
    entries = [IndexEntry.model_validate(entry) for entry in listed]
    return [entry for entry in entries if entry.state == "READY" or not asked.ready]


@_repository("/models/{name}/load", LoadRequest)
async def load(request: Request, name: str) -> dict[str, str]:
    """Serve a model again, or look again at versions that were refused; in every worker."""
    await _read(request, LoadRequest)
    await inference_of(request).repository.load(name)
    return {}


@_repository("/models/{name}/unload", UnloadRequest)
async def unload(request: Request, name: str) -> dict[str, str]:
    """Stop serving a model, in every worker; its open requests are finished."""
    await _read(request, UnloadRequest)
    await inference_of(request).repository.unload(name)
    return {}


async def _read(request: Request, kind: type[Sent]) -> Sent:
    """Read a body that may be left out."""
    reader: BodyReader = request.app.state.reader
    sent = await reader.read(dict(reversed(request.scope["headers"])), request.receive)
    try:
        return kind.model_validate(load_json(sent) if sent else {})
    except ValidationError as error:
        raise invalid(error) from None
    finally:
        reader.release(len(sent))
