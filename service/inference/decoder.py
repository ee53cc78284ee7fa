"""Decodes images on threads, within a memory budget.

The work is a generator: before each step it yields how many bytes of memory the step takes at most.
Small steps run on at once; a large one waits until the budget has room for it, and smaller ones
overtake it for a time. One thread always is left for small steps.
"""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import heappop, heappush
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
_OVERTAKEN = 50e6
"""Bytes for which a step may be overtaken for a second: that is ten times what decoding takes."""
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
    """Runs work in steps on threads: `threads` large steps at once, and small ones on another, too.

    `budget` is the memory, in bytes, of all large steps together; a step that needs more runs
    alone. `release` gives freed memory back to the system: before the largest steps, and soon after
    every large one.
    """

    def __init__(self, threads: int, budget: int, release: Callable[[], object]) -> None:
        self._executor = ThreadPoolExecutor(threads + 1, "decoding")
        self._threads = threads
        self._budget = self._free = budget
        self._release = release
        self._waiting: list[_Room] = []  # a heap
        self._timer: asyncio.TimerHandle | None = None

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
        loop = asyncio.get_running_loop()
        if needed <= _SMALL:
            return await asyncio.shield(loop.run_in_executor(self._executor, work.advance))
        reserved = min(needed, self._budget)
        await self._reserve(reserved)
        job = loop.run_in_executor(self._executor, self._step, work, reserved)
        job.add_done_callback(lambda _: self._return_to_budget(reserved))
        return await asyncio.shield(job)  # a started step uses its memory to its end

    async def _reserve(self, size: int) -> None:
        """Wait for room: the smaller a step, and the longer it waits, the sooner is its turn."""
        loop = asyncio.get_running_loop()
        room = _Room(loop.time() + size / _OVERTAKEN, size, loop.create_future())
        heappush(self._waiting, room)
        self._admit()
        try:
            await room.admitted
        except asyncio.CancelledError:
            if not room.admitted.cancelled():
                self._return_to_budget(size)
            self._admit()
            raise

    def _admit(self) -> None:
        """Admit who waits, in order, while there is room."""
        while self._waiting:
            room = self._waiting[0]
            if not room.admitted.cancelled():
                if not self._threads or self._free < room.size:
                    return
                self._threads -= 1
                self._free -= room.size
                room.admitted.set_result(None)
            heappop(self._waiting)

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
        self._executor.submit(self._release)

    def close(self) -> None:
        """Stop after the steps that have started."""
        if self._timer is not None:
            self._timer.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(order=True, slots=True)
class _Room:
    """Memory that a step waits for; sorted by `turn`, a time on the event loop's clock."""

    turn: float
    size: int
    admitted: asyncio.Future[None] = field(compare=False)


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
