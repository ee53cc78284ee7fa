"""A protocol class for uvicorn that answers small-PNG POSTs itself.

For each request uvicorn makes a task, a scope and messages, and the routes work with them: that
takes longer than decoding a small image and running a small network (docs/benchmarks.md). Here a
request goes from the socket to the queue in one call, and its answer to the socket in another.

Only a 200 is written here. Every other request - by how it was sent, what it asks for or what
becomes of it - takes the ASGI path from its first byte on. So every rule and error has one place,
and without this package no answer would change. uvicorn's parser sees all bytes of a request or
none of them.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import httptools
import orjson
from starlette.applications import Starlette
from uvicorn import Config

from dropserve.service.errors import DropserveError, TooManyRequests, stopping
from dropserve.service.http.connection import NEVER, Connection, server_lines
from dropserve.service.http.heads import MAX_FIELDS, Fields
from dropserve.service.http.images import SMALL_BYTES, are_small, encoded, prepared_alone
from dropserve.service.http.keys import ApiKey, KeyCheck
from dropserve.service.http.options import (
    PATHS,
    TIMEOUT,
    ParsedOptions,
    read_options,
    route_template,
)
from dropserve.service.http.request_log import RequestLog, record, request_id
from dropserve.service.inference.batcher import QueueFull, QueueTimeout
from dropserve.service.inference.classifier import Predict, Uncertainty
from dropserve.service.observability.metrics import CLIENT_CLOSED

if TYPE_CHECKING:
    from asyncio import Future, TimerHandle

    from dropserve.service.inference.classifier import Answer
    from dropserve.service.inference.inference import Inference, Waiting

_KNOWN = {RequestLog, KeyCheck}
"""Middleware whose work is done here as well; with any other the fast path is off."""
_MAX_BYTES = SMALL_BYTES + 4096
"""Of a request: a small image and its headers."""
_MAX_URL = 512
_WAIT = 0.01
"""Seconds to wait for a body: many clients send it apart from the headers."""
_ASGI_ONLY = {
    *(b"origin", b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"),
    TIMEOUT.lower().encode(),
}
"""Header fields of requests that take the ASGI path."""
_BEFORE_THE_END = 0.1
"""Seconds of the drain that are left when it is over for a request: uvicorn stops at its end."""
_ANSWER = (
    b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\ncontent-type: application/json\r\n"
    b"x-request-id: %b\r\n\r\n%b"
)


class Options(NamedTuple):
    """What a request line asks for: a model, as it is named there, and what its query says."""

    name: str | None
    version: str | None
    action: str
    route: str
    parsed: ParsedOptions


class FastPathProtocol(Connection):
    """One connection: the fast path where it can be taken, and uvicorn's own elsewhere."""

    def __init__(self, config: Config, *arguments: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(config, *arguments, **named)
        app = config.loaded_app
        known = isinstance(app, Starlette) and {m.cls for m in app.user_middleware} <= _KNOWN
        self._state = SimpleNamespace(**app.state._state) if known else None  # noqa: SLF001  faster
        self._message = _Message()
        self._request: FastPathRequest | None = None
        self._sent = b""  # all bytes of the request in flight
        self._asgi = False  # the next request takes the ASGI path
        self._timer: TimerHandle | None = None  # of a request whose body is not complete

    @property
    def in_flight(self) -> bool:
        """Whether the answer to a request is not complete."""
        return self._request is not None or super().in_flight

    def begin(self) -> bool:
        """Take the fast path, wait for the rest of a small body, or take the ASGI path."""
        taken = self.take()
        if taken is not None:
            return taken
        self._clear_timer()
        self._asgi = False
        return super().begin()

    def take(self) -> bool | None:
        """Queue a request; False: the rest of its body is awaited; None: it takes the ASGI path."""
        started, data = perf_counter(), self.unread
        if self._state is None or self._asgi or len(data) > _MAX_BYTES or not self._is_free:
            return None
        options = _candidate(data, self._state.settings.max_samples)
        if options is None:
            return None
        message = self._message
        message.read(data)
        refused = options.action in self._watch.refusing  # soonest by the ASGI path
        if message.complete and message.is_plain and not refused:
            self._request = FastPathRequest.queued(self._state, message, options, started)
        waits = message.partial and message.is_plain
        message.reset()
        if self._request is not None:
            self._clear_timer()
            self._sent, self.unread = data, b""
            self._begun = self._probed = False
            self.deadline = NEVER
            self._request.waiting.future.add_done_callback(self._answer)
            return True
        if waits and self._timer is None:  # the limit is per request, not per chunk
            self._timer = self.loop.call_later(_WAIT, self._pass_partial)
            self.deadline = NEVER
        return False if waits else None

    @property
    def _is_free(self) -> bool:
        """Whether a request may be answered at once."""
        ready = not self.flow.write_paused and not self.transport.is_closing()
        return ready and not self._watch.is_over(self)

    def _pass_partial(self) -> None:
        """Pass a partial request to the ASGI path, where its rest has a time limit."""
        self._asgi = True
        self.advance()

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _answer(self, _future: "Future[Answer]") -> None:
        """Write the answer, or pass the request to the ASGI path."""
        request = self._request
        if request is None:
            return  # it was cancelled
        closes = self._draining and not self.unread and not self._is_readable
        try:
            answer = request.response(self.server_state.default_headers, close=closes)
        except Exception as error:  # the ASGI path finds it again and reports it
            if not isinstance(error, DropserveError | QueueTimeout | MemoryError):
                self.logger.exception("a request is passed to the ASGI path")
            error.__traceback__ = None  # as in RequestLog
            waits = isinstance(error, QueueTimeout)
            self._pass_request(request, request.started if waits else perf_counter())
            return
        self._request, self._sent = None, b""
        try:
            self.transport.write(answer)
        except (OSError, RuntimeError):  # RuntimeError is uvloop's
            request.end(CLIENT_CLOSED)
            return
        request.end(200)
        if closes:
            self.transport.close()
        self.on_response_complete()

    def _pass_request(self, request: "FastPathRequest", arrived: float) -> None:
        """Pass the request in flight to the ASGI path; `arrived` is when its wait began."""
        self.unread = self._sent + self.unread
        self._request, self._sent = None, b""
        request.cancel(None)
        state = self.app_state
        self.app_state = {**state, "arrived": arrived}
        self._pass_partial()
        self.app_state = state

    def eof_received(self) -> bool:  # type: ignore[override]
        """Let the ASGI path refuse a partial request."""
        if self._timer is not None:
            self._pass_partial()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request in flight; the ASGI path logs a partial one."""
        if self._timer is not None:
            self._pass_partial()
        if self._request is not None:
            request, self._request = self._request, None
            request.cancel(CLIENT_CLOSED)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Answer the request in flight; what follows it takes the ASGI path."""
        self._state = None
        if self._timer is not None:
            self._pass_partial()
        if self._request is not None:
            seconds = self._settings.drain_seconds - _BEFORE_THE_END
            self.loop.call_later(max(0.0, seconds), self._end_drain)
        super().shutdown()

    def _end_drain(self) -> None:
        """Refuse the request in flight: the time for it is over."""
        request, self._request = self._request, None
        if request is not None:
            request.cancel(None)
            self.write_error(stopping(), self._sent, close=True, key=request.key)
            self.transport.close()


@dataclass(eq=False, slots=True)
class FastPathRequest:
    """A fast-path request in flight: its queue entry, what the answer repeats, and its log line."""

    state: SimpleNamespace  # the app's
    waiting: "Waiting"
    size: int
    head: dict[str, Any]
    line: dict[str, Any]
    started: float
    key: ApiKey | None = None

    @classmethod
    def queued(
        cls,
        state: SimpleNamespace,
        message: "_Message",
        options: Options,
        started: float,
    ) -> "FastPathRequest | None":
        """Queue a request; None: it takes the ASGI path."""
        headers, body = message.headers, message.body
        key: ApiKey | None = None
        if state.keys is not None and (key := state.keys.find(headers)) is None:
            return None
        name, version, _, route, parsed = options
        inference: Inference = state.inference
        reader = state.reader
        try:
            image = encoded(body, "image/png", state.settings)
            model = inference.store.find(name, version)
        except DropserveError:
            return None
        if not are_small([image]) or not reader.hold(body):
            return None
        try:
            read = partial(prepared_alone, image, model)
            waiting = inference.queue(model, parsed.task, read)
        except QueueFull:
            reader.release(len(body))
            return None
        shown = {"model": model.name, "version": model.version}
        line = {"request_id": request_id(headers), "method": "POST", "route": route, **shown}
        request = cls(state, waiting, len(body), {**shown, **parsed.head}, line, started)
        if key is not None:
            try:
                key.enter()
            except TooManyRequests:
                request.cancel(None)
                return None
            request.key, line["key"] = key, key.name
        return request

    def response(self, server_headers: Fields, *, close: bool) -> bytes:
        """Write the response, or raise what went wrong instead."""
        content = {**self.head, **self.waiting.future.result()}
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        lines = server_lines(server_headers)
        if self.state.settings.cors_origins:
            lines += b"vary: Origin\r\n"
        if close:
            lines += b"connection: close\r\n"
        return _ANSWER % (lines, len(body), self.line["request_id"].encode(), body)

    def cancel(self, status: int | None) -> None:
        """Take the request out of the queue, if it is still there, and `end` it."""
        self.state.inference.cancel(self.waiting)
        self.end(status)

    def end(self, status: int | None) -> None:
        """Release the body; log and count the request, unless the ASGI path will (None)."""
        self.state.reader.release(self.size)
        if self.key is not None:
            self.key.leave(counted=status is not None)
        if status is not None:
            self.line |= {"images": 1, "status": status}
            record(self.state.metrics, self.line, perf_counter() - self.started)


def _candidate(data: bytes, max_samples: int) -> Options | None:
    """Read options from the first line, without a parser; None: it takes the ASGI path."""
    if not data.startswith(b"POST ") or b"image/png" not in data:
        return None
    end = data.find(b" ", 5)
    plain = end <= _MAX_URL and data.startswith(b" HTTP/1.1\r\n", end)
    return _options(data[5:end], max_samples) if plain else None


@lru_cache(256)
def _options(url: bytes, max_samples: int) -> Options | None:
    """Parse a URL; None: it takes the ASGI path."""
    path, _, query = url.partition(b"?")
    if not url.isascii() or b"%" in path or b"#" in url:
        return None
    found = PATHS.fullmatch(path.decode())
    if found is None:
        return None
    name, version, action = found.groups()
    try:
        options = read_options(action, query, max_samples)
    except DropserveError:
        return None
    task = options.task
    plain = type(task) is Predict or (type(task) is Uncertainty and not task.include_samples)
    if not plain or options.scale == 1:
        return None
    return Options(name, version, action, route_template(name, version, action), options)


class _Message:
    """What a parser finds in some bytes: one POST, its beginning, or anything else."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self.reset()

    def reset(self) -> None:
        """Forget what was found: a connection may be idle for long."""
        self.headers: Fields = []
        self.body = b""
        self.complete = self.partial = False  # of a client that keeps the connection alive
        self._messages = 0

    def read(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.complete = self.partial = False
        if not self.complete:  # the parser failed, or is in the middle of a message
            self._parser = httptools.HttpRequestParser(self)

    @property
    def is_plain(self) -> bool:
        """Whether a small PNG comes after headers that the fast path knows."""
        given = dict(self.headers)
        length = given.get(b"content-length", b"")
        small = length.isdigit() and len(length) < 6 and int(length) <= SMALL_BYTES
        once = len(given) == len(self.headers) <= MAX_FIELDS and b"host" in given
        plain = once and _ASGI_ONLY.isdisjoint(given)
        return plain and small and given.get(b"content-type") == b"image/png"

    def on_message_begin(self) -> None:
        self._messages += 1
        self.complete = self.partial = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.partial = self._parser.should_keep_alive() and self._messages == 1

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete, self.partial = self.partial, False
