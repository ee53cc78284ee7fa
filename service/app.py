"""`create_app()` wires settings, inference and routes; nothing happens at import."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dropserve.service.http.body import BodyReader
from dropserve.service.http.keys import OPERATIONS, KeyCheck, Keys
from dropserve.service.http.openapi import complete_document
from dropserve.service.http.request_log import RequestLog, error_response
from dropserve.service.http.routes import health, models, oip, playground, tasks
from dropserve.service.inference import watchdog
from dropserve.service.inference.inference import Inference
from dropserve.service.inference.workers import ControlState, StartupBarrier, kept_keys
from dropserve.service.observability.metrics import Metrics
from dropserve.service.settings import Settings


def create_app(
    settings: Settings, inference: Inference | None = None, barrier: StartupBarrier | None = None
) -> FastAPI:
    """Make the application.

    Args:
        settings: what the deployer set.
        inference: models and their threads; made from the settings at start-up if None.
        barrier: start-up barrier of the workers, if there are several.

    Raises:
        OSError: the file of API keys has none.
        ServerError: tracing is on, and OpenTelemetry is not installed.
    """
    # without the pages neither their files nor the document has a route
    make = FastAPIOffline if settings.docs else partial(FastAPI, openapi_url=None)
    app = make(
        title="Dropserve",
        description="Image classification with Monte Carlo dropout.",
        version=version("dropserve"),
        lifespan=lambda app: _lifespan(app, inference, barrier),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # asked of each request
    )
    keys = None
    if settings.api_keys_file is not None:
        limits = settings.key_rate, settings.key_concurrency
        keys = Keys(settings.api_keys_file, kept_keys(), *limits)
    app.state.settings, app.state.metrics, app.state.keys = settings, Metrics(), keys
    app.state.reader = BodyReader(settings)
    app.state.tracing = None
    app.state.draining = False  # the server says when
    busiest = tasks.router, oip.infer_router  # in this order routes are tried
    for router in (*busiest, oip.router, models.router, health.router):
        app.include_router(router)
    if settings.docs:
        app.include_router(playground.router)
    complete_document(app, settings)
    app.add_exception_handler(HTTPException, _describe_http_error)
    if keys is not None:
        app.add_middleware(KeyCheck, keys=keys)
    # around the key check, whose errors it turns into responses
    app.add_middleware(RequestLog, origins=settings.cors_origins)
    if settings.tracing:  # the module is not loaded where tracing is off
        from dropserve.service.observability.tracing import TracedRequests, Tracing

        app.state.tracing = tracing = Tracing()
        app.add_middleware(TracedRequests, tracing=tracing, excluded=OPERATIONS)
    return app


@asynccontextmanager
async def _lifespan(
    app: FastAPI, inference: Inference | None, barrier: StartupBarrier | None
) -> AsyncIterator[None]:
    """Load the models, wait for the other workers, and keep models, keys and metrics up to date."""
    state = app.state
    control = ControlState.of_this_worker() if barrier is not None else None
    try:
        running = inference or Inference(state.settings, control=control, check=barrier is None)
    finally:  # a worker that fails must not leave the others waiting
        if barrier is not None:
            barrier.ready(str(os.getpid()))
    state.inference = running
    running.adopt_this_thread()
    running.metrics, running.tracing = state.metrics, state.tracing
    if barrier is not None:
        await barrier.wait()
    loops = [
        running.store.watch(),
        state.metrics.flush_loop(running),
        watchdog.watch(running.stalled, state.settings.watchdog),
    ]
    if state.keys is not None:
        loops.append(state.keys.watch())
    background = [asyncio.create_task(loop) for loop in loops]
    yield
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    running.close()
    if state.tracing is not None:
        state.tracing.close()


async def _describe_http_error(request: Request, error: Exception) -> Response:
    """Describe what the framework raises: no such route, no such method."""
    if not isinstance(error, HTTPException):
        raise error
    headers, detail = error.headers, str(error.detail)
    if error.status_code == 405 and headers is not None:
        methods = set(headers["Allow"].split(", "))  # in any order
        allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        headers, detail = {"Allow": allowed}, f"this path takes another method: {allowed}"
    request.state.log["detail"] = detail
    return error_response(request.scope, error.status_code, detail, headers)
