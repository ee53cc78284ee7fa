"""Wraps every request: an id, a line in the log, and an answer even when the code fails.

Pure ASGI: Starlette's `@app.middleware("http")` would hide a client's disconnect from the routes.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.service.errors import DropserveError, NotFound, Overloaded, ServerError, stopping
from dropserve.service.http.common import JsonResponse
from dropserve.service.http.options import route_of
from dropserve.service.observability.logs import FIELDS
from dropserve.service.observability.metrics import CLIENT_CLOSED, Metrics

REQUEST_ID = b"x-request-id"
SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_CORS_REQUEST = (
    *("Authorization", "X-API-Key", "X-Request-ID", "X-Request-Timeout"),
    *("Inference-Header-Content-Length", "traceparent", "tracestate"),
)
_CORS_RESPONSE = ("Inference-Header-Content-Length", "Retry-After", "X-Request-ID")
_log = logging.getLogger("dropserve.requests")


class RequestLog:
    """ASGI middleware; `request.state` then has `request_id`, and `log` to add fields to.

    It answers HEAD wherever there is GET, and turns errors into responses.

    Args:
        app: what is wrapped.
        origins: whose pages a browser lets read the answers, errors included; "*": all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._respond: ASGIApp = self._answer
        if origins:  # within the log and around errors; preflights have no key
            self._respond = CORSMiddleware(
                self._answer,
                allow_origins=origins,
                allow_methods=("GET", "HEAD", "POST"),
                allow_headers=_CORS_REQUEST,
                expose_headers=_CORS_RESPONSE,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        name = request_id(scope["headers"])
        line = {"request_id": name, "method": scope["method"], "route": None, "status": 0}
        if scope["method"] == "HEAD":  # answered as GET, whose body the server leaves out
            scope = {**scope, "method": "GET"}
        scope.setdefault("state", {}).update(request_id=name, log=line)

        async def send_logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID, name.encode())]
            try:
                await send(message)
            except (OSError, RuntimeError) as error:  # RuntimeError: uvloop's closed connection
                raise ClientDisconnect from error

        try:
            await self._respond(scope, receive, send_logged)
        except ClientDisconnect:
            line["status"] = CLIENT_CLOSED
        finally:
            route = scope.get("route")  # None: it was refused before it was routed
            target = scope.get("raw_path") or b""
            line["route"] = route.path if route else route_of(line["method"], target)
            record(scope["app"].state.metrics, line, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # the framework's patterns ignore a newline at the end
            app = self._app if scope["path"].isprintable() else _refuse_path
            await app(scope, receive, send)
        except ClientDisconnect:
            raise
        except (Exception, asyncio.CancelledError) as error:
            sent, line = failure(error, scope), scope["state"]["log"]
            if line["status"]:
                line["status"] = sent.status
                raise  # the response has begun: the server closes the connection
            # Its frames hold the request's body, and futures that hold the error: with the
            # traceback, they would stay until the next garbage collection.
            error.__traceback__ = None
            response = error_response(scope, sent.status, str(sent), sent.headers)
            await response(scope, receive, send)


async def _refuse_path(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotFound("Not Found")


def failure(error: BaseException, scope: Scope) -> DropserveError:
    """Log failures of the service; return the error to send."""
    state = scope["state"]
    about = {FIELDS: {"request_id": state["request_id"]}}
    if isinstance(error, DropserveError):
        sent = error
        if error.status == 500:
            _log.error(str(error), extra=about)
    elif isinstance(error, MemoryError):
        sent = Overloaded("there is not enough memory for this request", "memory")
        _log.error("out of memory", extra=about)
    elif isinstance(error, asyncio.CancelledError):  # the time for open requests is over
        sent = stopping()
    else:
        sent = ServerError("the service failed; its log says why")
        _log.error("request failed", exc_info=error, extra=about)
    state["log"]["detail"] = str(sent)
    if isinstance(sent, Overloaded):
        state["log"]["reason"] = sent.reason
    return sent


def error_response(
    scope: Scope, status: int, detail: str, headers: Mapping[str, str] | None = None
) -> JsonResponse:
    """Write an error as clients of this path expect it."""
    content, media_type = error_content(scope["path"], status, detail, scope["state"]["request_id"])
    return JsonResponse(content, status, headers, media_type=media_type)


def error_content(
    path: str, status: int, detail: str, request_id: str
) -> tuple[dict[str, object], str]:
    """Return the content of an error as clients of this path expect it, and its media type."""
    if is_protocol(path):
        return {"error": detail}, "application/json"
    return problem(status, detail, request_id), "application/problem+json"


def is_protocol(path: str) -> bool:
    """Say if a path is of the Open Inference Protocol, which has errors of its own."""
    return path == "/v2" or path.startswith("/v2/")


def problem(status: int, detail: str, request_id: str) -> dict[str, object]:
    """Describe an error as RFC 9457 wants it; `about:blank` means that the title says it all."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }


def record(metrics: Metrics, line: dict[str, Any], seconds: float) -> None:
    """Log a request that took so many seconds, and count it."""
    model, version = line.get("model", ""), line.get("version", "")
    metrics.record_request(line["route"] or "other", model, version, line["status"], seconds)
    if "key" in line:
        metrics.record_key(line["key"], line["status"])
    if line.get("reason"):
        metrics.record_shed(line["reason"])
    if _log.isEnabledFor(logging.INFO):
        line["milliseconds"] = round(1000 * seconds, 3)
        _log.info("request", extra={FIELDS: line})


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id that the client chose, if it did and it is safe to log; else a new one."""
    asked = next((value for name, value in headers if name == REQUEST_ID), b"")
    return asked.decode() if SAFE_ID.fullmatch(asked) else os.urandom(16).hex()
