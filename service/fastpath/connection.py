"""A protocol class for uvicorn that answers small-PNG POSTs itself.

For each request uvicorn makes a task, a scope and messages, and the routes work with them: that
takes longer than decoding a small image and running a small network (docs/benchmarks.md). Here a
request goes from the socket to the queue in one call, and its answer to the socket in another.

Only a 200 is written here. Every other request - by how it was sent, what it asks for or what
becomes of it - is passed to uvicorn from its first byte on: the ASGI path. So every rule and error
has one place, and without this package no answer would change. uvicorn's parser sees all bytes of
a request or none of them, and one request is in flight on a connection at a time.
"""

import re
from asyncio import AbstractEventLoop, Future, TimerHandle
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import httptools
import numpy as np
import orjson
from starlette.applications import Starlette
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from dropserve.service.errors import DropserveError, NotFound, Overloaded
from dropserve.service.http.images import SMALL_PNG_BYTES, decode, is_small_png
from dropserve.service.http.keys import KeyCheck
from dropserve.service.http.orders import PATHS, ParsedOptions, read_options, template
from dropserve.service.http.request_log import CLIENT_CLOSED, RequestLog, record, request_id
from dropserve.service.inference.classifier import Predict, Uncertainty
from dropserve.service.inference.decoder import Pixels

if TYPE_CHECKING:
    from dropserve.service.inference.classifier import Answer
    from dropserve.service.inference.inference import Inference, Waiting

Headers = list[tuple[bytes, bytes]]
_KNOWN = {RequestLog, KeyCheck}
"""Middleware whose work is done here as well; with any other the fast path is off."""
_MAX_BYTES = SMALL_PNG_BYTES + 4096
"""Of a request: a small image and its headers."""
_MAX_URL = 512
_WAIT = 0.01
"""Seconds to wait for a body: many clients send it apart from the headers."""
_LENGTH = re.compile(rb"\r\ncontent-length: (\d{1,5})\r\n")
_ASGI_ONLY = {b"origin", b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"}
"""Headers of requests that take the ASGI path."""
_ANSWER = (
    b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\ncontent-type: application/json\r\n"
    b"x-request-id: %b\r\n\r\n%b"
)


class Connection(HttpToolsProtocol):
    """One connection: the fast path where it can be taken, and uvicorn's own elsewhere."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        app = config.loaded_app
        known = isinstance(app, Starlette) and {m.cls for m in app.user_middleware} <= _KNOWN
        self._state = app.state if known else None
        self._message = _Message()
        self._request: FastPathRequest | None = None
        self._sent = b""  # all bytes of the request in flight
        self._behind: list[bytes] = []  # what came after them
        self._partial = b""  # a request whose body is not complete
        self._timer: TimerHandle | None = None  # of the partial request
        self._between = True  # uvicorn's parser is between two requests

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
        url, head, size = _candidate(data)
        options = _options(url, self._state.settings.max_samples) if size else None
        if options is None or len(data) > size:
            return False
        if len(data) < size:
            self._partial = data
            if self._timer is None:  # the limit is per request, not per chunk
                self._timer = self.loop.call_later(_WAIT, self._pass_partial)
            return True
        found = self._message.read(data) if is_small_png(data[head:], "image/png") else None
        if found is not None:
            self._request = FastPathRequest.queued(self._state, *found, options, started)
        if self._request is None:
            return False
        self._clear_partial()
        self._unset_keepalive_if_required()
        self._sent = data
        self._request.waiting.future.add_done_callback(self._answer)
        return True

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
            if not isinstance(error, DropserveError):
                self.logger.exception("a request is passed to the ASGI path")
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
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        if self._behind:
            self.flow.resume_reading()
            self.data_received(self._take_behind())

    def _pass_request(self, request: "FastPathRequest") -> None:
        """Pass the request in flight, and what came behind it, to the ASGI path."""
        data = self._sent + self._take_behind()
        self._cancel(request, None)
        super().data_received(data)

    def _cancel(self, request: "FastPathRequest", status: int | None) -> None:
        self._request, self._sent = None, b""
        request.cancel(status)

    def _take_behind(self) -> bytes:
        behind = b"".join(self._behind)
        self._behind.clear()
        return behind

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request in flight; the ASGI path logs a partial one."""
        if self._partial:
            self._pass_partial()
        if self._request is not None:
            self._cancel(self._request, CLIENT_CLOSED)
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

    state: Any  # the app's, a bag of attributes
    waiting: "Waiting"
    size: int
    head: dict[str, Any]
    line: dict[str, Any]
    started: float

    @classmethod
    def queued(
        cls,
        state: Any,  # noqa: ANN401
        headers: Headers,
        body: bytes,
        options: tuple[str | None, str | None, str, ParsedOptions],
        started: float,
    ) -> "FastPathRequest | None":
        """Queue a request; None: it takes the ASGI path."""
        if state.keys is not None and not state.keys.admit(headers):
            return None
        name, version, route, parsed = options
        inference: Inference = state.inference
        reader = state.reader
        try:
            model = inference.store.find(name, version)
        except NotFound:
            return None
        if len(body) > reader.limits.max_bytes or not reader.hold(body):
            return None

        def read() -> Pixels:
            image = decode(body, "image/png", reader.limits.image)
            pixels: Pixels = model.prepare(image)[np.newaxis]
            return pixels

        try:
            waiting = inference.queue(model, parsed.task, read)
        except Overloaded:
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


def _candidate(data: bytes) -> tuple[bytes, int, int]:
    """Read the URL, the length of the head and that of the request, all without a parser.

    The last is 0 where it takes the ASGI path, which most do that are refused at all: so few are
    parsed twice.
    """
    head = data.find(b"\r\n\r\n") + 4
    lines = data[:head].lower()
    url, _, rest = lines[5:].partition(b" ")
    length = _LENGTH.search(lines)
    plain = (
        lines.startswith(b"post ")
        and rest.startswith(b"http/1.1\r\n")
        and b"\r\ncontent-type: image/png\r\n" in lines
        and b"\r\norigin:" not in lines
    )
    if length is None or not plain or not 0 < int(length[1]) <= SMALL_PNG_BYTES:
        return b"", 0, 0
    return data[5 : 5 + len(url)], head, head + int(length[1])


@lru_cache(256)
def _options(
    url: bytes, max_samples: int
) -> tuple[str | None, str | None, str, ParsedOptions] | None:
    """Parse a URL: model, version, route and options; None: it takes the ASGI path."""
    path, _, query = url.partition(b"?")
    if len(url) > _MAX_URL or not url.isascii() or b"%" in path or b"#" in url:
        return None
    found = PATHS.fullmatch(path.decode())
    if found is None:
        return None
    name, version, kind = found.groups()
    try:
        options = read_options(kind, query, max_samples)
    except DropserveError:
        return None
    task = options.task
    plain = type(task) is Predict or (type(task) is Uncertainty and not task.include_samples)
    if not plain or options.scale == 1:
        return None
    return name, version, template(name, version, kind), options


class _Message:
    """Parses what should be one whole request of a client that keeps the connection alive."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._reset()

    def read(self, data: bytes) -> tuple[Headers, bytes] | None:
        """Return headers and body; None: the bytes are something else, which may be anything."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._complete = False
        headers, body, complete = self._headers, self._body, self._complete and self._keep_alive
        self._reset()
        if not complete:  # the parser failed, or is in the middle of a request
            self._parser = httptools.HttpRequestParser(self)
            return None
        given = dict(headers)
        unusual = len(given) != len(headers) or not _ASGI_ONLY.isdisjoint(given)
        wrong = unusual or given.get(b"content-type") != b"image/png"
        return None if wrong or not data.endswith(b"\r\n\r\n" + body) else (headers, body)

    def _reset(self) -> None:
        self._headers: Headers = []
        self._body = b""
        self._complete = self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._complete = True
