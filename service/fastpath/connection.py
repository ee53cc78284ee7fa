"""uvicorn's side of a connection, which answers by the shorter way of `fast_path.py` where it can.

A request is taken that way once all of it is there, and one at a time. uvicorn's own parser sees
either all of a request or nothing, so that neither way disturbs the other.
"""

from asyncio import AbstractEventLoop, Future, TimerHandle
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from dropserve.service.errors import DropserveError
from dropserve.service.fastpath.request import FastPath, FastPathRequest, Headers
from dropserve.service.http.request_log import CLIENT_CLOSED

if TYPE_CHECKING:
    from dropserve.service.inference.classifier import Answer

_MOST = 20_000
"""Bytes of a request that is looked at: a small picture and the lines before it."""
_PATIENCE = 0.01
"""Seconds that a body may be late: many clients send it apart from the lines before it."""


class _Message:
    """What a parser finds in some bytes.

    Attributes:
        whole: they are one POST, complete, of a client that stays.
        begun: they are the beginning of one.
        url: of the request.
        headers: of the request, names in lower case.
        body: of the request.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self.forget()

    def read(self, data: bytes) -> None:
        """Look at some bytes; they may be anything."""
        self.forget()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.whole = self.begun = False
        if not self.whole:  # a parser within a message, or at its wits' end
            self._parser = httptools.HttpRequestParser(self)

    def forget(self) -> None:
        """Let go of what was found: a connection may rest for long."""
        self.whole = self.begun = False
        self.url = self.body = b""
        self.headers: Headers = []
        self._messages = 0

    def on_message_begin(self) -> None:
        self._messages += 1
        self.whole = self.begun = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        version, stays = self._parser.get_http_version(), self._parser.should_keep_alive()
        self.begun = stays and version == "1.1" and self._messages == 1

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole, self.begun = self.begun, False


class Connection(HttpToolsProtocol):
    """uvicorn's side of one connection, which takes the shorter way where it can."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        state = config.loaded_app.state  # of the application
        self._fast_path = FastPath(state, state.settings, state.reader, state.keys)
        self._message = _Message()
        self._request: FastPathRequest | None = None
        self._sent = b""  # the request's request, to its last byte
        self._behind: list[bytes] = []
        self._begun = b""
        self._patience: TimerHandle | None = None
        self._between = True
        self._resting_since = 0.0

    def data_received(self, data: bytes) -> None:
        """Take what comes: to the queue, or the usual way; one request after another."""
        if self._request is not None:
            self._behind.append(data)
            self.flow.pause_reading()
            return
        data = self._begun + data
        if not self._take(data):
            self._forget_begun()
            super().data_received(data)

    def _take(self, data: bytes) -> bool:
        """Queue a request, or wait for the rest of it; False: it has to go the usual way."""
        if len(data) > _MOST or not data.startswith(b"POST ") or not self._is_free:
            return False
        self._message.read(data)
        try:
            return self._take_message(self._message, data)
        finally:
            self._message.forget()

    def _take_message(self, message: _Message, data: bytes) -> bool:
        if message.whole:
            self._request = self._fast_path.take(message.url, message.headers, message.body)
            if self._request is None:
                return False
            self._forget_begun()
            self._sent = data
            self._request.place.future.add_done_callback(self._return)
            return True
        if message.begun and self._fast_path.is_plain(message.headers):
            self._begun = data
            if self._patience is None:  # else it goes on: who drips has no longer
                self._patience = self.loop.call_later(_PATIENCE, self._stop_waiting)
            return True
        return False

    def _stop_waiting(self) -> None:
        """Have what has come of a request go the usual way, where its rest has a time limit."""
        begun = self._begun
        self._forget_begun()
        super().data_received(begun)

    def _forget_begun(self) -> None:
        self._begun = b""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    @property
    def _is_free(self) -> bool:
        """Whether uvicorn has nothing to read, to answer or to write on this connection."""
        answered = self.cycle is None or self.cycle.response_complete
        idle = self._between and answered and not self.pipeline
        return idle and not self.flow.write_paused and not self.transport.is_closing()

    def _return(self, _future: "Future[Answer]") -> None:
        """Write the answer, or have the request answered the usual way."""
        request = self._request
        if request is None:
            return  # the client has gone, or waits for its answer the usual way
        try:
            answer = request.answer(self.server_state.default_headers)
        except Exception as error:  # what is wrong is found again there, and told
            if not isinstance(error, DropserveError):
                self.logger.exception("a request is answered the usual way")
            self._hand_over(request)
            return
        self._request, self._sent = None, b""
        try:
            self.transport.write(answer)
        except (OSError, RuntimeError):  # RuntimeError is uvloop's
            self._fast_path.end(request, CLIENT_CLOSED)
            return
        self._fast_path.end(request, 200)
        self.server_state.total_requests += 1
        self._rest()
        if self._behind:
            self.flow.resume_reading()
            self.data_received(self._take_behind())

    def _hand_over(self, request: "FastPathRequest") -> None:
        """Have a request, and what came behind it, answered the usual way."""
        data = self._sent + self._take_behind()
        self._give_up(request, None)
        super().data_received(data)

    def _give_up(self, request: "FastPathRequest", status: int | None) -> None:
        self._request, self._sent = None, b""
        self._fast_path.give_up(request, status)

    def _take_behind(self) -> bytes:
        behind = b"".join(self._behind)
        self._behind.clear()
        return behind

    def _rest(self) -> None:
        """Let the connection rest as long as it may; a timer that is running is left to run."""
        self._resting_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._rest_for(self.timeout_keep_alive)

    def _rest_for(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, if it has rested for so long."""
        self.timeout_keep_alive_task = None
        left = self._resting_since + self.timeout_keep_alive - self.loop.time()
        if self._request is not None or self._begun:
            return  # it is set when that is answered
        if left > 0:
            self._rest_for(left)
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up what is under way; what has only begun is noted on the usual way."""
        if self._begun:
            self._stop_waiting()
        if self._request is not None:
            self._give_up(self._request, CLIENT_CLOSED)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it on if the connection broke

    def shutdown(self) -> None:
        """Close the connection, or have it closed after the answer that is under way.

        That one goes the usual way from here on, which knows what to do when the time is over.
        """
        if self._begun:
            self._stop_waiting()
        if self._request is not None:
            self._hand_over(self._request)
        super().shutdown()

    def on_message_begin(self) -> None:
        """Note that uvicorn is reading a request."""
        self._between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that uvicorn has read it."""
        self._between = True
        super().on_message_complete()
