"""Probes: is the process alive, may it be sent traffic; and its metrics."""

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from starlette.requests import Request
from starlette.responses import Response

from dropserve.service.http.common import errors, inference_of, require_ready
from dropserve.service.schemas import Health, ModelState, Readiness

router = APIRouter(tags=["operations"])


@router.get("/livez")
async def livez() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", responses=errors(503))
@router.get("/healthz", name="healthz", responses=errors(503))
async def readyz(request: Request) -> Readiness:
    """Models are loaded, and the service is not stopping.

    The port is closed before they are, and from the start of a shutdown: then only requests that
    were received before it are answered, this one with 503.

    A version that cannot be served does not change that; it is listed as refused, with the reason.
    It is 503 if no model is served, because an operator unloaded all, or if the thread that runs
    them is dead, or takes far longer for a step than such steps do.
    """
    require_ready(request)
    store = inference_of(request).store
    models = {name: ModelState.model_validate(store.state(name)) for name in store.models()}
    return Readiness(status="ready", models=models, problem=store.problem)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics of all workers, in Prometheus' text format."""
    found = request.app.state.metrics
    found.flush(inference_of(request))
    accept = request.headers.get("accept", "")
    content, content_type = await run_in_threadpool(found.write, accept)
    return Response(content, headers={"content-type": content_type})
