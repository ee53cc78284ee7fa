"""uvicorn's protocol class with limits on size, time and number, and errors in our own format.

The parser gets one message at a time, in pieces that end where a message can end: behind an empty
line, or with the last byte of `Content-Length`. So a message and its answer are complete before the
next is parsed: pipelined requests are answered in order, and what is read ahead is bounded.
"""

import asyncio
import logging
import re
import resource
import termios
from fcntl import ioctl
from socket import IPPROTO_TCP, TCP_INFO
from time import perf_counter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from dropserve.service.errors import (
    DropserveError,
    MalformedRequest,
    Overloaded,
    RequestTimeout,
    stopping,
)
from dropserve.service.http.common import to_json
from dropserve.service.http.heads import (
    END,
    MAX_HEAD,
    Fields,
    Head,
    check_beginning,
    head_too_large,
    read_head,
)
from dropserve.service.http.keys import OPEN, ApiKey
from dropserve.service.http.options import TIMEOUT, action_of, route_of
from dropserve.service.http.request_log import (
    REQUEST_ID,
    SAFE_ID,
    error_content,
    record,
    request_id,
)
from dropserve.service.observability.metrics import Metrics
from dropserve.service.settings import Settings

_METHODS = {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"}
_OTHER_METHOD = b"TRACE"
"""What the parser gets for a method that no route has: the route answers 405."""
_UPGRADE = re.compile(rb"(?i)\r\nupgrade:[^\r\n]*")
# no two parts of it match the same: a head of spaces must not take long
_ID = re.compile(rb"(?i)\r\n%b:[ \t]*(%b)[ \t]*\r\n" % (REQUEST_ID, SAFE_ID.pattern))
_SPECIAL = {b"expect", b"origin", TIMEOUT.lower().encode()}
_READ_AHEAD = 65_536  # bytes of later messages that are read while one is answered
_RESERVE = 64
"""Connections over the cap, for probes."""
_OTHER_FILES = 128 + _RESERVE  # descriptors that are no connections within the cap
_TICK = 0.1  # seconds between two looks at the deadlines
_LINGER = 2.0
"""Seconds in which a refused client may still send: closing at once could destroy the answer."""
_MOST_THROWN_AWAY = 32 * 2**20  # bytes in that time
_GRACE = 0.1
"""Seconds after the start of a shutdown in which the whole of a request must have arrived."""
_EMPTY = bytes(4)
_PROBE = 0.2
"""Seconds after which it is asked whether a client that sends no more still reads."""
_CLOSE_WAIT = 8  # of the kernel's TCP states: the peer sends no more, and has not reset
NEVER = float("inf")
"""A deadline that never comes."""
_log = logging.getLogger("dropserve.connections")


class Watch:
    """The connections of one server: their deadlines, and those over the cap."""

    _watches: ClassVar["WeakKeyDictionary[ServerState, Watch]"] = WeakKeyDictionary()

    def __init__(
        self, connections: "set[Connection]", settings: Settings, metrics: Metrics
    ) -> None:
        files = open_files(settings)
        self.most = max(1, min(settings.max_connections, files - _OTHER_FILES))
        if self.most < settings.max_connections:
            _log.warning(
                f"at most {self.most} connections, not {settings.max_connections}: this process "
                f"may open {files} files (ulimit -n)"
            )
        self._connections, self._metrics = connections, metrics
        self._lines: list[tuple[dict[str, Any], float]] = []  # of the log, and seconds
        self.refusing: set[str] = set()  # actions: the last request for one waited too long
        self._over: dict[Connection, None] = {}  # in the order of their arrival
        self._ticking = False

    @classmethod
    def of(cls, server: ServerState, settings: Settings, metrics: Metrics) -> "Watch":
        """Find or make the watch of a server."""
        if server not in cls._watches:
            cls._watches[server] = cls(server.connections, settings, metrics)  # type: ignore[arg-type]
        return cls._watches[server]

    def add(self, connection: "Connection") -> None:
        """Count a connection, and see to its deadlines."""
        if len(self._connections) > self.most:
            self._over[connection] = None
            if len(self._over) > _RESERVE:
                oldest = next(iter(self._over))
                del self._over[oldest]
                oldest.transport.abort()
        if not self._ticking:
            self._ticking = True
            connection.loop.call_later(_TICK, self._tick, connection.loop)

    def is_over(self, connection: "Connection") -> bool:
        """Say if a connection is still over the cap."""
        if connection in self._over and len(self._connections) - len(self._over) < self.most:
            del self._over[connection]
        return connection in self._over

    def remove(self, connection: "Connection") -> None:
        """Forget a connection that was lost."""
        self._over.pop(connection, None)
        if not self._connections:
            self._write_lines()

    def note(self, line: dict[str, Any], seconds: float) -> None:
        """Log and count an error soon: many at once take a third of the time that each takes."""
        self._lines.append((line, seconds))

    def _write_lines(self) -> None:
        lines, self._lines = self._lines, []
        for line, seconds in lines:
            record(self._metrics, line, seconds)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ticking = bool(self._connections)
        if self._ticking:
            loop.call_later(_TICK, self._tick, loop)
        self._write_lines()
        now = loop.time()
        for connection in [c for c in self._connections if c.deadline <= now]:
            try:
                connection.expire()
            except Exception:
                _log.exception("a connection is aborted")
                connection.transport.abort()


def open_files(settings: Settings) -> int:
    """Let the process open as many files as its connections need, if it may; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + _OTHER_FILES
    if soft < needed and hard != soft:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


class Connection(HttpToolsProtocol):
    """One connection.

    Attributes:
        unread: bytes that were received, and that the parser has not got.
        deadline: time of the event loop at which `expire` is due.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._app_state = config.loaded_app.state
        self._settings: Settings = self._app_state.settings
        self._watch = Watch.of(server_state, self._settings, self._app_state.metrics)
        self.unread = b""
        self.deadline = self.loop.time() + self._settings.head_timeout
        self._between = True  # the parser is between two messages
        self._begun = False  # a head was received in part
        self._in_head = False  # the parser is within a head
        self._rest: int | None = 0  # bytes of the body that the parser lacks; None: chunked
        self._tail = b""  # of a chunked body: the last bytes that the parser got
        self._overhead = 0  # of a chunked body: bytes since the last that are its data
        self._ended = False  # the client sends no more
        self._lingers = False  # what arrives is thrown away
        self._thrown_away = 0  # bytes
        self._draining = False  # the service stops
        self._probed = False  # the client of the request in flight was sent an interim response

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; while the service stops, connections come from the kernel's backlog."""
        super().connection_made(transport)
        self._watch.add(self)
        if self._app_state.draining:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._watch.remove(self)

    @property
    def in_flight(self) -> bool:
        """Whether the answer to a request is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def busy(self) -> bool:
        """Whether the next message must wait: for an answer, or for the client to read one."""
        return self._between and (self.in_flight or self.flow.write_paused)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._lingers:
            self._thrown_away += len(data)
            if self._thrown_away > _MOST_THROWN_AWAY:
                self.transport.abort()
            return
        self.unread += data
        self.advance()

    def advance(self) -> None:
        """Go on as far as is possible: to the end of a message, whose answer the next waits for."""
        while self.unread and not self.busy and not self._lingers:
            if not self._between:
                self._read_body()
            elif not self.begin():
                break
        if self.transport.is_closing():
            return
        if self._draining:
            self._announce_close()
        if self._ended:
            self._end()
        elif len(self.unread) > _READ_AHEAD:
            self.flow.pause_reading()
        elif self._between or not self.in_flight:  # else uvicorn says: the body waits to be read
            self.flow.resume_reading()

    def begin(self) -> bool:
        """Read a head; False: it is not complete, or was refused."""
        self.unread = self.unread.lstrip(b"\r\n")
        if not self.unread:
            return False
        end = self.unread.find(END)
        if end < 0 and not self._begun:
            seconds = _GRACE if self._draining else self._settings.head_timeout
            self.deadline = self.loop.time() + seconds
        self._begun = end < 0
        received = self.unread[: end + len(END)] if end >= 0 else self.unread
        try:
            if end < 0:
                check_beginning(received)
                return False
            head = read_head(received)
            if self._watch.is_over(self) and head.target.decode() not in OPEN:
                raise Overloaded("too many connections; try again in a second", "connections")
        except DropserveError as error:
            self.refuse(error)
            return False
        if self._declined(head, received):
            return True
        self.deadline = self.loop.time() + _GRACE if self._draining else NEVER
        self._rest = head.length
        self._tail, self._overhead, self._probed = b"", 0, False
        self.unread = self.unread[len(received) :]
        if head.method not in _METHODS:
            received = _OTHER_METHOD + received[len(head.method) :]
        self._feed(_UPGRADE.sub(b"", received))  # without the field, the parser reads the body
        if not self._between:
            self.cycle.transport = _Lingering(self)  # type: ignore[assignment]
        return not self._lingers

    def _declined(self, head: Head, received: bytes) -> bool:
        """Refuse a request that was received whole if it would wait for too long.

        The route would do the same in ten times the time; it is left what needs more thought.
        """
        action = action_of(head.target) if head.method == b"POST" else None
        size = len(self.unread) + 1 if head.length is None else len(received) + head.length
        admitted = "arrived" in self.app_state  # by the fast path, which passes it on
        if action is None or len(self.unread) < size or self._draining or admitted:
            return False
        given = dict(head.fields)
        closes = head.version == b"1.0" or b"close" in given.get(b"connection", b"").lower()
        if closes or not _SPECIAL.isdisjoint(given):
            return False
        state = self._app_state
        try:
            state.inference.check_wait(self._settings.max_wait, urgent=action == "predict")
        except Overloaded as error:
            self._watch.refusing.add(action)
            key = None if state.keys is None else state.keys.find(head.fields)
            if state.keys is not None and (key is None or key.is_limited):
                return False
            self.write_error(error, received, close=False, key=key)
            self.unread = self.unread[size:]
            self.set_deadline()
            return True
        self._watch.refusing.discard(action)
        return False

    def _read_body(self) -> None:
        """Give the parser what may be of one message's body, and leave the rest unread."""
        data, start = self.unread, 0
        stop = -1 if self._rest is not None else (self._tail + data[:3]).find(END)
        stop += len(END) - len(self._tail) if stop >= 0 else 0  # it may lie across the seam
        self._tail = (self._tail + data)[-3:]
        while start < len(data) and not self._between and not self._lingers:
            if self._rest is not None:
                stop = min(len(data), self._rest)
                self._rest -= stop
            elif stop <= start:
                found = data.find(END, start)
                stop = found + len(END) if found >= 0 else len(data)
            self._overhead += stop - start
            self._feed(data[start:stop])
            start = stop
            if self._overhead > MAX_HEAD:
                self._cut(head_too_large())
        self.unread = b"" if self._lingers else data[start:]

    def _feed(self, data: bytes) -> None:
        head, cycle = self._between, self.cycle
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not head:
                self._cut(MalformedRequest("the body's chunks are not valid"))
                return
            if self.cycle is not cycle:  # the error came late
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self._between = True
            self.refuse(MalformedRequest("the request breaks the rules of HTTP"), data)

    def on_message_begin(self) -> None:
        """Note that a message has begun."""
        self._between, self._in_head = False, True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of the head; those behind a body are ignored."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the message is complete."""
        self._between = True
        super().on_message_complete()
        self.set_deadline()

    def on_response_complete(self) -> None:
        """Go on with what came behind the request."""
        self.server_state.total_requests += 1
        self.set_deadline()
        if self.transport.is_closing():  # by what was answered: nobody would read more
            self.unread = b""
        self.advance()

    def set_deadline(self) -> None:
        """Set the deadline; a request in flight has none while the client reads."""
        if self._lingers:
            return
        if self.in_flight and not self.flow.write_paused:
            self.deadline = NEVER
        elif self._draining:
            self.deadline = self.loop.time() + _GRACE
        else:
            idle = self._between or self.flow.write_paused
            seconds = self.timeout_keep_alive if idle else self._settings.body_timeout
            self.deadline = self.loop.time() + seconds

    def shutdown(self) -> None:
        """Answer what was received in full, refuse what was not, and close."""
        self._draining = True
        self._announce_close()
        if not self.busy and not self._lingers:
            self.deadline = self.loop.time() + _GRACE

    def _announce_close(self) -> None:
        """Have the answer to the last request that was received say `Connection: close`."""
        if self.busy and self.cycle is not None and not self.unread and not self._is_readable:
            self.cycle.keep_alive = False

    @property
    def _is_readable(self) -> bool:
        """Whether the kernel has bytes of this connection that were not read."""
        socket = self.transport.get_extra_info("socket")
        descriptor = -1 if socket is None else socket.fileno()
        return descriptor >= 0 and ioctl(descriptor, termios.FIONREAD, _EMPTY) != _EMPTY

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what was received completely; return whether the connection stays open."""
        self._ended = True
        self.advance()
        if self.busy and not self.flow.write_paused:
            self.deadline = self.loop.time() + _PROBE
        return not self.transport.is_closing() and self.transport.can_write_eof()  # not with TLS

    def _end(self) -> None:
        """Close the connection of a client that sends no more, after an error if one is due."""
        if self.busy or (self._lingers and self.in_flight):
            return
        if self._lingers:
            self.transport.close()
        elif not self._between:
            self._cut(MalformedRequest("the body is shorter than it says"))
        elif self.unread:
            self.refuse(MalformedRequest("the request ends before its head does"))
        else:
            self.transport.close()

    def _cut(self, error: DropserveError) -> None:
        """Let the reader of a body that cannot be complete raise an error."""
        self._lingers, self.unread = True, b""
        self.deadline = NEVER
        cycle = self.cycle
        if cycle.response_complete:
            self.linger()
            return
        cycle.scope["state"]["cut"] = error
        cycle.keep_alive = cycle.more_body = False
        cycle.message_event.set()

    def expire(self) -> None:
        """Do what is due at the deadline."""
        self.deadline = self.loop.time() + _LINGER
        if self._draining and (self.transport.get_write_buffer_size() or self._is_readable):
            self.deadline = self.loop.time() + _GRACE  # the drain has an end of its own
        elif self.transport.is_closing() or self._lingers or self.flow.write_paused:
            self.transport.abort()
        elif self.busy:
            self._probe()
        elif self.in_flight:  # and draining
            self._cut(stopping())
        elif self._between and self.unread and not self._draining:
            seconds = self._settings.head_timeout
            self.refuse(RequestTimeout(f"the head did not arrive within {seconds:g} seconds"))
        else:
            self.transport.close()

    def _probe(self) -> None:
        """Find out if a client that sends no more has left: then it resets when it is sent to.

        What it is sent is an interim response (RFC 9110, section 15.2).
        """
        self.deadline = self.loop.time() + _TICK
        socket, cycle = self.transport.get_extra_info("socket"), self.cycle
        if socket is None or socket.getsockopt(IPPROTO_TCP, TCP_INFO, 1)[0] != _CLOSE_WAIT:
            self.transport.abort()
        elif not self._probed:
            answering = cycle is not None and not cycle.response_complete  # else: the fast path
            old = answering and cycle.scope["http_version"] != "1.1"
            if not (answering and cycle.response_started) and not old:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._probed = True

    def pause_writing(self) -> None:
        """Give a client that does not read its answer a deadline."""
        super().pause_writing()
        self.set_deadline()

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self.set_deadline()
        self.advance()

    def refuse(self, error: DropserveError, head: bytes | None = None) -> None:
        """Answer an error, and close the connection once the client has stopped sending."""
        self.write_error(error, self.unread if head is None else head, close=True)
        self.linger()

    def close(self) -> None:
        """Close the connection after an answer."""
        if self._between:
            self.transport.close()
        else:
            self.linger()

    def linger(self) -> None:
        """Close the connection once the client has stopped sending.

        If bytes were unread when it is closed, a reset might destroy the answer.
        """
        self._lingers, self.unread = True, b""
        self.deadline = self.loop.time() + _LINGER
        if self._ended:
            self.transport.close()
        elif self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
        else:  # TLS
            self.transport.close()

    def write_error(
        self, error: DropserveError, head: bytes, *, close: bool, key: ApiKey | None = None
    ) -> None:
        """Write and log the error that answers a request of this head."""
        started = perf_counter()
        asked = _ID.search(head)
        name = request_id([(REQUEST_ID, asked[1])] if asked else [])
        method, _, rest = head[:MAX_HEAD].partition(b" ")
        target = rest.partition(b" ")[0]
        content, media_type = error_content(
            target.decode("latin-1"), error.status, str(error), name
        )
        body = to_json(content)
        headers = {
            "content-length": str(len(body)),
            "content-type": media_type,
            REQUEST_ID.decode(): name,
            **error.headers,
            **({"connection": "close"} if close else {}),
        }
        lines = [f"{key.lower()}: {value}\r\n".encode("latin-1") for key, value in headers.items()]
        lines.insert(0, server_lines(self.server_state.default_headers))
        body = b"" if method == b"HEAD" else body
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        shown = method.decode() if method in _METHODS else None
        line: dict[str, Any] = {
            "request_id": name,
            "method": shown,
            "route": route_of(shown, target),
            "status": error.status,
            "detail": str(error),
        }
        if key is not None:
            line["key"] = key.name
        if isinstance(error, Overloaded):
            line["reason"] = error.reason
        self._watch.note(line, perf_counter() - started)


class _ServerLines:
    """The headers that uvicorn adds to every answer, as they are sent."""

    def __init__(self) -> None:
        self._latest: tuple[Fields, bytes] = [], b""

    def __call__(self, headers: Fields) -> bytes:
        """Write them; uvicorn replaces the list once a second, because of the date."""
        latest = self._latest
        if latest[0] is not headers:
            lines = b"".join([b"%b: %b\r\n" % header for header in headers])
            latest = self._latest = headers, lines
        return latest[1]


server_lines = _ServerLines()


class _Lingering:
    """A connection's transport, for an answer that may be complete before its request is."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.write = connection.transport.write

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._connection.transport, name)

    def close(self) -> None:
        """Close the connection, once nothing more comes."""
        self._connection.close()
