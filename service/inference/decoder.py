"""Decodes images on threads, within a memory budget.

The work is a generator: before each step it yields how many bytes of memory the step takes at most.
Small steps run on at once: one thread is always left for them. Large ones wait until the budget has
room, and are admitted by turns: the one that has waited longest, then the smallest.
"""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Result = TypeVar("Result")
Pixels = npt.NDArray[np.uint8]
Steps = Generator[int, None, Result]
BYTES_PER_PIXEL = 12
"""Memory to decode one pixel. Most for WebP (two canvases and a copy) and for progressive JPEG of
four channels (2 a coefficient, and 4); PNG takes 4, and 4 for the converted copy."""
_SMALL = 16 * 2**20
"""Bytes of memory that are not counted: each thread takes so much beside the budget."""
_RELEASE_AFTER = 1.0
"""Seconds from the end of a large step until freed memory is given back: each time costs some
milliseconds, and page faults of whoever would have used it again."""


def finish(steps: Steps[Result]) -> Result:
    """Do all steps at once, in this thread."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: Result = end.value
        return result


class Decoder:
    """Runs work in steps: `threads` large ones at once at most, small ones on one thread more.

    `budget` is the memory, in bytes, of all large steps together; a step that needs more runs
    alone. `release` gives freed memory back to the system: before the largest steps, and soon after
    every large one.
    """

    def __init__(self, threads: int, budget: int, release: Callable[[], object]) -> None:
        self._executor = ThreadPoolExecutor(threads + 1, "decoding")
        self._threads = threads
        self._budget = self._free = budget
        self._release = release
        self._waiting: list[_Room] = []  # in the order of their requests
        self._oldest_next = True
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def run(self, steps: Steps[Result]) -> Result:
        """Do all steps; those that have not started when this is cancelled are dropped."""
        work = _Work(steps)
        needed: int | None = 0
        try:
            while needed is not None:
                needed = await self._advance(work, needed)
            return work.result
        finally:
            work.steps = None  # the executor keeps a cancelled job until its turn comes

    async def _advance(self, work: "_Work[Result]", needed: int) -> int | None:
        """Advance once `needed` bytes are free."""
        reserved = min(needed, self._budget) if needed > _SMALL else 0
        if reserved:
            await self._reserve(reserved)
        job = self._executor.submit(self._step, work, reserved)
        done = asyncio.wrap_future(job)
        if reserved:
            done.add_done_callback(lambda _: self._return_to_budget(reserved))
        try:
            return await asyncio.shield(done)
        finally:
            job.cancel()  # of no effect on a started step, which uses its memory to its end

    async def _reserve(self, size: int) -> None:
        """Wait for room in the budget and for a thread."""
        room = _Room(size, asyncio.get_running_loop().create_future())
        self._waiting.append(room)
        self._admit()
        try:
            await room.admitted
        except asyncio.CancelledError:
            if room.admitted.cancelled():
                self._admit()
            else:
                self._return_to_budget(size)
            raise

    def _admit(self) -> None:
        """Admit who waits until the next does not fit: neither kind can hold up the other."""
        self._waiting = [room for room in self._waiting if not room.admitted.cancelled()]
        while self._waiting and self._threads:
            oldest, smallest = self._waiting[0], min(self._waiting, key=lambda room: room.size)
            room = oldest if self._oldest_next else smallest
            if room.size > self._free:
                return
            self._oldest_next = not self._oldest_next
            self._waiting.remove(room)
            self._threads -= 1
            self._free -= room.size
            room.admitted.set_result(None)

    def _step(self, work: "_Work[Result]", reserved: int) -> int | None:
        if 2 * reserved > self._budget:
            self._release()  # freed memory that other threads keep would add to it
        return work.advance()

    def _return_to_budget(self, reserved: int) -> None:
        self._threads += 1
        self._free += reserved
        self._admit()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_RELEASE_AFTER, self._release_now)

    def _release_now(self) -> None:
        self._timer = None
        if not self._closed:
            self._executor.submit(self._release)

    def close(self) -> None:
        """Stop after the steps that have started."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False, slots=True)
class _Room:
    """Bytes of the budget that a step waits for."""

    size: int
    admitted: asyncio.Future[None]


class _Work(Generic[Result]):
    def __init__(self, steps: Steps[Result]) -> None:
        self.steps: Steps[Result] | None = steps
        self.result: Result

    def advance(self) -> int | None:
        """Do small steps; return the memory that the next, large one needs; None: that was all."""
        steps, small = self.steps, _SMALL
        if steps is None:
            return None
        try:
            while (needed := next(steps)) <= small:
                small -= needed
        except StopIteration as end:
            self.result = end.value
            return None
        return needed
