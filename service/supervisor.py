"""Processes that serve: a server that loses no request at shutdown, and several on one port.

uvicorn's own supervisor keeps the port open until its workers have drained: the kernel accepts
connections that nobody answers. It also asks the workers one after another whether they live, so
that a dead one may wait for its replacement.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BACKLOG = 0.1
"""Seconds for connections from the kernel's backlog to be set up; TLS may take longer."""
_OVERTIME = 3.0
"""Seconds after the drain when a process ends that is still not done."""
_YOUNG = 5.0
"""Seconds: a worker that dies earlier may die again, and its replacement waits."""
_LONGEST_PAUSE = 30.0
_log = logging.getLogger("dropserve.supervisor")


class Server(uvicorn.Server):
    """Answers every request that was received in full before the port is closed."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; while models are loaded there is nothing to drain."""
        if not self.started:
            os._exit(0)
        _exit_after((self.config.timeout_graceful_shutdown or 0) + _OVERTIME)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, answer what was received, and end."""
        self.config.loaded_app.state.draining = True
        accepted = self._close_port(sockets or ())
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if accepted:
            made = [asyncio.create_task(self._adopt(each)) for each in accepted]
            await asyncio.wait(made, timeout=_BACKLOG)
        await super().shutdown(sockets)

    def _close_port(self, sockets: Sequence[socket.socket]) -> list[socket.socket]:
        """Close the port; return the connections that the kernel had accepted."""
        ports = [port.dup() for server in self.servers for port in server.sockets]
        for server in self.servers:
            server.close()
        for inherited in sockets:
            inherited.close()
        return [connection for port in ports for connection in _last_accepted(port)]

    async def _adopt(self, connection: socket.socket) -> None:
        """Serve a connection that the event loop has not accepted."""
        config, loop = self.config, asyncio.get_running_loop()
        protocol: Any = config.http_protocol_class
        state = {"server_state": self.server_state, "app_state": self.lifespan.state}
        with suppress(OSError):  # the client has left
            await loop.connect_accepted_socket(
                lambda: protocol(config=config, **state), connection, ssl=config.ssl
            )


def _last_accepted(port: socket.socket) -> Iterator[socket.socket]:
    """Empty the backlog of a port and close it at once."""
    with port, suppress(OSError):  # BlockingIOError: it is empty
        while True:
            yield port.accept()[0]


def _exit_after(seconds: float) -> None:
    """End this process after so many seconds if it is still there: a thread may never end."""

    def end() -> None:
        _log.error("not stopped %g seconds after the signal: ends at once", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


class Supervisor:
    """Starts the workers, replaces those that die, and stops them together."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        self._config, self._sockets = config, sockets
        self._workers: list[_Worker] = []
        self._signal: int | None = None
        self._failed = False
        self._early_deaths = 0  # one after another
        self._next_start = 0.0
        self._woken, self._waker = socket.socketpair()

    def run(self) -> int:
        """Run until a signal or a failed start; return the exit status."""
        self._catch_signals()
        for _ in range(self._config.workers):
            self._start(first=True)
        while self._signal is None and not self._failed:
            wait([self._woken, *(worker.process.sentinel for worker in self._workers)], self._pause)
            for worker in [each for each in self._workers if not each.process.is_alive()]:
                self._remove(worker)
            if self._pause == 0 and self._signal is None and not self._failed:
                self._start()
        return self._stop()

    def _catch_signals(self) -> None:
        """Have a signal noted, and `wait` return."""
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in _STOP:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    @property
    def _pause(self) -> float | None:
        """Seconds until the next start; None: all workers run."""
        if len(self._workers) == self._config.workers:
            return None
        return max(0.0, self._next_start - time.monotonic())

    def _start(self, *, first: bool = False) -> None:
        try:
            self._workers.append(_Worker(self._config, self._sockets, first))
        except OSError as error:  # the machine has no memory or processes left
            if first:
                raise
            pause = self._postpone(max(1, self._early_deaths) + 1)
            _log.error("no worker can be started (%s); next try in %g seconds", error, pause)

    def _remove(self, worker: "_Worker") -> None:
        """Forget a dead worker, and plan when its replacement starts."""
        self._workers.remove(worker)
        code = worker.process.exitcode
        if code == STARTUP_FAILURE and (worker.first or not self._workers):
            _log.error("worker %s failed to start: the service stops", worker.process.pid)
            self._failed = True
            return
        young = time.monotonic() - worker.started < _YOUNG
        pause = self._postpone(self._early_deaths + 1 if young else 0)
        text = "worker %s died (exit code %s); it is replaced in %g seconds"
        _log.error(text, worker.process.pid, code, pause)

    def _postpone(self, early_deaths: int) -> float:
        """Plan the next start after so many early deaths; return the seconds until then."""
        self._early_deaths = early_deaths
        pause = min(2.0 ** (early_deaths - 2), _LONGEST_PAUSE) if early_deaths > 1 else 0.0
        self._next_start = time.monotonic() + pause
        return pause

    def _stop(self) -> int:
        """Close the port, have the workers drain, and kill those that do not end."""
        for number in _STOP:
            signal.signal(number, signal.SIG_IGN)  # a second one changes nothing
        for port in self._sockets:
            port.close()
        for worker in self._workers:
            worker.process.terminate()
        drain = (self._config.timeout_graceful_shutdown or 0) + 2 * _OVERTIME
        deadline = time.monotonic() + drain
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                _log.error("worker %s does not stop: it is killed", worker.process.pid)
                worker.process.kill()
                worker.process.join()
        clean = all(each.process.exitcode in (0, -signal.SIGTERM) for each in self._workers)
        return 0 if clean and not self._failed else 1


class _Worker:
    """A worker process and when it was started (`time.monotonic`)."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], first: bool) -> None:
        self.first, self.started = first, time.monotonic()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_work, args=(config, sockets))
        self.process.start()


def _work(config: uvicorn.Config, sockets: list[socket.socket]) -> None:
    """Serve in a worker process."""
    config.configure_logging()  # of uvicorn, where it differs from the default: no access log
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent decides, and sends SIGTERM
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):  # raised again by uvicorn when it has drained
        Server(config).run(sockets)


def _stop_with_parent() -> None:
    """Drain when the parent process has died: nobody would replace or stop this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
