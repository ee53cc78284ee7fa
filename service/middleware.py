"""Wraps every request: an id, a line in the log, and an answer even when the code fails.

Pure ASGI: Starlette's `@app.middleware("http")` would hide a client's disconnect from the routes.
"""

import logging
import re
import time
import uuid
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem
from service.logs import FIELDS

REQUEST_ID = "X-Request-ID"
CLIENT_CLOSED = 499  # what nginx logs for a client that went away; never sent
_log = logging.getLogger("dropserve.requests")
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestLog:
    """ASGI middleware; `request.state` then has `request_id`, and `log` to add fields to."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        asked = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = asked if _SAFE_ID.fullmatch(asked) else uuid.uuid4().hex
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=fields)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            try:
                await send(message)
            except (OSError, RuntimeError) as error:  # uvloop's word for a closed connection
                raise ClientDisconnect from error

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED
        except Exception:
            _log.exception("request failed", extra={FIELDS: {"request_id": request_id}})
            if status:
                raise  # half an answer is out: let the server break the connection
            await _send_failure(send_with_id, request_id)
        finally:
            if _log.isEnabledFor(logging.INFO):
                milliseconds = round(1000 * (time.perf_counter() - started), 3)
                route = getattr(scope.get("route"), "path", None)
                line = {"request_id": request_id, "method": scope["method"], "route": route}
                line |= fields | {"status": status, "milliseconds": milliseconds}
                _log.info("request", extra={FIELDS: line})


async def _send_failure(send: Send, request_id: str) -> None:
    body = orjson.dumps(problem(500, "the service failed; its log says why", request_id))
    headers = [(b"content-type", b"application/problem+json")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
