"""Decodes images on threads, within a memory budget.

The work is a generator: before each step it yields how many bytes of memory the step takes at most.
Small steps run on at once; a large one waits until the budget has room for it.
"""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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


def finish(steps: Steps[Result]) -> Result:
    """Do all steps at once, in this thread."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: Result = end.value
        return result


class Decoder:
    """Runs work in steps on threads.

    `budget` is the memory, in bytes, of all large steps together; a step that needs more runs
    alone. `release` gives freed memory back to the system, before and after the largest steps.
    """

    def __init__(self, threads: int, budget: int, release: Callable[[], object]) -> None:
        self._executor = ThreadPoolExecutor(threads, "decoding")
        self._budget = self._free = budget
        self._release = release
        self._lock = asyncio.Lock()
        self._freed = asyncio.Event()

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
        """Advance once `needed` bytes are free; steps get them in the order of their requests."""
        reserved = min(needed, self._budget) if needed > _SMALL else 0
        async with self._lock if reserved else nullcontext():
            while self._free < reserved:
                self._freed.clear()
                await self._freed.wait()
            self._free -= reserved
        job = self._executor.submit(self._step, work, reserved)
        done = asyncio.wrap_future(job)
        done.add_done_callback(lambda _: self._return_to_budget(reserved))
        try:
            return await asyncio.shield(done)
        finally:
            job.cancel()  # of no effect on a started step, which uses its memory to its end

    def _step(self, work: "_Work[Result]", reserved: int) -> int | None:
        if 2 * reserved <= self._budget:
            return work.advance()
        self._release()  # freed memory that is kept, by the other thread too, would add to it
        try:
            return work.advance()
        finally:
            self._release()

    def _return_to_budget(self, reserved: int) -> None:
        self._free += reserved
        self._freed.set()

    def close(self) -> None:
        """Stop after the steps that have started."""
        self._executor.shutdown(wait=False, cancel_futures=True)


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
