"""Load on a server from this process: connections that stay open, arrivals, what a process holds.

An open loop sends at its times whether or not answers have come, and counts latency from the time
at which a request was due: a slow server is not asked less, and a slow generator shows in `lag`.
"""

import asyncio
import gc
import math
import os
import random
import resource
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import httpx
import numpy as np
import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from tests.reliability.messages import Answer, first_answer

Item = TypeVar("Item")
Result = TypeVar("Result")
BROKEN = 0
"""Status of a request that got no answer: its connection was refused or broke, or none came."""
PATIENCE = 30
"""Seconds that a client waits for an answer."""


class Connection(asyncio.Protocol):
    """A client's connection, with one request in flight at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_open = True
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._answer is None or self._answer.done():
            return
        if (first := first_answer(self._received)) is not None:
            answer, size = first
            del self._received[:size]
            self.is_open = answer.headers.get("connection") != "close"
            self._answer.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed without an answer"))

    async def ask(self, raw: bytes) -> Answer:
        """Send a request; return its answer. ConnectionError: there is none."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(raw)
        return await self._answer


class Asked(Protocol):
    """What answers requests."""

    async def ask(self, raw: bytes) -> Answer: ...


class Clients:
    """Connections to a server, used again; a request that finds none free opens one more.

    If there are `most`, it waits for one.
    """

    def __init__(self, port: int, most: int = 2**16, *, keep_alive: bool = True) -> None:
        self._port, self._keep_alive = port, keep_alive
        self._slots = asyncio.Semaphore(most)
        self._free: deque[Connection] = deque()
        self._all: set[Connection] = set()

    async def ask(self, raw: bytes) -> Answer:
        """Send a request over a free connection; return its answer.

        Raises:
            OSError: there is none, or it took too long (a TimeoutError is one).
        """
        async with self._slots, asyncio.timeout(PATIENCE):
            connection = await self._connection()
            try:
                answer = await connection.ask(raw)
            except BaseException:  # also when cancelled: its answer may still come
                self._close(connection)
                raise
            if self._keep_alive and connection.is_open:
                self._free.append(connection)
            else:
                self._close(connection)
            return answer

    async def _connection(self) -> Connection:
        while self._free:
            connection = self._free.popleft()  # in turn: none is idle for long
            if connection.is_open:
                return connection
            self._close(connection)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        self._all.add(connection)
        return connection

    async def open(self, count: int, wanted: Callable[[int], bool] | None = None) -> None:
        """Open connections ahead of use; of those whose own port is not wanted, another."""
        opened: list[Connection] = []
        while len(opened) < count:
            connection = await self._connection()
            if wanted is None or wanted(connection.transport.get_extra_info("sockname")[1]):
                opened.append(connection)
            else:
                self._close(connection)
        self._free.extend(opened)

    def _close(self, connection: Connection) -> None:
        connection.transport.close()
        self._all.discard(connection)

    def close(self) -> None:
        """Close them all."""
        for connection in list(self._all):
            self._close(connection)
        self._free.clear()


@asynccontextmanager
async def clients(
    port: int, count: int = 0, most: int = 2**16, *, keep_alive: bool = True
) -> AsyncIterator[Clients]:
    """Yield clients of a server on this machine, `count` of them connected, and close them."""
    made = Clients(port, most, keep_alive=keep_alive)
    try:
        await made.open(count)
        yield made
    finally:
        made.close()


@dataclass(slots=True)
class Sample:
    """A request and what became of it; times are those of `time.perf_counter()`."""

    due: float
    sent: float = 0.0
    done: float = 0.0
    status: int = BROKEN
    retry_after: str | None = None
    error: str = ""

    @property
    def latency(self) -> float:
        """Seconds from the time at which it was due."""
        return self.done - self.due

    async def take(self, asked: Asked, raw: bytes) -> None:
        """Send the request, and note its answer."""
        self.sent = time.perf_counter()
        try:
            answer = await asked.ask(raw)
            self.status, self.retry_after = answer.status, answer.headers.get("retry-after")
            self.error = "" if answer.status < 400 else answer.body[:300].decode("latin-1")
        except OSError as error:
            self.error = repr(error)
        self.done = time.perf_counter()


async def open_loop(
    asked: Asked, requests: Iterator[bytes], rate: float, seconds: float, seed: int = 0
) -> list[Sample]:
    """Send `rate` requests a second, at the times of a Poisson process, until all are answered."""
    generator = random.Random(seed)
    started = due = time.perf_counter()
    samples: list[Sample] = []
    async with asyncio.TaskGroup() as group:
        while (due := due + generator.expovariate(rate)) < started + seconds:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            elif len(samples) % 10 == 0:
                await asyncio.sleep(0)  # behind its times: answers must be read all the same
            samples.append(Sample(due))
            group.create_task(samples[-1].take(asked, next(requests)))
    return samples


async def closed_loop(
    asked: Asked, requests: Iterator[bytes], connections: int, seconds: float
) -> list[Sample]:
    """Send from some connections, each its next request when it has the answer to the last."""
    samples: list[Sample] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        while (now := time.perf_counter()) < end:
            samples.append(sample := Sample(now))
            await sample.take(asked, next(requests))

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(one())
    return samples


async def send_all(
    ask: Callable[[Item], Awaitable[Result]], items: Iterable[Item], at_once: int
) -> AsyncIterator[tuple[Item, Result]]:
    """Ask for every item, some at once; yield each with its answer, in order."""
    flying: deque[tuple[Item, asyncio.Future[Result]]] = deque()
    for item in items:
        if len(flying) == at_once:
            earlier, answer = flying.popleft()
            yield earlier, await answer
        flying.append((item, asyncio.ensure_future(ask(item))))
    while flying:
        earlier, answer = flying.popleft()
        yield earlier, await answer


@asynccontextmanager
async def probing(asked: Asked, raw: bytes, pause: float) -> AsyncIterator[list[Sample]]:
    """Send a request again and again during the block; yield the list of what became of them."""
    samples: list[Sample] = []

    async def probe() -> None:
        while True:
            sample = Sample(time.perf_counter())
            await sample.take(asked, raw)
            samples.append(sample)
            await asyncio.sleep(pause)

    task = asyncio.create_task(probe())
    try:
        yield samples
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def run(main: Coroutine[object, object, Result]) -> Result:
    """Run a coroutine with garbage collection of its own: what was imported stays uncollected."""
    gc.collect()
    gc.freeze()
    try:
        return uvloop.run(main)
    finally:
        gc.unfreeze()


def milliseconds(seconds: Iterable[float], percentile: float) -> float:
    """Return a percentile of times, in milliseconds to two digits; NaN if there are none."""
    times = list(seconds)
    return round(1000 * float(np.percentile(times, percentile)), 2) if times else math.nan


def statuses(samples: Iterable[Sample]) -> dict[int, int]:
    """Count the statuses."""
    return dict(sorted(Counter(sample.status for sample in samples).items()))


def failures(samples: Iterable[Sample], allowed: Iterable[int] = (200,)) -> list[Sample]:
    """Return the first of the requests with another status."""
    right = set(allowed)
    return [sample for sample in samples if sample.status not in right][:10]


@dataclass(frozen=True)
class Usage:
    """What a process holds."""

    resident: int  # bytes
    descriptors: int
    threads: int

    @classmethod
    def of(cls, process: int) -> "Usage":
        """Ask the kernel."""
        found = psutil.Process(process)
        with found.oneshot():
            return cls(found.memory_info().rss, found.num_fds(), found.num_threads())


def metrics(url: str) -> Counter[str]:
    """Ask a service for its metrics; return each, summed over its labels."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(url + "/metrics").text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


@contextmanager
def descriptors(soft: int) -> Iterator[None]:
    """Let this process have so many descriptors."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run this thread, and the processes that it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def counted(make: Callable[[int], bytes], start: int = 0) -> Iterator[bytes]:
    """Yield requests made from the numbers from `start` on."""
    while True:
        yield make(start)
        start += 1
