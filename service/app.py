"""`create_app()` wires settings, inference and routes; nothing happens at import."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.bodies import BodyLimits, BodyReader
from service.errors import DropserveError, InvalidRequest, problem
from service.images import ImageLimits
from service.inference import Inference
from service.logs import FIELDS
from service.middleware import RequestLog
from service.routes import native, operations
from service.settings import Settings

_log = logging.getLogger("dropserve.errors")


def create_app(settings: Settings, inference: Inference | None = None) -> FastAPI:
    """Make the application.

    Args:
        settings: what the deployer set.
        inference: models and their thread; made from the settings at start-up if None.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = inference or Inference(settings)
        app.state.inference = running
        yield
        running.close()

    app = FastAPIOffline(
        title="Dropserve",
        description="Predictions that say how sure they are.",
        version=version("dropserve"),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    limits = BodyLimits(
        max_bytes=settings.max_body_bytes,
        max_images=settings.max_images,
        timeout=settings.body_timeout,
        image=ImageLimits(settings.max_pixels, settings.max_side),
    )
    app.state.body_reader = BodyReader(limits, settings.max_held_bytes)
    app.include_router(operations.router)
    app.include_router(native.router)
    app.add_middleware(RequestLog)
    app.add_exception_handler(DropserveError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    return app


async def _known(request: Request, error: Exception) -> Response:
    """Translate our own errors: the one place where they become HTTP."""
    if not isinstance(error, DropserveError):
        raise error
    if error.status == 500:
        _log.error(str(error), extra={FIELDS: {"request_id": request.state.request_id}})
    return _problem(request, error.status, str(error), error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """Say which parameter is wrong and what is allowed, and nothing of what was sent."""
    if not isinstance(error, RequestValidationError):
        raise error
    details = []
    for item in error.errors():
        unknown = item["type"] == "extra_forbidden"
        details.append("unknown parameter" if unknown else f"{item['loc'][-1]}: {item['msg']}")
    return await _known(request, InvalidRequest("; ".join(sorted(set(details)))))


async def _http(request: Request, error: Exception) -> Response:
    """Translate what the framework raises: no such route, no such method."""
    if not isinstance(error, HTTPException):
        raise error
    return _problem(request, error.status_code, str(error.detail), error.headers)


def _problem(
    request: Request, status: int, detail: str, headers: Mapping[str, str] | None
) -> Response:
    content = problem(status, detail, request.state.request_id)
    return JSONResponse(content, status, headers, media_type="application/problem+json")
