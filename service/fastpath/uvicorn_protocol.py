"""A protocol class for uvicorn that answers small-PNG POSTs itself.

For each request uvicorn makes a task, a scope and messages, and the routes work with them: that
takes longer than decoding a small image and running a small network (docs/benchmarks.md). Here a
request goes from the socket to the queue in one call, and its answer to the socket in another.

Only a 200 is written here. Every other request - by how it was sent, what it asks for or what
becomes of it - is passed to uvicorn from its first byte on: the ASGI path. So every rule and error
has one place, and without this package no answer would change. uvicorn's parser sees all bytes of
a request or none of them, and one request is in flight on a connection at a time.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httptools
import orjson
from starlette.applications import Starlette
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dropserve.service.errors import DropserveError
from dropserve.service.http.images import SMALL_BYTES, are_small, encoded, prepared_alone
from dropserve.service.http.keys import KeyCheck
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

Headers = list[tuple[bytes, bytes]]
Options = tuple[str | None, str | None, str, ParsedOptions]
"""Model, version, route and what the query asks for."""
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
"""Headers of requests that take the ASGI path."""
_ANSWER = (
    b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\ncontent-type: application/json\r\n"
    b"x-request-id: %b\r\n\r\n%b"
)


class FastPathProtocol(HttpToolsProtocol):
    """One connection: the fast path where it can be taken, and uvicorn's own elsewhere."""

    def __init__(self, config: Config, *arguments: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(config, *arguments, **named)
        app = config.loaded_app
        known = isinstance(app, Starlette) and {m.cls for m in app.user_middleware} <= _KNOWN
        self._state = SimpleNamespace(**app.state._state) if known else None  # noqa: SLF001  faster
        self._message = _Message()
        self._request: FastPathRequest | None = None
        self._sent = b""  # all bytes of the request in flight
        self._behind: list[bytes] = []  # what came after them
        self._partial = b""  # a request whose body is not complete
        self._timer: TimerHandle | None = None  # of the partial request
        self._between = True  # uvicorn's parser is between two requests
        self._answered = 0.0

    def data_received(self, data: bytes) -> None:
        """Take the fast path, the ASGI path, or wait for what was received before."""
        if self._request is not None:
            self._behind.append(data)
            self.flow.pause_reading()
            return
        data = self._partial + data
        if not self.take(data):
            self._clear_partial()
            super().data_received(data)

    def take(self, data: bytes) -> bool:
        """Queue a request, or wait for the rest of its body; False: it takes the ASGI path."""
        started = perf_counter()
        if self._state is None or len(data) > _MAX_BYTES or not self._is_free:
            return False
        options = _candidate(data, self._state.settings.max_samples)
        if options is None:
            return False
        message = self._message
        message.read(data)
        if message.complete and message.is_plain:
            self._request = FastPathRequest.queued(self._state, message, options, started)
        waits = message.partial and message.is_plain
        message.reset()
        if waits:
            self._partial = data
            if self._timer is None:  # the limit is per request, not per chunk
                self._timer = self.loop.call_later(_WAIT, self._pass_partial)
        elif self._request is not None:
            self._clear_partial()
            self._sent = data
            self._request.waiting.future.add_done_callback(self._answer)
        return waits or self._request is not None

    @property
    def _is_free(self) -> bool:
        """Whether uvicorn has nothing to read, to answer or to write on this connection."""
        answered = self.cycle is None or self.cycle.response_complete
        idle = self._between and answered and not self.pipeline
        return idle and not self.flow.write_paused and not self.transport.is_closing()

    def _pass_partial(self) -> None:
        """Pass a partial request to the ASGI path, where its rest has a time limit."""
        data = self._partial
        self._clear_partial()
        super().data_received(data)

    def _clear_partial(self) -> None:
        self._partial = b""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _answer(self, _future: "Future[Answer]") -> None:
        """Write the answer, or pass the request to the ASGI path."""
        request = self._request
        if request is None:
            return  # it was cancelled
        try:
            answer = request.response(self.server_state.default_headers)
        except Exception as error:  # the ASGI path finds it again and reports it
            if not isinstance(error, DropserveError | QueueTimeout | MemoryError):
                self.logger.exception("a request is passed to the ASGI path")
            error.__traceback__ = None  # as in RequestLog
            self._pass_request(request)
            return
        self._request, self._sent = None, b""
        try:
            self.transport.write(answer)
        except (OSError, RuntimeError):  # RuntimeError is uvloop's
            request.end(CLIENT_CLOSED)
            return
        request.end(200)
        self.server_state.total_requests += 1
        self._answered = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._close_after(self.timeout_keep_alive)
        if self._behind:
            self.flow.resume_reading()
            self.data_received(self._take_behind())

    def _pass_request(self, request: "FastPathRequest") -> None:
        """Pass the request in flight, and what came behind it, to the ASGI path."""
        data, behind = self._sent, self._take_behind()
        self._request, self._sent = None, b""
        request.cancel(None)
        state = self.app_state
        self.app_state = {**state, "arrived": request.started}  # its time to wait goes on
        super().data_received(data)
        self.app_state = state
        if behind:
            super().data_received(behind)

    def _take_behind(self) -> bytes:
        behind = b"".join(self._behind)
        self._behind.clear()
        return behind

    def _close_after(self, seconds: float) -> None:
        handler = self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(seconds, handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection. The timer runs on during requests: resetting it is slow."""
        busy = self._request is not None or self._partial
        idle = 0.0 if busy else self.loop.time() - self._answered
        if idle < self.timeout_keep_alive:
            self._close_after(self.timeout_keep_alive - idle)
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request in flight; the ASGI path logs a partial one."""
        if self._partial:
            self._pass_partial()
        if self._request is not None:
            request, self._request = self._request, None
            request.cancel(CLIENT_CLOSED)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it on if the connection broke

    def shutdown(self) -> None:
        """Close the connection, or pass its request to the ASGI path, which the drain waits for."""
        if self._partial:
            self._pass_partial()
        if self._request is not None:
            self._pass_request(self._request)
        super().shutdown()

    def on_message_begin(self) -> None:
        """Note that uvicorn is reading a request."""
        self._between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that uvicorn has read it."""
        self._between = True
        super().on_message_complete()


@dataclass(eq=False, slots=True)
class FastPathRequest:
    """A fast-path request in flight: its queue entry, what the answer repeats, and its log line."""

    state: SimpleNamespace  # the app's
    waiting: "Waiting"
    size: int
    head: dict[str, Any]
    line: dict[str, Any]
    started: float

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
        if state.keys is not None and not state.keys.admit(headers):
            return None
        name, version, route, parsed = options
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
        return cls(state, waiting, len(body), {**shown, **parsed.head}, line, started)

    def response(self, server_headers: Headers) -> bytes:
        """Write the response, or raise what went wrong instead."""
        content = {**self.head, **self.waiting.future.result()}
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        lines = b"".join([b"%b: %b\r\n" % header for header in server_headers])
        return _ANSWER % (lines, len(body), self.line["request_id"].encode(), body)

    def cancel(self, status: int | None) -> None:
        """Take the request out of the queue, if it is still there, and `end` it."""
        self.state.inference.cancel(self.waiting)
        self.end(status)

    def end(self, status: int | None) -> None:
        """Release the body; log and count the request, unless the ASGI path will (None)."""
        self.state.reader.release(self.size)
        if status is not None:
            self.line |= {"images": 1, "status": status}
            record(self.state.metrics, self.line, self.started)


def _candidate(data: bytes, max_samples: int) -> Options | None:
    """Decide by what a parser is not needed for; None: it takes the ASGI path."""
    if not data.startswith(b"POST ") or b"image/png" not in data:
        return None
    url = data[5 : data.find(b" ", 5)]
    return _options(url, max_samples) if len(url) <= _MAX_URL else None


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
    return name, version, route_template(name, version, action), options


class _Message:
    """What a parser finds in some bytes: one POST, its beginning, or anything else."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self.reset()

    def reset(self) -> None:
        """Forget what was found: a connection may be idle for long."""
        self.headers: Headers = []
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
        small = int(given.get(b"content-length", b"0")) <= SMALL_BYTES
        plain = len(given) == len(self.headers) and _ASGI_ONLY.isdisjoint(given)
        return plain and small and given.get(b"content-type") == b"image/png"

    def on_message_begin(self) -> None:
        self._messages += 1
        self.complete = self.partial = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        version, stays = self._parser.get_http_version(), self._parser.should_keep_alive()
        self.partial = stays and version == "1.1" and self._messages == 1

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete, self.partial = self.partial, False
