"""How long one request may wait for its turn."""

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TypeVar

from dropserve.service.inference.batcher import QueueTimeout

Step = TypeVar("Step")
Result = TypeVar("Result")
_CHECK = 0.02
"""Fewest seconds between two checks."""


class WaitLimit:
    """The seconds that a request may still wait, from now on; its own work does not count."""

    __slots__ = ("_state",)

    def __init__(self, seconds: float) -> None:
        # seconds that were left at a time, or are while it works; replaced as one, for two threads
        self._state: tuple[float, float | None] = seconds, perf_counter()

    @property
    def left(self) -> float:
        """Seconds that are left; not above 0: the time is over."""
        left, since = self._state
        return left if since is None else left - (perf_counter() - since)

    def lower(self, seconds: float) -> None:
        """Wait for no more than so many seconds from now on."""
        self._state = min(self.left, seconds), perf_counter()

    def timed(self, steps: Generator[Step, None, Result]) -> Generator[Step, None, Result]:
        """Do the steps of some work, on any thread: the time in between counts, theirs does not."""
        while True:
            self._state = self.left, None
            try:
                step = next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result
            finally:
                self._state = self._state[0], perf_counter()
            yield step

    @asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """End the block with QueueTimeout once the time is over, but not while work is done."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def check() -> None:
            nonlocal timer
            if (left := self.left) <= 0 and self._state[1] is not None:
                timeout.reschedule(0)  # a moment that is over: it ends the block now
            else:
                timer = loop.call_later(max(left, _CHECK), check)

        timer = loop.call_later(max(self.left, 0), check)
        try:
            async with asyncio.timeout(None) as timeout:
                yield
        except TimeoutError:
            if timeout.expired():
                raise QueueTimeout from None
            raise
        finally:
            timer.cancel()
