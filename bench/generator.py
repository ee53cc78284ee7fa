"""A generator of load that takes little of the cores that it shares with what it measures.

One event loop, no task a request, and a timer of the kernel: event loops' own timers have a
resolution of a millisecond, and spin for less. Linux alone.
"""

import asyncio
import ctypes
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from random import Random
from typing import cast

_ABSOLUTE = 1  # TFD_TIMER_ABSTIME


class _Timer:
    """Calls `then` at a time of time.perf_counter(), which is CLOCK_MONOTONIC."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self._file: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, flags)
        self._value = (ctypes.c_long * 4)()  # interval and time, each of seconds and nanoseconds
        self._then = then
        asyncio.get_running_loop().add_reader(self._file, self._fire)

    def set(self, due: float) -> None:
        self._value[2], self._value[3] = int(due), max(1, int(due % 1 * 1e9))
        self._libc.timerfd_settime(self._file, _ABSOLUTE, self._value, None)

    def _fire(self) -> None:
        os.read(self._file, 8)
        self._then()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._file)
        os.close(self._file)


class _Connection(asyncio.Protocol):
    """A connection with one request in flight at a time."""

    def __init__(self, load: "Load", process: int) -> None:
        self._load, self.process = load, process
        self.due = 0.0
        self._received = b""
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._received += data
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._received[:end].lower()
            if not head.startswith(b"http/1.1 200"):
                self._load.fail(f"answered {self._received[:500]!r}")
                return
            start = head.index(b"content-length:") + 15
            length = int(head[start:].split(b"\r\n", 1)[0])
            self._missing = end + 4 + length - len(self._received)
            self._received = b""
        if self._missing == 0:
            self._load.answered(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.fail(f"a connection was lost: {exc}")


def _any(_port: int) -> bool:
    return True


@dataclass
class Seen:
    """What became of a load.

    Attributes:
        latencies: seconds of the requests, from when they were due.
        late: seconds by which they were sent after that.
        seconds: that the load lasted, after it was warm.
        each: requests that each process answered in that time.
        generator: processor seconds of this process.
    """

    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    seconds: float = 0.0
    each: list[int] = field(default_factory=list)
    generator: float = 0.0

    @property
    def done(self) -> int:
        """Return the requests answered in that time."""
        return sum(self.each)


class Load:
    """Connections to the processes behind a port, as many to each."""

    def __init__(self) -> None:
        self._all: list[list[_Connection]] = []
        self._free: list[deque[_Connection]] = []
        self._waiting: list[deque[float]] = []  # when requests for a process were due
        self._next: Callable[[_Connection], None] = self._rest
        self._over: asyncio.Future[None] | None = None  # of the load that runs
        self._flying, self._sending, self._begin, self._end = 0, False, 0.0, 0.0
        self._seen = Seen()

    async def open(
        self, port: int, each: int, owners: Sequence[Callable[[int], bool]] = ()
    ) -> None:
        """Open `each` connections to each process; an owner says if it has a client's port."""
        loop = asyncio.get_running_loop()
        for process, owns in enumerate(owners or [_any]):
            made: list[_Connection] = []
            while len(made) < each:
                make = partial(_Connection, self, process)
                transport, new = await loop.create_connection(make, "127.0.0.1", port)
                if owns(transport.get_extra_info("sockname")[1]):
                    made.append(new)
                else:
                    transport.close()
            self._all.append(made)

    def close(self) -> None:
        """Close them all."""
        for connection in (c for each in self._all for c in each):
            connection.transport.close()

    def fail(self, reason: str) -> None:
        """End the load that runs with an error."""
        if self._over is not None and not self._over.done():
            reason = f"a request failed; is the machine quiet? {reason}"
            self._over.set_exception(SystemExit(reason))

    def _end_if_all_answered(self) -> None:
        if not self._flying and not self._sending and self._over and not self._over.done():
            self._over.set_result(None)

    def answered(self, connection: _Connection) -> None:
        """Note an answer, and go on."""
        now = time.perf_counter()
        self._flying -= 1
        self._seen.latencies.append(now - connection.due)
        self._seen.each[connection.process] += self._begin <= now <= self._end
        self._next(connection)
        self._end_if_all_answered()

    def _send(self, connection: _Connection, due: float) -> None:
        connection.due = due
        self._flying += 1
        connection.transport.write(next(self._requests))

    def _rest(self, connection: _Connection) -> None:
        """Let a connection wait for its next request, or send one that waits for it."""
        waiting = self._waiting[connection.process]
        if waiting:
            due = waiting.popleft()
            self._seen.late.append(time.perf_counter() - due)
            self._send(connection, due)
        else:
            self._free[connection.process].append(connection)

    async def _run(
        self, requests: Iterator[bytes], warm: float, seconds: float, start: Callable[[], None]
    ) -> Seen:
        self._requests, self._seen = requests, Seen(seconds=seconds)
        self._seen.each = [0] * len(self._all)
        self._free = [deque(each) for each in self._all]
        self._waiting = [deque() for _ in self._all]
        self._over = asyncio.get_running_loop().create_future()
        spent, self._begin = time.process_time(), time.perf_counter() + warm
        self._end = self._begin + seconds
        start()
        try:
            await self._over
        finally:
            self._over = None
        self._seen.generator = time.process_time() - spent
        return self._seen

    async def closed(
        self, requests: Iterator[bytes], connections: int, seconds: float, warm: float = 0.0
    ) -> Seen:
        """Send from so many connections of each process, each when it has its answer.

        What is done in the first `warm` seconds, before the others, is not counted in `done`.
        """

        def again(connection: _Connection) -> None:
            if (now := time.perf_counter()) < self._end:
                self._send(connection, now)

        def start() -> None:
            self._next, self._sending = again, False
            for connection in (c for each in self._all for c in each[:connections]):
                self._send(connection, time.perf_counter())

        return await self._run(requests, warm, seconds, start)

    async def poisson(
        self,
        requests: Iterator[bytes],
        rate: float,
        seconds: float,
        seed: int = 0,
        weights: Sequence[float] = (),
    ) -> Seen:
        """Send `rate` requests a second, whether or not earlier ones are answered.

        Each goes to one of the processes at random, by their weights if there are any; it waits if
        all its connections are in use.
        """
        bounds = [*accumulate(weights or [1.0] * len(self._all))]
        random = Random(seed)  # noqa: S311  load, not secrets
        due = 0.0

        def send() -> None:
            nonlocal due
            while (now := time.perf_counter()) >= due:
                if due >= self._end:
                    self._sending = False
                    self._end_if_all_answered()
                    return
                process = bisect_right(bounds, random.random() * bounds[-1])
                if free := self._free[process]:
                    self._seen.late.append(now - due)
                    self._send(free.popleft(), due)
                else:
                    self._waiting[process].append(due)
                due += random.expovariate(rate)
            timer.set(due)

        def start() -> None:
            nonlocal due
            self._next, self._sending = self._rest, True
            due = time.perf_counter() + random.expovariate(rate)
            send()

        timer = _Timer(send)
        try:
            return await self._run(requests, 0.0, seconds, start)
        finally:
            timer.close()
