"""`create_app()` wires settings, inference and routes; nothing happens at import."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dropserve.service.errors import written
from dropserve.service.fastpath.request import FastPath
from dropserve.service.http import examples, native, oip, operations, playground
from dropserve.service.http.body import BodyLimits, BodyReader
from dropserve.service.http.images import ImageLimits
from dropserve.service.http.infer import InferRoutes
from dropserve.service.http.keys import OPERATIONS, KeyCheck, Keys
from dropserve.service.http.openapi import complete_document
from dropserve.service.http.request_log import RequestLog
from dropserve.service.http.task_routes import TaskRoutes
from dropserve.service.inference.inference import Inference
from dropserve.service.inference.workers import ControlState, StartupBarrier, kept_keys
from dropserve.service.observability.metrics import Metrics
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.observability.tracing import Tracing


def create_app(
    settings: Settings,
    inference: Inference | None = None,
    line: StartupBarrier | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        settings: what the deployer set.
        inference: models and their thread; made from the settings at start-up if None.
        line: where it waits for the other workers, if there are any.

    Raises:
        OSError: there is no API key in the file that should have them.
        ServerError: OpenTelemetry is not installed and should trace.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, FastPath]]:
        board = ControlState.of_this_worker() if line is not None else None
        try:
            running = inference or Inference(settings, board=board, check=line is None)
        finally:  # a worker that fails must not leave the others waiting
            if line is not None:
                line.arrive(str(os.getpid()))
        app.state.inference = running
        running.adopt_this_thread()
        running.metrics, running.tracing = metrics, tracing
        if line is not None:
            await line.wait()
        keepers = [running.repository.keep_up(), metrics.flush_loop(running)]
        if keys is not None:
            keepers.append(keys.keep_up())
        keeping_up = [asyncio.create_task(keeper) for keeper in keepers]
        yield {"fast_path": express}
        for task in keeping_up:
            task.cancel()
        await asyncio.gather(*keeping_up, return_exceptions=True)
        running.close()
        if tracing is not None:
            tracing.close()

    app = FastAPIOffline(
        title="Dropserve",
        description="Predictions that say how sure they are.",
        version=version("dropserve"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # asked of each request
    )
    app.state.settings = settings
    metrics = app.state.metrics = Metrics()
    tracing = _tracing() if settings.tracing else None
    file = settings.api_keys_file
    keys = Keys(file, kept_keys()) if file is not None else None
    limits = BodyLimits(
        max_bytes=settings.max_body_bytes,
        max_images=settings.max_images,
        timeout=settings.body_timeout,
        image=ImageLimits(settings.max_pixels, settings.max_side),
    )
    app.include_router(operations.router)
    app.include_router(native.router)
    app.include_router(examples.router)
    app.include_router(oip.router)
    app.include_router(playground.router)
    complete_document(app, settings)
    app.add_middleware(RequestLog)
    app.add_exception_handler(HTTPException, _http)
    app.state.reader = reader = BodyReader(limits, settings.max_held_bytes)
    express = FastPath(app.state, settings, reader, keys)
    infer = InferRoutes(app.build_middleware_stack(), settings, reader)
    app.middleware_stack = TaskRoutes(infer, settings, reader)
    if tracing is not None:
        from dropserve.service.observability.tracing import TracedRequests

        app.middleware_stack = TracedRequests(app.middleware_stack, tracing, OPERATIONS)
    if keys is not None:
        app.middleware_stack = KeyCheck(app.middleware_stack, keys)
    return app


def _tracing() -> "Tracing":
    from dropserve.service.observability.tracing import (
        Tracing,
    )  # here: nothing of it is loaded where it is off

    return Tracing()


async def _http(request: Request, error: Exception) -> Response:
    """Translate what the framework raises: no such route, no such method."""
    if not isinstance(error, HTTPException):
        raise error
    headers, detail = error.headers, str(error.detail)
    if error.status_code == 405 and headers is not None:
        allowed = headers["Allow"]
        if "HEAD" not in allowed:
            allowed = allowed.replace("GET", "GET, HEAD")
        headers, detail = {"Allow": allowed}, f"this path takes another method: {allowed}"
    content, media_type = written(
        request.scope["path"], error.status_code, detail, request.state.request_id
    )
    return JSONResponse(content, error.status_code, headers, media_type=media_type)
