"""Runs the models: one thread for networks, two for decoding, one for loading new versions."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dropserve.models.memory import keep_freed_memory, release_freed_memory
from dropserve.service.errors import Overloaded
from dropserve.service.inference.batcher import Batcher, Entry, QueueFull, QueueTimeout
from dropserve.service.inference.classifier import (
    Answer,
    Classifier,
    Predict,
    Stream,
    Task,
    Uncertainty,
)
from dropserve.service.inference.decoder import BYTES_PER_PIXEL, Decoder, Pixels, Steps
from dropserve.service.inference.model_store import CheckpointFolder, ModelStore
from dropserve.service.inference.workers import ControlState
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.observability.metrics import Metrics
    from dropserve.service.observability.tracing import Tracing

Result = TypeVar("Result")
Read = Callable[[], Pixels]
"""Decodes and prepares a request's images."""
Answers = Iterator[Answer]
"""The answers that a stream has not sent yet."""
Key = tuple[Classifier, Task, Answers | None]
"""What runs together, see `_key`; a stream runs alone."""
Request = tuple[Task, Pixels | Read | None]
Waiting = Entry[Key, Request, Answer]
MAX_STREAMS = 64
"""Most streams at once: each is remembered until its last answer."""
_QUEUE_FULL = "too many images are waiting; try again in a second"
_SEEDS = 4
"""Seeds that run together: a quarter less work an image than alone, and hardly less with more."""


class Inference:
    """The models, the batcher and their threads.

    `folder` is the seam for tests, `control` is shared with other workers, and `check` is whether
    a start that serves no model is an error (see `ModelStore`).

    Raises:
        ModelStoreError: no model can be served, or there is no such default.

    Attributes:
        store: the models.
        metrics: counts batches and answers, if set.
        tracing: makes spans of a request's stages, if set.
    """

    def __init__(
        self,
        settings: Settings,
        folder: CheckpointFolder | None = None,
        control: ControlState | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._settings = settings
        self._set_threads = partial(torch.set_num_threads, settings.threads)
        self._worker = ThreadPoolExecutor(1, "inference", self._set_threads)
        self._loader = ThreadPoolExecutor(1, "loading", self._set_threads)
        self._decoder = Decoder(2, settings.max_pixels * BYTES_PER_PIXEL, release_freed_memory)
        self._decoding = 0
        self._streams = 0
        self.metrics: Metrics | None = None
        self.tracing: Tracing | None = None
        self._batcher: Batcher[Key, Request, Answer] = Batcher(
            self._run,
            self._worker,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            inline=_is_inline,
            observe=self._observe,
        )
        keep_freed_memory()
        self.store = ModelStore(settings, self._loader, folder, control, check=check)

    def adopt_this_thread(self) -> None:
        """Set up the thread of the event loop, on which inline batches run."""
        self._set_threads()

    @property
    def queued(self) -> int:
        """Images that wait."""
        return self._batcher.queued

    async def decode(self, steps: Steps[Result]) -> Result:
        """Run decoding off the event loop; steps that have not started when cancelled are dropped.

        Raises:
            Overloaded: as many requests as the queue holds images wait to be decoded.
        """
        if self._decoding >= self._settings.max_queue:
            raise Overloaded(_QUEUE_FULL, "decode")
        self._decoding += 1
        try:
            with self.tracing.span("decode") if self.tracing is not None else nullcontext():
                return await self._decoder.run(steps)
        finally:
            self._decoding -= 1

    async def run(
        self,
        classifier: Classifier,
        task: Task,
        pixels: Pixels | Read,
        images: int,
        max_wait: float = 0.0,
    ) -> Answer:
        """Answer one request, batched with others of the same task that wait.

        A prediction goes before other tasks: it waits for one step of theirs at most. `pixels` are
        uint8 [B, C, H, W] of B `images`, or a function that decodes small ones: decoded one after
        another they take half as long as with other code in between. `max_wait` is in seconds in
        the queue; 0: no limit.

        Raises:
            Overloaded: the queue is full, or the time is over before the run has started.
            RequestError: the images could not be decoded.
        """
        key, urgent = _key(classifier, task), isinstance(task, Predict)

        def submit(pixels: Pixels | Read) -> Awaitable[Answer]:
            request = (task, pixels)
            return self._batcher.submit(key, request, images, urgent=urgent, max_wait=max_wait)

        with _overloaded():
            return await (self.tracing.staged(submit) if self.tracing else submit)(pixels)

    def queue(self, classifier: Classifier, task: Task, pixels: Read) -> Waiting:
        """Do as `run` for one image, without waiting; whoever stops waiting must `cancel`.

        Raises:
            QueueFull: it would not fit.
        """
        key, urgent = _key(classifier, task), isinstance(task, Predict)
        return self._batcher.queue(key, (task, pixels), urgent=urgent)

    def cancel(self, waiting: Waiting) -> None:
        """Give up what `queue` queued."""
        self._batcher.cancel(waiting)

    async def stream(
        self, classifier: Classifier, task: Stream, pixels: Pixels | Read
    ) -> AsyncGenerator[Answer, None]:
        """Answer one request of one image in steps, as `Classifier.stream` does.

        A step is computed when it is asked for: a slow reader holds one step and no thread, and
        nothing is computed for a client that has left.

        Raises:
            Overloaded: the queue is full, or there are too many streams; neither interrupts a
                stream that has started.
            RequestError: the image could not be decoded.
        """
        if self._streams >= MAX_STREAMS:
            raise Overloaded("too many images are streamed; try again in a second", "streams")
        self._streams += 1
        steps = _steps(classifier, task, pixels)
        del pixels
        weight = 1
        key = classifier, task, steps
        try:
            with _overloaded():
                while step := await self._batcher.submit(key, (task, None), weight):
                    yield step
                    weight = 0
        finally:
            self._streams -= 1

    def close(self) -> None:
        """Stop the threads after their current work; what waits is dropped."""
        self._batcher.close()
        self.store.close()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _observe(self, key: Key, images: int, waits: Sequence[float]) -> None:
        if self.metrics is not None and images:
            self.metrics.record_batch(type(key[1]).__name__.lower(), images, waits)

    def _run(
        self, key: Key, requests: Sequence[Request | None]
    ) -> Generator[None, None, list[Answer | Exception]]:
        classifier, task, steps = key
        if steps is None:
            complete = answers = yield from _answers(classifier, requests)
        else:
            answers = [step := next(steps, {})]
            complete = [*step.get("end", ())]
        if self.metrics is not None and complete:
            self.metrics.record_answers(classifier.name, task, complete)
        return answers


@contextmanager
def _overloaded() -> Iterator[None]:
    """Raise Overloaded where the batcher raises its own errors."""
    try:
        yield
    except QueueFull as error:
        raise Overloaded(_QUEUE_FULL, "queue") from error
    except QueueTimeout as error:
        detail = "the request waited in the queue for longer than its timeout"
        raise Overloaded(detail, "timeout") from error


def _key(classifier: Classifier, task: Task) -> Key:
    """Return what runs together: equal tasks, and those that differ in their seed alone.

    The default seed, whose masks are drawn already, is kept apart.
    """
    if type(task) is Uncertainty and task.seed:
        task = replace(task, seed=-1)
    return classifier, task, None


def _is_inline(key: Key, images: int) -> bool:
    """Say if a batch may block the event loop; steps of streams, which weigh nothing, may not."""
    classifier, task, _ = key
    return images > 0 and classifier.is_inline(task, images)


def _steps(classifier: Classifier, task: Stream, pixels: Pixels | Read) -> Answers:
    if callable(pixels):
        pixels = pixels()  # rebound: the request's body is freed with the function
    yield from classifier.stream(task, pixels)


def _answers(
    classifier: Classifier, requests: Sequence[Request | None]
) -> Generator[None, None, list[Answer | Exception]]:
    """Decode what is left to be decoded, and run tasks that differ in their seed at most.

    A request whose client has left is None from then on, and is not run.
    """
    tasks: list[Any] = [request and request[0] for request in requests]
    answers: list[Any] = [request and _decoded(request[1]) for request in requests]
    seeds: dict[int, list[int]] = {}
    for number, task in enumerate(tasks):
        if not isinstance(answers[number], Exception):
            seeds.setdefault(getattr(task, "seed", 0), []).append(number)
    while seeds := {s: g for s, g in seeds.items() if any(requests[n] for n in g)}:
        some = [seeds.popitem() for _ in range(min(_SEEDS, len(seeds)))]
        numbers = [n for _, group in some for n in group if requests[n]]
        each = [tasks[n].seed for n in numbers for _ in answers[n]] if some[1:] else []
        task, pixels = tasks[numbers[0]], [answers[n] for n in numbers]
        found = yield from classifier.run(task, pixels, each)
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
        if seeds:
            yield
    return answers


def _decoded(pixels: Pixels | Read | None) -> Pixels | Exception | None:
    try:
        return pixels() if callable(pixels) else pixels
    except Exception as error:
        return error
