"""`create_app()` wires settings, inference and routes; nothing happens at import."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.bodies import BodyLimits, BodyReader
from service.errors import problem
from service.images import ImageLimits
from service.inference import Inference
from service.middleware import RequestLog
from service.routes import native, operations
from service.routes.tasks import TaskRoutes
from service.settings import Settings
from service.workers import StartingLine


def create_app(
    settings: Settings,
    inference: Inference | None = None,
    line: StartingLine | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        settings: what the deployer set.
        inference: models and their thread; made from the settings at start-up if None.
        line: where it waits for the other workers, if there are any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            running = inference or Inference(settings)
        finally:  # a worker that fails must not leave the others waiting
            if line is not None:
                line.arrive(str(os.getpid()))
        app.state.inference = running
        if line is not None:
            await line.wait()
        yield
        running.close()

    app = FastAPIOffline(
        title="Dropserve",
        description="Predictions that say how sure they are.",
        version=version("dropserve"),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # asked of each request
    )
    app.state.settings = settings
    limits = BodyLimits(
        max_bytes=settings.max_body_bytes,
        max_images=settings.max_images,
        timeout=settings.body_timeout,
        image=ImageLimits(settings.max_pixels, settings.max_side),
    )
    app.include_router(operations.router)
    app.include_router(native.router)
    app.add_middleware(RequestLog)
    app.add_exception_handler(HTTPException, _http)
    reader = BodyReader(limits, settings.max_held_bytes)
    app.middleware_stack = TaskRoutes(app.build_middleware_stack(), settings, reader)
    return app


async def _http(request: Request, error: Exception) -> Response:
    """Translate what the framework raises: no such route, no such method."""
    if not isinstance(error, HTTPException):
        raise error
    content = problem(error.status_code, str(error.detail), request.state.request_id)
    return JSONResponse(
        content, error.status_code, error.headers, media_type="application/problem+json"
    )
