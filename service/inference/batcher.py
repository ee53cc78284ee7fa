"""A micro-batcher: what arrives while a step runs makes up the next batch.

It knows neither torch nor HTTP. Items of one key run together, as one job, and a job is a
generator: it runs on the executor, or on the event loop if it is inline, from one `yield` to the
next, and in between others have their turn. Turns go round so that nobody waits long and nobody is
left out:

- an urgent batch gets every other turn at least: it waits for one step of another job;
- of the rest, keys that wait to start and jobs under way take turns, each in their own order.

A key with many items has one turn a batch, like any other. (A sender of many keys has as many
turns.) Nothing waits while nothing runs, but for two looks at what else has arrived.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

Steps = Generator[None, None, Sequence[Result | Exception]]
Run = Callable[[Key, Sequence[Item]], Steps[Result]]
Observe = Callable[[Key, int, Sequence[float]], None]
Inline = Callable[[Key, int], bool]
_LOOKS = 2
"""Turns of the event loop before a step. Who has just been answered asks again in that time, and
comes along: a seventh less work a request under load, and 10 us more for who asks alone."""


class QueueFull(Exception):
    """More would wait than the queue holds."""


class QueueTimeout(Exception):
    """An item was not begun within its time."""


@dataclass(eq=False, slots=True)  # not frozen: that takes four times as long to make
class Place(Generic[Key, Item, Result]):
    """An item in the queue, or in a job since.

    Attributes:
        future: its result.
    """

    key: Key
    item: Item
    weight: int
    urgent: bool
    future: asyncio.Future[Result]
    since: float


@dataclass(eq=False, slots=True)
class _Job(Generic[Key, Item, Result]):
    """A batch, and how far it has come."""

    key: Key
    batch: list[Place[Key, Item, Result]]
    weight: int
    steps: Steps[Result] | None = None
    results: Sequence[Result | Exception] | None = None
    error: Exception | None = None
    closed: bool = False

    @property
    def abandoned(self) -> bool:
        """Nobody waits for it any more."""
        return all(waiting.future.done() for waiting in self.batch)

    def advance(self, run: Run[Key, Item, Result]) -> None:
        """Run to the next `yield`, the end or an error; or give up if it is abandoned."""
        try:
            self.results = self._advance(run)
        except Exception as error:
            self.error = error
        except BaseException as error:  # or all would wait for a thread that told nobody
            self.error = RuntimeError(f"a step ended with {type(error).__name__}")
            self.error.__cause__ = error

    def _advance(self, run: Run[Key, Item, Result]) -> Sequence[Result | Exception] | None:
        try:
            if self.steps is None:
                self.steps = run(self.key, [waiting.item for waiting in self.batch])
            if self.abandoned:
                self.closed = True
                self.steps.close()
            else:
                next(self.steps)
        except StopIteration as end:
            results: Sequence[Result | Exception] = end.value
            if len(results) != len(self.batch):
                raise RuntimeError(f"{len(self.batch)} items in, {len(results)} out") from None
            return results
        return None


class Batcher(Generic[Key, Item, Result]):
    """Runs items in batches on an executor, one step at a time.

    Args:
        run: `(key, items) -> steps`, a generator that returns a result each, in order, or what to
            raise for it; it is closed if all who wait for it have gone.
        executor: where it runs.
        max_batch: most weight in one batch; an item heavier than that runs alone.
        max_queue: most weight waiting to start; `submit` raises beyond it.
        max_jobs: most jobs under way; further keys wait for one of them to end. Urgent ones do not.
        inline: `(key, weight)`, says if a batch takes so little time that it may hold up the event
            loop: it runs there, when nothing runs on the executor, and saves two changes of thread.
        observe: `(key, weight, waits)`, told of each batch as it leaves the queue, and of the
            seconds that its items were in there.
    """

    def __init__(
        self,
        run: Run[Key, Item, Result],
        executor: Executor,
        *,
        max_batch: int,
        max_queue: int,
        max_jobs: int = 16,
        inline: Inline[Key] | None = None,
        observe: Observe[Key] | None = None,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_jobs = max_jobs
        self._inline = inline
        self._observe = observe
        self._urgent: _Queues[Key, Item, Result] = OrderedDict()
        self._others: _Queues[Key, Item, Result] = OrderedDict()
        self._jobs: deque[_Job[Key, Item, Result]] = deque()
        self._queued = 0
        self._busy = False
        self._closed = False
        self._turns = cycle(
            (self._start_urgent, self._start_other, self._start_urgent, self._continue)
        )

    async def submit(
        self, key: Key, item: Item, weight: int = 1, *, urgent: bool = False, max_wait: float = 0.0
    ) -> Result:
        """Queue an item and wait for its result; cancelling the wait takes it out of the queue.

        Raises:
            QueueFull: at once, if it would not fit; what weighs nothing always does.
            QueueTimeout: it has not begun within `max_wait` seconds, and never will; 0: no limit.
            Exception: what `run` raised for this item.
        """
        place = self.queue(key, item, weight, urgent=urgent)
        timer = None
        if max_wait:
            timer = asyncio.get_running_loop().call_later(max_wait, self._expire, place)
        try:
            return await place.future
        finally:
            if timer is not None:
                timer.cancel()
            if place.future.cancelled():
                self.leave(place)

    def queue(
        self, key: Key, item: Item, weight: int = 1, *, urgent: bool = False
    ) -> Place[Key, Item, Result]:
        """Queue an item; who does not wait any more must `leave`.

        Raises:
            QueueFull: as for `submit`.
        """
        if weight and self._queued and self._queued + weight > self._max_queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        place: Place[Key, Item, Result] = Place(
            key, item, weight, urgent, loop.create_future(), perf_counter()
        )
        self._queues(place).setdefault(key, deque()).append(place)
        self._queued += weight
        if not self._busy:
            self._busy = True
            self._look_around(loop)
        return place

    def leave(self, place: Place[Key, Item, Result]) -> None:
        """Give up an item, and its place in the queue if it has not left it yet."""
        place.future.cancel()
        self._take_out(place)

    def _expire(self, place: Place[Key, Item, Result]) -> None:
        """Give up an item if it is still in the queue."""
        if self._take_out(place) and not place.future.done():
            place.future.set_exception(QueueTimeout)

    def _take_out(self, place: Place[Key, Item, Result]) -> bool:
        """Take an item out of the queue; False: it has left it."""
        queues = self._queues(place)
        queue = queues.get(place.key)
        if queue is None or place not in queue:
            return False
        queue.remove(place)
        self._queued -= place.weight
        if not queue:
            del queues[place.key]
        return True

    @property
    def queued(self) -> int:
        """Weight of what waits to start."""
        return self._queued

    def close(self) -> None:
        """Start nothing more, and drop what waits and what is under way."""
        self._closed = True
        self._urgent.clear()
        self._others.clear()
        self._jobs.clear()
        self._queued = 0

    def _look_around(self, loop: asyncio.AbstractEventLoop, times: int = _LOOKS) -> None:
        """Let the loop look for what has arrived, then run the next step."""
        if times:
            loop.call_soon(self._look_around, loop, times - 1)
        else:
            self._next_step(loop)

    def _next_step(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run the next step, if there is one, or hand it to the executor."""
        job = None if self._closed else self._next_job()
        self._busy = job is not None
        if job is None:
            return
        if self._inline is not None and self._inline(job.key, job.weight):
            job.advance(self._run)
            self._after_step(job, loop)
        else:
            self._executor.submit(self._step, job, loop)

    def _step(self, job: _Job[Key, Item, Result], loop: asyncio.AbstractEventLoop) -> None:
        """Run a step, on the executor. One call back to the loop is all that the hop costs."""
        job.advance(self._run)
        loop.call_soon_threadsafe(self._after_step, job, loop)

    def _after_step(self, job: _Job[Key, Item, Result], loop: asyncio.AbstractEventLoop) -> None:
        """Answer those who waited for a job, or let it wait for its next turn."""
        if job.error is not None:
            self._fail(job, job.error)
        elif job.results is not None:
            for waiting, result in zip(job.batch, job.results, strict=True):
                if waiting.future.done():
                    continue
                if isinstance(result, Exception):
                    waiting.future.set_exception(result)
                else:
                    waiting.future.set_result(result)
        elif not job.closed:
            self._jobs.append(job)
        self._look_around(loop)

    def _fail(self, job: _Job[Key, Item, Result], error: Exception) -> None:
        """Run the items of a failed batch one by one, so that only the bad ones fail."""
        left = [waiting for waiting in job.batch if not waiting.future.done()]
        if len(job.batch) > 1:
            self._jobs.extend(_Job(job.key, [waiting], waiting.weight) for waiting in left)
        elif left:
            left[0].future.set_exception(error)

    def _next_job(self) -> _Job[Key, Item, Result] | None:
        """Go round until somebody has something to do; once is enough to ask all."""
        for _ in range(4):
            job = next(self._turns)()
            if job is not None:
                return job
        return None

    def _start_urgent(self) -> _Job[Key, Item, Result] | None:
        return self._start(self._urgent)

    def _start_other(self) -> _Job[Key, Item, Result] | None:
        return self._start(self._others) if len(self._jobs) < self._max_jobs else None

    def _continue(self) -> _Job[Key, Item, Result] | None:
        return self._jobs.popleft() if self._jobs else None

    def _start(self, queues: "_Queues[Key, Item, Result]") -> _Job[Key, Item, Result] | None:
        """Take from the key whose turn it is as much as fits; a key with more goes to the back."""
        while queues:
            key, queue = queues.popitem(last=False)
            batch: list[Place[Key, Item, Result]] = []
            weight = 0
            while queue and (not batch or weight + queue[0].weight <= self._max_batch):
                waiting = queue.popleft()
                self._queued -= waiting.weight
                if not waiting.future.done():
                    batch.append(waiting)
                    weight += waiting.weight
            if queue:
                queues[key] = queue
            if batch:
                if self._observe is not None:
                    now = perf_counter()
                    self._observe(key, weight, [now - waiting.since for waiting in batch])
                return _Job(key, batch, weight)
        return None

    def _queues(self, place: Place[Key, Item, Result]) -> "_Queues[Key, Item, Result]":
        return self._urgent if place.urgent else self._others


_Queues = OrderedDict[Key, deque[Place[Key, Item, Result]]]
