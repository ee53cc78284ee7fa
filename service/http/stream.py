"""Server-sent events: an answer that is told in steps, each made once the one before is sent."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import JSONResponse
from starlette.types import Send

from dropserve.service.errors import DropserveError, problem
from dropserve.service.observability.logs import FIELDS


class EventStream(JSONResponse):
    """Declares a route that answers by `send_events`: JSON, but an event at a time."""

    media_type = "text/event-stream"


_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back until it has a page of them
]
_WHOLE = ("start", "end")
"""Events that say which model answers, and how."""
_log = logging.getLogger("dropserve.requests")

Step = Mapping[str, Any]
"""`{event: a list of its data}`."""


async def send_events(
    send: Send,
    head: Mapping[str, Any],
    first: Step,
    rest: AsyncGenerator[Step, None],
    state: Mapping[str, Any],
) -> None:
    """Send what steps tell; an error after the first of them is an event too.

    Args:
        send: the request's ASGI channel. It waits while the client reads more slowly than we tell.
        head: what the first and last event say before their own data.
        first: step of the answer.
        rest: the others; closed at the end.
        state: of the request: its `request_id`, and the `log` that is told of an error's status.
    """
    async with aclosing(rest):
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for events in _written(first, rest, head, state):
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _written(
    first: Step, rest: AsyncIterator[Step], head: Mapping[str, Any], state: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    yield _write(first, head)
    try:
        async for step in rest:
            yield _write(step, head)
    except DropserveError as error:
        if error.status == 500:
            _log.error(str(error), extra={FIELDS: {"request_id": state["request_id"]}})
        yield _failed(error.status, str(error), state)
    except Exception:
        _log.exception("request failed", extra={FIELDS: {"request_id": state["request_id"]}})
        yield _failed(500, "the service failed; its log says why", state)


def _failed(status: int, detail: str, state: Mapping[str, Any]) -> bytes:
    """Write an error, and note its status: the one that was sent, 200, came too early."""
    state["log"]["status"] = status
    return _write({"error": [problem(status, detail, state["request_id"])]}, {})


def _write(step: Step, head: Mapping[str, Any]) -> bytes:
    return b"".join(
        b"event: %s\ndata: %s\n\n"
        % (
            event.encode(),
            orjson.dumps(
                {**head, **data} if event in _WHOLE else data, option=orjson.OPT_SERIALIZE_NUMPY
            ),
        )
        for event, told in step.items()
        for data in told
    )
