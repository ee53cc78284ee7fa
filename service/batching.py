"""A micro-batcher: what arrives while a batch runs makes up the next one.

It knows neither torch nor HTTP. Items of one key run together; keys take turns, a batch each,
in the order of their first item, so that a key with many items holds up no other for longer than a
batch. (A sender of many keys has as many turns.) Nothing waits while the worker is idle.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

Run = Callable[[Key, Sequence[Item]], Sequence[Result]]


class QueueFull(Exception):
    """More would wait than the queue holds."""


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    weight: int
    future: asyncio.Future[Result]


class Batcher(Generic[Key, Item, Result]):
    """Runs items in batches on an executor, one batch at a time.

    Args:
        run: `(key, items) -> results`, one each, in order; called on the executor.
        executor: where it runs.
        max_batch: most weight in one batch; an item heavier than that runs alone.
        max_queue: most weight waiting; `submit` raises beyond it.
    """

    def __init__(
        self,
        run: Run[Key, Item, Result],
        executor: Executor,
        *,
        max_batch: int,
        max_queue: int,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._queues: OrderedDict[Key, deque[_Waiting[Item, Result]]] = OrderedDict()
        self._queued = 0
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, key: Key, item: Item, weight: int = 1) -> Result:
        """Queue an item and wait for its result; cancelling the wait takes it out of the queue.

        Raises:
            QueueFull: at once, if it would not fit.
            Exception: what `run` raised for this item.
        """
        if self._queued and self._queued + weight > self._max_queue:
            raise QueueFull
        waiting = _Waiting[Item, Result](item, weight, asyncio.get_running_loop().create_future())
        self._queues.setdefault(key, deque()).append(waiting)
        self._queued += weight
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await waiting.future
        finally:
            if waiting.future.cancelled():
                self._forget(key, waiting)

    async def _work(self) -> None:
        """Run batches until nothing waits."""
        while self._queues:
            key, batch = self._next_batch()
            if batch:
                await self._run_batch(key, batch)

    def _next_batch(self) -> tuple[Key, list[_Waiting[Item, Result]]]:
        """Take from the key whose turn it is as much as fits; a key with more goes to the back."""
        key, queue = self._queues.popitem(last=False)
        batch: list[_Waiting[Item, Result]] = []
        weight = 0
        while queue and (not batch or weight + queue[0].weight <= self._max_batch):
            waiting = queue.popleft()
            self._queued -= waiting.weight
            if not waiting.future.done():
                batch.append(waiting)
                weight += waiting.weight
        if queue:
            self._queues[key] = queue
        return key, batch

    async def _run_batch(self, key: Key, batch: list[_Waiting[Item, Result]]) -> None:
        """Run a batch; if it fails, run its items one by one, so that only the bad ones fail."""
        try:
            results = await self._execute(key, [waiting.item for waiting in batch])
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0].future, error)
                return
            for waiting in batch:
                if not waiting.future.done():
                    await self._run_batch(key, [waiting])
            return
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(result)

    async def _execute(self, key: Key, items: Sequence[Item]) -> Sequence[Result]:
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._executor, self._call, key, items)
        if len(results) != len(items):
            raise RuntimeError(f"{len(items)} items in, {len(results)} results out")
        return results

    def _call(self, key: Key, items: Sequence[Item]) -> Sequence[Result]:
        try:
            return self._run(key, items)
        except StopIteration as error:  # a future cannot carry it: whoever awaits would hang
            raise RuntimeError("run raised StopIteration") from error

    def _forget(self, key: Key, waiting: _Waiting[Item, Result]) -> None:
        """Give back the place of an item that nobody waits for any more."""
        queue = self._queues.get(key)
        if queue is None or waiting not in queue:
            return
        queue.remove(waiting)
        self._queued -= waiting.weight
        if not queue:
            del self._queues[key]


def _settle(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
