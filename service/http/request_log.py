"""Wraps every request: an id, a line in the log, and an answer even when the code fails.

Pure ASGI: Starlette's `@app.middleware("http")` would hide a client's disconnect from the routes.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.service.errors import DropserveError, NotFound, Overloaded, written
from dropserve.service.observability.logs import FIELDS
from dropserve.service.observability.metrics import CLIENT_CLOSED, Metrics

REQUEST_ID = b"x-request-id"
_log = logging.getLogger("dropserve.requests")
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestLog:
    """ASGI middleware; `request.state` then has `request_id`, and `log` to add fields to.

    It answers HEAD wherever there is GET.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        scope = exchange.scope
        try:
            # the framework's patterns overlook a newline at the end
            app = self._app if scope["path"].isprintable() else _refuse_path
            await app(scope, receive, exchange.send)
        except ClientDisconnect:
            exchange.status = CLIENT_CLOSED
        except DropserveError as error:
            if error.status == 500:
                _log.error(str(error), extra={FIELDS: {"request_id": exchange.request_id}})
            if isinstance(error, Overloaded):
                exchange.scope["state"]["log"]["reason"] = error.reason
            await exchange.fail(error.status, str(error), error.headers)
        except asyncio.CancelledError:  # the time for open requests is over at shutdown
            exchange.scope["state"]["log"]["reason"] = "draining"
            if exchange.status:
                exchange.status = 503
                raise
            await exchange.fail(503, "the service is stopping", {"Retry-After": "1"})
        except Exception:
            _log.exception("request failed", extra={FIELDS: {"request_id": exchange.request_id}})
            if exchange.status:
                exchange.status = 500
                raise  # half an answer is out: let the server break the connection
            await exchange.fail(500, "the service failed; its log says why")
        finally:
            exchange.end()


async def _refuse_path(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotFound("Not Found")


class _Exchange:
    """One request and what becomes of it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._started = time.perf_counter()
        self._method = scope["method"]
        # HEAD is answered as GET, whose body the server leaves out
        self.scope = {**scope, "method": "GET"} if self._method == "HEAD" else scope
        self._send = send
        self.request_id = request_id(scope["headers"])
        self.status = 0
        self._fields: dict[str, Any] = {}
        self.scope.setdefault("state", {}).update(request_id=self.request_id, log=self._fields)

    async def send(self, message: Message) -> None:
        """Pass a message on, with the request's id on the first."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (REQUEST_ID, self.request_id.encode())]
        try:
            await self._send(message)
        except (OSError, RuntimeError) as error:  # RuntimeError is uvloop's for a closed connection
            raise ClientDisconnect from error

    async def fail(
        self, status: int, detail: str, more_headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer in place of code that did not."""
        content, media_type = written(self.scope["path"], status, detail, self.request_id)
        body = orjson.dumps(content)
        headers = {
            "content-type": media_type,
            "content-length": str(len(body)),
            **(more_headers or {}),
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        try:
            await self.send({"type": "http.response.start", "status": status, "headers": raw})
            await self.send({"type": "http.response.body", "body": body})
        except ClientDisconnect:
            self.status = CLIENT_CLOSED

    def end(self) -> None:
        """Write the request's line, and count it; with the status that the log has, if it has."""
        line = {
            "request_id": self.request_id,
            "method": self._method,
            "route": route_of(self.scope),
            **self._fields,
        }
        line.setdefault("status", self.status)
        record(self.scope["app"].state.metrics, line, self._started)


def record(metrics: Metrics, line: dict[str, Any], started: float) -> None:
    """Write a request's line in the log, and count it.

    Args:
        metrics: where it is counted.
        line: method, status and all else that is known; the route is None where there is none.
        started: when, by `time.perf_counter`.
    """
    seconds = time.perf_counter() - started
    route, model, version = line["route"] or "other", line.get("model", ""), line.get("version", "")
    metrics.request(route, model, version, line["status"], seconds)
    if "reason" in line:
        metrics.shed(line["reason"])
    if _log.isEnabledFor(logging.INFO):
        line["milliseconds"] = round(1000 * seconds, 3)
        _log.info("request", extra={FIELDS: line})


def route_of(scope: Scope) -> str | None:
    """Return a request's route as it was declared; None: there is none."""
    log = scope.get("state", {}).get("log", {})
    return log.get("route") or getattr(scope.get("route"), "path", None)


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id that the client chose, if it did and it is safe to log; else a new one."""
    asked = next((value for name, value in headers if name == REQUEST_ID), b"")
    return asked.decode() if _SAFE_ID.fullmatch(asked) else os.urandom(16).hex()
