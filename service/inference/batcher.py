"""A micro-batcher: what arrives while a step runs makes up the next batch.

It knows neither torch nor HTTP. Items of one key run together, as one job. A job is a generator: it
runs on the executor, or on the event loop if it is inline, from one `yield` to the next, and other
jobs run in between:

- an urgent batch gets at least every other turn: it waits for one step of another job;
- of the rest, jobs under way get every other turn, round-robin; in the others the key that waits
  longest starts a batch, unless a job under way is expected to end sooner.

It measures what each class of work costs. So it knows how long an item would wait, refuses at once
what would wait longer than it may, and tells when a step takes far longer than such steps do.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import chain, cycle
from math import inf
from time import perf_counter
from traceback import clear_frames
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

Steps = Generator[None, None, Sequence[Result | Exception]]
Run = Callable[[Key, Sequence[Item | None]], Steps[Result]]
Classify = Callable[[Key], tuple[Hashable, int]]
_TURNS = 2
"""Turns of the event loop before a step. A client that has just been answered asks again in that
time and joins the batch: a seventh less work a request under load, and 10 us more for a client that
asks alone."""
_SWEEP = 0.02
"""Seconds that an item may stay in the queue after its time is over."""
SURE = 0.75
"""Part of the time that an item may wait which its expected wait may be: estimates err, and what
expires has waited in vain."""
_DECAY = 0.8
"""Weight of earlier batches in a mean, against the next."""
_STEP_DECAY = 0.99
"""The same for the longest step, which must not be forgotten between large batches."""
_MAX_CLASSES = 256
"""Most classes of work whose cost is remembered."""


class QueueFull(Exception):
    """More would wait than the queue holds."""


class WaitTooLong(QueueFull):
    """An item would probably wait for longer than it may: `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class QueueTimeout(Exception):
    """An item did not start within its time."""


@dataclass(eq=False, slots=True)  # not frozen: that takes four times as long to make
class Entry(Generic[Key, Item, Result]):
    """An item, in the queue or in a job; `future` is its result."""

    item: Item
    weight: int
    queue: "_Queue[Key, Item, Result]"
    future: asyncio.Future[Result]
    since: float
    deadline: float


@dataclass(eq=False, slots=True)
class _Cost:
    """What a class of work costs, by the batches of it that have run.

    Attributes:
        unit: mean seconds of a unit; 0: none has run.
        step: longest of the last steps, in seconds per weight of its batch.
        queued: units that wait.
    """

    unit: float = 0.0
    step: float = 0.0
    queued: int = 0
    _seconds: float = 0.0
    _units: float = 0.0

    def learn(self, seconds: float, units: int) -> None:
        """Count a batch: large ones count for more, as they do in what a queue takes."""
        self._seconds = _DECAY * self._seconds + seconds
        self._units = _DECAY * self._units + units
        self.unit = self._seconds / self._units


@dataclass(eq=False, slots=True)
class _Queue(Generic[Key, Item, Result]):
    """The items of one key that wait; a unit of weight is so many `units` of its class.

    The last batch that they make up has a weight of `last`, and `fits` says what may join it.
    """

    key: Key
    line: "_Line[Key, Item, Result]"
    cost: _Cost
    units: int
    fits: Callable[[Item], bool]
    entries: OrderedDict[Entry[Key, Item, Result], None]
    weight: int = 0
    last: int = 0


class _Line(Generic[Key, Item, Result]):
    """All that waits, urgent or not: queues by their key, the first to start first.

    Attributes:
        weight: of all entries.
        seconds: that they will take, by what such work has cost.
    """

    def __init__(self, classify: Classify[Key]) -> None:
        self._classify = classify
        self._costs: dict[Hashable, _Cost] = {}
        self.queues: OrderedDict[Key, _Queue[Key, Item, Result]] = OrderedDict()
        self.weight, self.seconds = 0, 0.0

    def open(self, key: Key, fits: Callable[[Item], bool]) -> _Queue[Key, Item, Result]:
        """Add an empty queue."""
        kind, units = self._classify(key)
        cost = self._costs.get(kind)
        if cost is None:
            cost = self._costs[kind] = _Cost()
            if len(self._costs) > _MAX_CLASSES:
                del self._costs[next(iter(self._costs))]
        queue = self.queues[key] = _Queue(key, self, cost, units, fits, OrderedDict())
        return queue

    def shared(self, most: int) -> float:
        """Return the seconds of the last batch of the last queue if it has room, else 0."""
        for queue in reversed(self.queues.values()):
            weight = min(queue.last, queue.weight)
            return weight * queue.units * queue.cost.unit if weight < most else 0.0
        return 0.0

    def count(self, queue: _Queue[Key, Item, Result], weight: int, units: int) -> None:
        """Count what comes into a queue, or leaves it: then both are negative."""
        cost = queue.cost
        cost.queued += units
        queue.weight += weight
        self.weight += weight
        self.seconds += units * cost.unit

    def remove(self, entry: Entry[Key, Item, Result]) -> bool:
        """Take an entry out; False: it was out."""
        queue = entry.queue
        if entry not in queue.entries:
            return False
        del queue.entries[entry]
        self.count(queue, -entry.weight, -(entry.weight or 1) * queue.units)
        if not queue.entries:
            del self.queues[queue.key]
        return True

    def learn(self, job: "_Job[Key, Item, Result]") -> None:
        """Learn from a finished job what its class costs."""
        cost = job.queue.cost
        before = cost.unit
        cost.learn(job.spent, job.units)
        self.seconds += cost.queued * (cost.unit - before)


@dataclass(eq=False, slots=True)
class _Job(Generic[Key, Item, Result]):
    """A batch and its progress: `results` at its end, or an `error`.

    `spent` are the seconds of its steps, `left` those that are still expected; less than 0: those
    that it has taken more, and will take again, for all we know.
    """

    queue: _Queue[Key, Item, Result]
    batch: list[Entry[Key, Item, Result]]
    weight: int
    units: int
    left: float
    spent: float = 0.0
    items: list[Item | None] = field(default_factory=list)
    steps: Steps[Result] | None = None
    results: Sequence[Result | Exception] | None = None
    error: Exception | None = None
    closed: bool = False

    def advance(self, run: Run[Key, Item, Result]) -> None:
        """Run to the next `yield`, the end or an error; close the steps if nobody waits."""
        try:
            if self.steps is None:
                self.items.extend(entry.item for entry in self.batch)
                self.steps = run(self.queue.key, self.items)
            self.items[:] = [
                None if entry.future.done() else item
                for entry, item in zip(self.batch, self.items, strict=True)
            ]
            if all(entry.future.done() for entry in self.batch):
                self.closed = True
                self.steps.close()
            else:
                next(self.steps)
        except StopIteration as end:
            self.results = end.value
            if end.value is None or len(end.value) != len(self.batch):
                self.error = RuntimeError(f"not one result for each of {len(self.batch)} items")
        except BaseException as error:  # one that left the thread would leave the waiters hanging
            self.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
            if self.batch[1:] or isinstance(error, MemoryError):
                _forget_frames(error)  # they hold the tensors of the run that failed


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        clear_frames(error.__traceback__)
        error.__traceback__, error = None, error.__context__


class Batcher(Generic[Key, Item, Result]):
    """Runs items in batches on an executor, one step at a time.

    Args:
        run: makes the steps of a batch; their result is a result for each item, in order, or the
            exception to raise for it. Between steps an item becomes None if its waiter has gone;
            the steps are closed if all have. If it raises, the batch is run again in halves.
        max_batch: most weight in one batch; a heavier item runs alone.
        max_queue: most weight that waits to start.
        max_jobs: most jobs under way; other keys then wait, except urgent ones.
        classify: names the class of a key, whose work costs alike, and says how many units of it a
            weight of one is; what weighs nothing counts as one.
        fits: makes, for the batch of a key, what says item by item if one more may be in it; the
            first always is.
        inline: says if a batch of a key and weight takes so little time that it may run on the
            event loop, which saves two changes of thread.
        observe: called as a batch starts, with key, weight, and the seconds that items waited.
    """

    def __init__(
        self,
        run: Run[Key, Item, Result],
        executor: Executor,
        *,
        max_batch: int,
        max_queue: int,
        max_jobs: int = 16,
        classify: Classify[Key] = lambda _key: (None, 1),
        fits: Callable[[Key], Callable[[Item], bool]] = lambda _key: lambda _item: True,
        inline: Callable[[Key, int], bool] = lambda _key, _weight: False,
        observe: Callable[[Key, int, Sequence[float]], None] = lambda _key, _weight, _waits: None,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_jobs = max_jobs
        self._fits = fits
        self._inline = inline
        self._observe = observe
        self._urgent: _Line[Key, Item, Result] = _Line(classify)
        self._others: _Line[Key, Item, Result] = _Line(classify)
        self._jobs: deque[_Job[Key, Item, Result]] = deque()
        self._turns = cycle((self._urgent, self._others, self._urgent, None))
        self._running: _Job[Key, Item, Result] | None = None
        self._since = 0.0  # when the step under way could start
        self._left = 0.0  # seconds of all jobs
        self._step = 0.0  # mean seconds of a step that is not urgent
        self._sweep_at = inf
        self._sweeping: asyncio.TimerHandle | None = None
        self._busy = False
        self._closed = False

    @property
    def queued(self) -> int:
        """Weight of what waits to start."""
        return self._urgent.weight + self._others.weight

    @property
    def step_under_way(self) -> tuple[float, float | None]:
        """Seconds that it has run, and those that such a step takes; None: none has ended yet."""
        job = self._running
        if job is None:
            return 0.0, None
        longest = job.queue.cost.step
        return perf_counter() - self._since, longest * (job.weight or 1) if longest else None

    def expected_wait(self, *, urgent: bool = False) -> float:
        """Estimate the seconds of work before an item that were queued now; 0: nothing is."""
        return self._expect(urgent, perf_counter()) if self._busy else 0.0

    def _expect(self, urgent: bool, now: float) -> float:
        """Add up what waits and what is left of jobs; an urgent item waits for some of their steps.

        The last batch of its line does not count if it has room: whatever joins it starts with it.
        """
        rest, paused, job = 0.0, self._left, self._running
        if job is not None:
            ran = now - self._since
            rest = abs(job.left - ran)
            paused -= abs(job.left)
            if urgent and job.queue.line is self._others:  # which lets us in after its step
                rest = min(rest, abs(self._step - ran))
        shared = (self._urgent if urgent else self._others).shared(self._max_batch)
        others = self._others.seconds + paused
        if urgent:
            turns = 1 + len(self._urgent.queues) + self._urgent.weight // self._max_batch
            others = min(others, turns * self._step)
        return rest + self._urgent.seconds + others - shared

    async def submit(
        self, key: Key, item: Item, weight: int = 1, *, urgent: bool = False, max_wait: float = 0.0
    ) -> Result:
        """Queue an item and wait for its result; cancelling the wait takes it out of the queue.

        Raises:
            QueueFull: as for `queue`.
            QueueTimeout: it has not started within `max_wait` seconds, and never will.
            Exception: what `run` raised for this item.
        """
        entry = self.queue(key, item, weight, urgent=urgent, max_wait=max_wait)
        try:
            return await entry.future
        finally:
            if entry.future.cancelled():
                self.cancel(entry)
            del entry  # an error's traceback holds this frame, and the entry its future: the error

    def queue(
        self, key: Key, item: Item, weight: int = 1, *, urgent: bool = False, max_wait: float = 0.0
    ) -> Entry[Key, Item, Result]:
        """Queue an item; whoever stops waiting must `cancel` it.

        Raises:
            QueueFull: at once, if it would not fit; what weighs nothing always does.
            WaitTooLong: it would probably not start within `max_wait` seconds; 0: no limit.
            RuntimeError: the batcher is closed.
        """
        now, line = perf_counter(), self._urgent if urgent else self._others
        if self._closed:
            raise RuntimeError("the batcher is closed")
        queue = line.queues.get(key)
        if self._busy:
            queued = self._urgent.weight + self._others.weight
            if weight and queued and queued + weight > self._max_queue:
                raise QueueFull
            if max_wait and (seconds := self._expect(urgent, now)) > SURE * max_wait:
                raise WaitTooLong(seconds)
        loop = asyncio.get_running_loop()
        if queue is None:
            queue = line.open(key, self._fits(key))
        if not queue.fits(item) or queue.last + weight > self._max_batch:
            queue.fits, queue.last = self._fits(key), 0
            queue.fits(item)
        queue.last += weight
        deadline = now + max_wait if max_wait else inf
        entry: Entry[Key, Item, Result] = Entry(
            item, weight, queue, loop.create_future(), now, deadline
        )
        queue.entries[entry] = None
        line.count(queue, weight, (weight or 1) * queue.units)
        if deadline + _SWEEP < self._sweep_at:
            self._sweep_later(loop, deadline, now)
        if not self._busy:
            self._busy = True
            self._since = now
            self._wait_for_turn(loop)
        return entry

    def cancel(self, entry: Entry[Key, Item, Result]) -> None:
        """Give up an item, and take it out of the queue if it is still there."""
        entry.future.cancel()
        entry.queue.line.remove(entry)

    def _sweep_later(self, loop: asyncio.AbstractEventLoop, deadline: float, now: float) -> None:
        """Sweep at a deadline, or soon after it; entries have no timers: most start in time."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._sweep_at = max(deadline, now + _SWEEP)
        self._sweeping = loop.call_later(self._sweep_at - now, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer entries whose time is over, and come back for the next."""
        now, earliest = perf_counter(), inf
        waiting = [q for line in (self._urgent, self._others) for q in line.queues.values()]
        for queue in waiting:
            for entry in [*queue.entries]:
                if entry.deadline <= now:
                    queue.line.remove(entry)
                    _expire(entry)
                else:
                    earliest = min(earliest, entry.deadline)
        self._sweeping, self._sweep_at = None, inf
        if earliest < inf:
            self._sweep_later(loop, earliest, now)

    def close(self) -> None:
        """Start nothing more, and cancel what waits and what is under way, but for its step."""
        self._closed = True
        self._drop()
        if self._sweeping is not None:
            self._sweeping.cancel()

    def _drop(self) -> None:
        waiting = [*self._urgent.queues.values(), *self._others.queues.values()]
        batches = [*(queue.entries for queue in waiting), *(job.batch for job in self._jobs)]
        for entry in [*chain(*batches)]:
            self.cancel(entry)
        self._jobs.clear()

    def _wait_for_turn(self, loop: asyncio.AbstractEventLoop, turns: int = _TURNS) -> None:
        """Run the next step after some turns of the event loop."""
        if turns:
            loop.call_soon(self._wait_for_turn, loop, turns - 1)
            return
        if self._closed:
            self._drop()
        job = self._next_job()
        self._running = job
        if job is None:
            self._busy, self._left = False, 0.0
            return
        if self._inline(job.queue.key, job.weight):
            job.advance(self._run)
            self._after_step(job, loop)
        else:
            self._executor.submit(self._step_job, job, loop)

    def _step_job(self, job: _Job[Key, Item, Result], loop: asyncio.AbstractEventLoop) -> None:
        job.advance(self._run)
        loop.call_soon_threadsafe(self._after_step, job, loop)

    def _after_step(self, job: _Job[Key, Item, Result], loop: asyncio.AbstractEventLoop) -> None:
        """Answer the waiters of a finished job, or let it wait for its next turn."""
        self._running = None
        self._measure(job)
        if job.error is not None:
            self._fail(job, job.error)
        elif job.results is not None:
            job.queue.line.learn(job)
            for entry, result in zip(job.batch, job.results, strict=True):
                if entry.future.done():
                    continue
                if isinstance(result, Exception):
                    entry.future.set_exception(result)
                else:
                    entry.future.set_result(result)
        elif not job.closed:
            self._jobs.append(job)
        self._wait_for_turn(loop)

    def _measure(self, job: _Job[Key, Item, Result]) -> None:
        """Count a step's time: from the end of the one before, so with what the event loop did."""
        now = perf_counter()
        seconds = now - self._since
        self._since = now
        job.spent += seconds
        over = job.results is not None or job.error is not None or job.closed
        left = 0.0 if over else job.left - seconds
        self._left += abs(left) - abs(job.left)
        job.left = left
        cost, longest = job.queue.cost, seconds / (job.weight or 1)
        cost.step = longest if longest > cost.step else _STEP_DECAY * cost.step
        if job.queue.line is self._others:
            self._step += (1 - _DECAY) * (seconds - self._step)

    def _fail(self, job: _Job[Key, Item, Result], error: Exception) -> None:
        """Run a failed batch again in halves, until the bad items are alone: only they fail."""
        if not job.batch[1:]:
            if not job.batch[0].future.done():
                job.batch[0].future.set_exception(error)
            return
        rest = [entry for entry in job.batch if not entry.future.done()]
        middle = (len(rest) + 1) // 2
        for half in (rest[:middle], rest[middle:]):
            if half:
                self._jobs.append(self._job(job.queue, half, sum(entry.weight for entry in half)))

    def _next_job(self) -> _Job[Key, Item, Result] | None:
        """Go through the turns until there is a job; after one round there is none."""
        for _ in range(4):
            job = None
            line = next(self._turns)
            if line is None:
                job = self._jobs.popleft() if self._jobs else None
            elif line is self._others:
                job = self._take_sooner()
            has_room = line is self._urgent or len(self._jobs) < self._max_jobs
            if job is None and line is not None and has_room:
                job = self._start(line)
            if job is not None:
                return job
        return None

    def _take_sooner(self) -> _Job[Key, Item, Result] | None:
        """Take the job under way with the least left; None: a new one would not take longer.

        Equal jobs then end one after another, and not all of them late.
        """
        if not self._jobs or not self._others.queues:
            return None
        job = min(self._jobs, key=lambda job: abs(job.left))
        queue = next(iter(self._others.queues.values()))
        new = min(queue.weight or 1, self._max_batch) * queue.units * queue.cost.unit
        if abs(job.left) > new:
            return None
        self._jobs.remove(job)
        return job

    def _start(self, line: _Line[Key, Item, Result]) -> _Job[Key, Item, Result] | None:
        """Make a batch of the first key; a key with more than fits goes to the back."""
        while line.queues:
            key, queue = line.queues.popitem(last=False)
            now = perf_counter()
            batch: list[Entry[Key, Item, Result]] = []
            weight = 0
            for entry in self._take(line, queue):
                if entry.deadline <= now:
                    _expire(entry)
                elif not entry.future.done():
                    batch.append(entry)
                    weight += entry.weight
            if queue.entries:
                line.queues[key] = queue
            if batch:
                self._observe(key, weight, [now - entry.since for entry in batch])
                return self._job(queue, batch, weight)
        line.seconds = 0.0  # sums of floats are not exact
        return None

    def _take(
        self, line: _Line[Key, Item, Result], queue: _Queue[Key, Item, Result]
    ) -> list[Entry[Key, Item, Result]]:
        """Take the first entries out of a queue, as many as fit into a batch, and one at least."""
        taken: list[Entry[Key, Item, Result]] = []
        weight = units = 0
        fits = self._fits(queue.key)
        for entry in queue.entries:
            more = fits(entry.item) and weight + entry.weight <= self._max_batch
            if taken and not more:
                break
            taken.append(entry)
            weight += entry.weight
            units += entry.weight or 1
        for entry in taken:
            del queue.entries[entry]
        line.count(queue, -weight, -units * queue.units)
        return taken

    def _job(
        self, queue: _Queue[Key, Item, Result], batch: list[Entry[Key, Item, Result]], weight: int
    ) -> _Job[Key, Item, Result]:
        units = (weight or len(batch)) * queue.units
        job = _Job(queue, batch, weight, units, units * queue.cost.unit)
        self._left += job.left
        return job


def _expire(entry: Entry[Key, Item, Result]) -> None:
    if not entry.future.done():
        entry.future.set_exception(QueueTimeout)
