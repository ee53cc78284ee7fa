"""How a connection ends when the service stops: what was received in full is answered.

uvicorn closes an idle connection at once. A request that the kernel has received and nobody has
read yet is then lost. Here each connection is read for a moment more, and an answer announces the
close only if nothing is received behind its request.
"""

import asyncio
import termios
from fcntl import ioctl
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_GRACE = 0.1
"""Seconds after the signal by which the whole of a request must have arrived."""
_LINGER = 1.0
"""Seconds for which the rest of a refused body is read, at most."""
_EMPTY = bytes(4)


class DrainingProtocol(HttpToolsProtocol):
    """One connection, which answers what it has received before it closes."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **named)
        self._draining = False
        self._task: asyncio.Task[None] | None = None  # of the last request that was started

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; a connection from the kernel's backlog may come when the server stops."""
        super().connection_made(transport)
        if self.app.state.draining:
            self.shutdown()

    def shutdown(self) -> None:
        """Answer what was received in full, refuse what was not, and close."""
        if self._draining:
            return
        self._draining = True
        self._announce_close()
        self.loop.call_later(_GRACE, self._finish)

    def data_received(self, data: bytes) -> None:
        """Parse what was received."""
        super().data_received(data)
        if self._draining:
            self._announce_close()

    def on_response_complete(self) -> None:
        """Start the next request; while draining there may be none."""
        super().on_response_complete()
        if self._draining:
            self.loop.call_later(_GRACE, self._finish)

    def _announce_close(self) -> None:
        """Have the last request that was received answered with `Connection: close`."""
        if self._is_answering and not self.cycle.more_body and not self._has_unread:
            self.cycle.keep_alive = False

    def _finish(self) -> None:
        """Close the connection, or refuse its request, if nothing more was received."""
        if self not in self.connections:
            return
        if self.transport.is_closing():
            self._abort_when_sent()
        elif self._has_unread or self.pipeline:
            self.loop.call_later(_GRACE, self._finish)
        elif not self._is_answering:
            self.transport.close()
            self._abort_when_sent()
        elif self.cycle.more_body and not self.cycle.response_started:
            self._refuse_rest()

    def _abort_when_sent(self) -> None:
        """Have a closing connection end: TLS would wait for the client, up to half a minute."""
        if self.transport.get_write_buffer_size():
            self.loop.call_later(_GRACE, self._finish)
        else:
            self.loop.call_later(_LINGER, self.transport.abort)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _has_unread(self) -> bool:
        """Whether the kernel has bytes of this connection that were not read."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        return descriptor >= 0 and ioctl(descriptor, termios.FIONREAD, _EMPTY) != _EMPTY

    def _refuse_rest(self) -> None:
        """Answer a request whose body is incomplete: `RequestLog` turns the cancelling into 503."""
        self.cycle.keep_alive = False
        self.cycle.transport = _LingeringTransport(self)  # type: ignore[assignment]
        if self._task is not None:
            self._task.cancel()

    def close_lingering(self) -> None:
        """Send the end of the stream, and discard what the client still sends.

        If bytes were unread when the socket is closed, the kernel would send a reset, and the
        client might lose the answer.
        """
        if not self.transport.can_write_eof():  # TLS
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.set_protocol(_Discarding(self))
        self.flow.resume_reading()
        self.loop.call_later(_LINGER, self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Do as uvicorn does, and keep the task."""
        self._task = self.loop.create_task(cycle.run_asgi(app))
        self._task.add_done_callback(self.tasks.discard)
        self.tasks.add(self._task)


class _LingeringTransport:
    """A connection's transport, for a response that ends before its request has arrived."""

    def __init__(self, connection: DrainingProtocol) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._connection.transport, name)

    def close(self) -> None:
        self._connection.close_lingering()


class _Discarding(asyncio.Protocol):
    """Takes a connection's place when its last answer is written."""

    def __init__(self, connection: DrainingProtocol) -> None:
        self._connection = connection

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)
