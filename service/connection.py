"""uvicorn's side of a connection, which answers by the shorter way of `express.py` where it can.

Each request is read whole before it is taken that way, one at a time. uvicorn's own parser sees
either all of a request or nothing, so that neither way disturbs the other.
"""

from asyncio import AbstractEventLoop, Future
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.middleware import CLIENT_CLOSED

if TYPE_CHECKING:
    from service.classifier import Answer
    from service.express import Errand, Express, Headers

_MOST = 20_000
"""Bytes of a request that is looked at: a small picture and the lines before it."""


class _Message:
    """What a parser finds in some bytes."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)

    def read(self, data: bytes) -> bool:
        """Say if the bytes are one POST, whole, and of a client that stays."""
        self._begun = self._complete = 0
        try:
            self._parser.feed_data(data)
            if self._begun == self._complete == 1:
                return self._plain
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            pass
        self._parser = httptools.HttpRequestParser(self)  # the other is within a message
        return False

    def forget(self) -> None:
        """Let go of what was found: a connection may rest for long."""
        self.url = self.body = b""
        self.headers: Headers = []

    def on_message_begin(self) -> None:
        self._begun += 1
        self._plain = False
        self.forget()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        version = parser.get_http_version()
        self._plain = parser.get_method() == b"POST" and version == "1.1"
        self._plain &= parser.should_keep_alive()  # to be asked before the end of the message

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self._complete += 1


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
        self._express: Express | None = app_state.get("express")
        self._message = _Message()
        self._errand: Errand | None = None
        self._sent = b""
        self._behind: list[bytes] = []
        self._between = True
        self._resting_since = 0.0

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
        taken = message.read(data)
        if taken:
            self._errand = self._express.take(message.url, message.headers, message.body)
        message.forget()
        if self._errand is None:
            return False
        self._sent = data
        self._errand.place.future.add_done_callback(self._return)
        return True

    @property
    def _is_free(self) -> bool:
        """Whether uvicorn has nothing to read, to answer or to write on this connection."""
        answered = self.cycle is None or self.cycle.response_complete
        idle = self._between and answered and not self.pipeline
        return idle and not self.flow.write_paused and not self.transport.is_closing()

    def _return(self, _future: "Future[Answer]") -> None:
        """Write the answer, or have the request answered the usual way."""
        errand = self._errand
        if errand is None or self._express is None:
            return  # the client has gone, or waits for its answer the usual way
        try:
            answer = errand.answer(self.server_state.default_headers)
        except Exception:  # what is wrong is found again there, and told
            self._hand_over(errand)
            return
        self._errand, self._sent = None, b""
        try:
            self.transport.write(answer)
        except (OSError, RuntimeError):  # RuntimeError is uvloop's
            self._express.end(errand, CLIENT_CLOSED)
            return
        self._express.end(errand, 200)
        self.server_state.total_requests += 1
        self._rest()
        if self._behind:
            self.flow.resume_reading()
            self.data_received(self._take_behind())

    def _hand_over(self, errand: "Errand") -> None:
        """Have a request, and what came behind it, answered the usual way."""
        data = self._sent + self._take_behind()
        self._give_up(errand, None)
        super().data_received(data)

    def _give_up(self, errand: "Errand", status: int | None) -> None:
        self._errand, self._sent = None, b""
        if self._express is not None:
            self._express.give_up(errand, status)

    def _take_behind(self) -> bytes:
        behind = b"".join(self._behind)
        self._behind.clear()
        return behind

    def _rest(self) -> None:
        """Let the connection rest as long as it may; a timer that is running is left to run."""
        self._resting_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, if it has rested for so long."""
        self.timeout_keep_alive_task = None
        left = self._resting_since + self.timeout_keep_alive - self.loop.time()
        if self._errand is not None:
            return  # it is set when that is answered
        if left > 0:
            self.timeout_keep_alive_task = self.loop.call_later(
                left, self.timeout_keep_alive_handler
            )
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up what is under way."""
        if self._errand is not None:
            self._give_up(self._errand, CLIENT_CLOSED)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it on if the connection broke

    def shutdown(self) -> None:
        """Close the connection, or have it closed after the answer that is under way.

        That one goes the usual way from here on, which knows what to do when the time is over.
        """
        if self._errand is not None:
            self._hand_over(self._errand)
        super().shutdown()

    def on_message_begin(self) -> None:
        """Note that uvicorn is reading a request."""
        self._between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that uvicorn has read it."""
        self._between = True
        super().on_message_complete()
