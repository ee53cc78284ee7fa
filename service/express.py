"""A shorter way for what is asked most: a small PNG, sent in one piece, to predict or to sample.

For each request uvicorn makes a task, a scope and messages back and forth, and the routes do so with
them: together that takes longer than decoding a picture and running a small network
(docs/benchmarks.md). What needs none of it goes from the socket to the queue in one call here, and
its answer from there to the socket in another.

Only a 200 is written here. Whatever is anything else in any respect - in how it was sent, in what it
asks for, in what becomes of it - is handed to uvicorn from its first byte on, and goes the usual
way. So there is one place for every rule and error, and leaving this file out changes no answer.
"""

from asyncio import AbstractEventLoop, Future
from collections.abc import Mapping
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import httptools
import numpy as np
import orjson
from starlette.datastructures import State
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.bodies import BodyReader
from service.classifier import Answer, Pixels, Predict, Uncertainty
from service.errors import DropserveError
from service.images import decode, is_quick
from service.keys import Keys
from service.middleware import CLIENT_CLOSED, record, request_id
from service.routes.orders import PATHS, Order, read_order, template
from service.settings import Settings

if TYPE_CHECKING:
    from service.inference import Inference

Headers = list[tuple[bytes, bytes]]
_MOST = 20_000
"""Bytes of a request that is looked at: a small picture and the lines before it."""
_UNUSUAL = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"))


class Express:
    """What this way knows of the application.

    Args:
        state: of the application: `inference`, once it has started, and `metrics`.
        settings: for the most samples.
        reader: of bodies: these count among what it holds.
        keys: that open the door, if there is one.
    """

    def __init__(
        self, state: State, settings: Settings, reader: BodyReader, keys: Keys | None
    ) -> None:
        self._state = state
        self._max_samples = settings.max_samples
        self._reader = reader
        self._keys = keys

    def take(self, url: bytes, headers: Headers, body: bytes) -> "Errand | None":
        """Queue a request; None: it has to go the usual way."""
        given = dict(headers)
        if len(given) < len(headers) or not _UNUSUAL.isdisjoint(given):
            return None
        if given.get(b"content-type") != b"image/png" or not is_quick(body, "image/png"):
            return None
        asked = _asked(url)
        if asked is None or (self._keys is not None and not self._keys.admit(headers)):
            return None
        name, version, route, order = asked
        if isinstance(order.task, Uncertainty) and order.task.samples > self._max_samples:
            return None
        try:
            return Errand(self._state, self._reader, (name, version), order, route, headers, body)
        except DropserveError:
            return None


class Errand:
    """One request on its way.

    Raises:
        DropserveError: it cannot be queued.

    Attributes:
        future: what will answer it.
    """

    __slots__ = (
        "_body",
        "_head",
        "_inference",
        "_line",
        "_metrics",
        "_place",
        "_reader",
        "_started",
    )

    def __init__(
        self,
        state: State,
        reader: BodyReader,
        model: tuple[str | None, str | None],
        order: Order,
        route: str,
        headers: Headers,
        body: bytes,
    ) -> None:
        self._started = perf_counter()
        self._inference: Inference = state.inference
        self._metrics = state.metrics
        self._reader = reader
        self._body = body
        classifier = self._inference.registry.find(*model)
        shown = {"model": classifier.name, "version": classifier.version}
        self._head = {**shown, **order.head}
        self._line = {"request_id": request_id(headers), "method": "POST", "route": route, **shown}
        reader.hold(body)

        def read() -> Pixels:
            image = decode(body, "image/png", reader.limits.image)
            return classifier.prepare(image)[np.newaxis]

        try:
            self._place = self._inference.queue(classifier, order.task, read)
        except DropserveError:
            reader.release(body)
            raise

    @property
    def future(self) -> Future[Answer]:
        return self._place.future

    def give_up(self) -> None:
        """Take it out of the queue, if it is still there."""
        self._inference.leave(self._place)

    def answer(self, server_headers: Headers, *, close: bool) -> bytes:
        """Return the response's bytes."""
        content = {**self._head, **self._place.future.result()}
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        lines = [b"HTTP/1.1 200 OK\r\n"]
        lines += [b"%b: %b\r\n" % header for header in server_headers]
        lines.append(
            b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b"
            % (
                len(body),
                self._line["request_id"].encode(),
                b"connection: close\r\n" if close else b"",
                body,
            )
        )
        return b"".join(lines)

    def end(self, status: int) -> None:
        """Write the request's line in the log, and count it."""
        self._line["status"] = status
        record(self._metrics, self._line, self._started)

    def release(self) -> None:
        """Let go of the body."""
        self._reader.release(self._body)


@lru_cache(256)
def _asked(url: bytes) -> tuple[str | None, str | None, str, Order] | None:
    """Read a request's line: model, version, route and options; None: not for this way."""
    path, _, query = url.partition(b"?")
    found = PATHS.fullmatch(path.decode("latin-1"))
    if found is None or b"%" in path or len(url) > 512:
        return None
    name, version, kind = found.groups()
    try:
        order = read_order(kind, query)
    except DropserveError:
        return None
    task = order.task
    plain = type(task) is Predict or (type(task) is Uncertainty and not task.include_samples)
    return (name, version, template(name, version, kind), order) if plain else None


class _Message:
    """What a parser finds in some bytes."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)

    def read(self, data: bytes) -> bool:
        """Say if the bytes are one POST, whole, and of a client that stays."""
        self._begun = self._complete = 0
        try:
            self._parser.feed_data(data)
            if self._begun == self._complete == 1 and self._stays():
                return True
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            pass
        self._parser = httptools.HttpRequestParser(self)  # the other is within a message
        return False

    def _stays(self) -> bool:
        parser = self._parser
        stays: bool = parser.should_keep_alive()
        return stays and parser.get_method() == b"POST" and parser.get_http_version() == "1.1"

    def on_message_begin(self) -> None:
        self._begun += 1
        self.url = self.body = b""
        self.headers: Headers = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self._complete += 1


class ExpressProtocol(HttpToolsProtocol):
    """uvicorn's side of one connection, which takes the shorter way where it can."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._express: Express | None = config.loaded_app.state.express
        self._message = _Message()
        self._errand: Errand | None = None
        self._sent = b""
        self._behind: list[bytes] = []
        self._between = True
        self._closing = False

    def data_received(self, data: bytes) -> None:
        """Take what comes: to the queue, or the usual way; one request after another."""
        if self._errand is not None:
            self._behind.append(data)
            self.flow.pause_reading()
        elif not self._take(data):
            super().data_received(data)

    def _take(self, data: bytes) -> bool:
        if self._express is None or len(data) > _MOST or not self._is_free:
            return False
        message = self._message
        if not message.read(data):
            return False
        errand = self._express.take(message.url, message.headers, message.body)
        if errand is None:
            return False
        self._unset_keepalive_if_required()
        self._errand, self._sent = errand, data
        self.tasks.add(errand.future)  # so that the drain waits for it, and cancels it at its end
        errand.future.add_done_callback(self._return)
        return True

    @property
    def _is_free(self) -> bool:
        """Whether uvicorn has nothing to read, to answer or to write on this connection."""
        answered = self.cycle is None or self.cycle.response_complete
        idle = self._between and answered and not self.pipeline
        return idle and not self.flow.write_paused and not self.transport.is_closing()

    def _return(self, future: "Future[Answer]") -> None:
        """Write the answer, or have the request answered the usual way."""
        self.tasks.discard(future)
        errand, data = self._errand, self._sent
        self._errand, self._sent = None, b""
        if errand is None:
            return  # the client has gone
        errand.release()
        if future.cancelled() or future.exception() is not None:
            super().data_received(data)
            if self._closing:
                super().shutdown()
        else:
            self.transport.write(
                errand.answer(self.server_state.default_headers, close=self._closing)
            )
            errand.end(200)
            if self._closing:
                self.transport.close()
            self.on_response_complete()
        if self._behind:
            behind = b"".join(self._behind)
            self._behind.clear()
            self.flow.resume_reading()
            self.data_received(behind)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up what is under way."""
        errand, self._errand = self._errand, None
        if errand is not None:
            errand.release()
            errand.give_up()
            errand.end(CLIENT_CLOSED)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection, or have it closed after the answer that is under way."""
        self._closing = True
        if self._errand is None:
            super().shutdown()

    def on_message_begin(self) -> None:
        """Note that uvicorn is reading a request."""
        self._between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that uvicorn has read it."""
        self._between = True
        super().on_message_complete()
