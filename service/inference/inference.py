"""Runs the models: one thread for networks, three for decoding, one for loading new versions."""

import re
import threading
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Hashable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dropserve.models.device import find_device, gpu_failure
from dropserve.models.memory import keep_freed_memory, release_freed_memory
from dropserve.service.errors import Overloaded, stopping
from dropserve.service.inference.batcher import (
    SURE,
    Batcher,
    Entry,
    QueueFull,
    QueueTimeout,
    WaitTooLong,
)
from dropserve.service.inference.classifier import (
    Answer,
    Classifier,
    Compare,
    Predict,
    Stream,
    Task,
    Uncertainty,
)
from dropserve.service.inference.decoder import BYTES_PER_PIXEL, Decoder, Pixels, Steps
from dropserve.service.inference.model_store import CheckpointSource, ModelStore
from dropserve.service.inference.wait_limit import WaitLimit
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
_QUEUE_FULL = "too many images are waiting"
_TOO_LATE = "the request waited for longer than it may"
_STALLED = 0.5, 10
"""A step is stalled after so many seconds and so many times what such steps take,"""
_STALLED_UNKNOWN = 30.0
"""or after so many seconds, or half of the watchdog's limit, if none has ended yet."""
_NO_MEMORY = re.compile("DefaultCPUAllocator|out of memory|bad_alloc|create a primitive")
"""In messages of PyTorch's RuntimeError."""
_SEEDS = 4
"""Seeds that run together: a quarter less work an image than alone, and hardly less with more."""


class Inference:
    """The models, the batcher and their threads.

    `source` is the seam for tests, `control` is shared with other workers, and `check` is whether
    a start that serves no model is an error (see `ModelStore`).

    Raises:
        ModelStoreError: no model can be served, or there is no such default.
        ConfigError: there is no such device.

    Attributes:
        store: the models.
        metrics: counts batches and answers, if set.
        tracing: makes spans of a request's stages, if set.
    """

    def __init__(
        self,
        settings: Settings,
        source: CheckpointSource | None = None,
        control: ControlState | None = None,
        *,
        check: bool = True,
    ) -> None:
        keep_freed_memory()
        self._settings = settings
        self._set_threads = partial(torch.set_num_threads, settings.threads)
        self._worker = ThreadPoolExecutor(1, "inference", self._set_threads)
        self._thread = self._worker.submit(threading.current_thread).result()
        self._loader = ThreadPoolExecutor(1, "loading", self._set_threads)
        self._decoder = Decoder(2, settings.max_pixels * BYTES_PER_PIXEL, release_freed_memory)
        self._decoding = 0
        self._streams = 0
        self._closed = False
        self._gpu_failure: str | None = None
        self.metrics: Metrics | None = None
        self.tracing: Tracing | None = None
        self._batcher: Batcher[Key, Request, Answer] = Batcher(
            self._run,
            self._worker,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            classify=_classify,
            fits=_fits,
            inline=_is_inline,
            observe=self._observe,
        )
        self.store = ModelStore(settings, self._loader, source, control, check=check)

    def adopt_this_thread(self) -> None:
        """Set up the thread of the event loop, on which inline batches run."""
        self._set_threads()

    @property
    def queued(self) -> int:
        """Images that wait."""
        return self._batcher.queued

    def expected_wait(self, *, urgent: bool) -> float:
        """Estimate the seconds that a request would wait; `urgent` ones are predictions."""
        return self._batcher.expected_wait(urgent=urgent)

    def check_wait(self, seconds: float, *, urgent: bool) -> None:
        """Raise Overloaded if a request would wait for longer than so many seconds, or has no room.

        It is cheap, so that a request can be refused before it is read.
        """
        if seconds <= 0:
            raise Overloaded(_TOO_LATE, "timeout")
        expected = self._batcher.expected_wait(urgent=urgent)
        if expected > SURE * seconds:
            raise _too_long(expected)
        if self.queued >= self._settings.max_queue:
            raise Overloaded(_QUEUE_FULL, "queue", expected)

    def stalled(self) -> str | None:
        """Say what is wrong: the inference thread is dead or does not go on, or the GPU failed."""
        if self._gpu_failure is not None:
            return f"the GPU has failed: {self._gpu_failure}"
        if not self._thread.is_alive():
            return None if self._closed else "the inference thread is dead"
        seconds, expected = self._batcher.step_under_way
        if expected is None:
            most = self._settings.watchdog / 2 or _STALLED_UNKNOWN
        else:
            most = _STALLED[0] + _STALLED[1] * expected
        return f"the network has run for {seconds:.1f} seconds" if seconds > most else None

    async def decode(self, steps: Steps[Result], limit: WaitLimit | None = None) -> Result:
        """Run decoding off the event loop; steps that have not started when cancelled are dropped.

        Raises:
            Overloaded: as many requests as the queue holds images wait to be decoded, the time
                that this one may wait is over, or the threads are stopped.
        """
        if self._decoding >= self._settings.max_queue:
            raise Overloaded(_QUEUE_FULL, "decode")
        self._decoding += 1
        try:
            with (
                self.tracing.span("decode") if self.tracing is not None else nullcontext(),
                self._overloaded(),
            ):
                limit = limit or WaitLimit(self._settings.max_wait)
                async with limit.enforced():
                    return await self._decoder.run(limit.timed(steps))
        finally:
            self._decoding -= 1

    async def run(
        self,
        classifier: Classifier,
        task: Task,
        pixels: Pixels | Read,
        images: int,
        limit: WaitLimit | None = None,
    ) -> Answer:
        """Answer one request, batched with others of the same task that wait.

        A prediction goes before other tasks: it waits for one step of theirs at most. `pixels` are
        uint8 [B, C, H, W] of B `images`, or a function that decodes small ones: decoded one after
        another they take half as long as with other code in between. `limit` is how long it may
        wait; None: as long as the setting says.

        Raises:
            Overloaded: the queue is full, the wait would be longer than its limit, or was.
            RequestError: the images could not be decoded.
        """
        key, urgent = _key(classifier, task), isinstance(task, Predict)

        def submit(pixels: Pixels | Read) -> Awaitable[Answer]:
            request = (task, pixels)
            left = self._require_time(limit)
            return self._batcher.submit(key, request, images, urgent=urgent, max_wait=left)

        with self._overloaded():
            return await (self.tracing.staged(submit) if self.tracing else submit)(pixels)

    def queue(self, classifier: Classifier, task: Task, pixels: Read) -> Waiting:
        """Do as `run` for one image, without waiting; whoever stops waiting must `cancel`.

        Raises:
            QueueFull: it would not fit, or wait for too long.
        """
        key, urgent = _key(classifier, task), isinstance(task, Predict)
        wait = self._settings.max_wait
        return self._batcher.queue(key, (task, pixels), urgent=urgent, max_wait=wait)

    def cancel(self, waiting: Waiting) -> None:
        """Give up what `queue` queued."""
        self._batcher.cancel(waiting)

    async def stream(
        self,
        classifier: Classifier,
        task: Stream,
        pixels: Pixels | Read,
        limit: WaitLimit | None = None,
    ) -> AsyncGenerator[Answer, None]:
        """Answer one request of one image in steps, as `Classifier.stream` does.

        A step is computed when it is asked for: a slow reader holds one step and no thread, and
        nothing is computed for a client that has left.

        Raises:
            Overloaded: the queue is full, the wait would be longer than its limit or was, or there
                are too many streams; none interrupts a stream that has started.
            RequestError: the image could not be decoded.
        """
        if self._streams >= MAX_STREAMS:
            raise Overloaded("too many images are streamed", "streams")
        self._streams += 1
        steps = _steps(classifier, task, pixels)
        del pixels
        key = classifier, task, steps
        weight, wait = 1, self._require_time(limit)
        try:
            with self._overloaded():
                while step := await self._batcher.submit(key, (task, None), weight, max_wait=wait):
                    yield step
                    weight, wait = 0, 0.0
        finally:
            self._streams -= 1

    def close(self) -> None:
        """Stop the threads after their current work; what waits is cancelled."""
        self._closed = True
        self._batcher.close()
        self.store.close()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _overloaded(self) -> Iterator[None]:
        """Raise Overloaded where the batcher raises its own errors, or the threads are stopped."""
        try:
            yield
        except WaitTooLong as error:
            raise _too_long(error.seconds) from error
        except QueueFull as error:
            raise Overloaded(_QUEUE_FULL, "queue", self.expected_wait(urgent=False)) from error
        except QueueTimeout as error:
            raise Overloaded(_TOO_LATE, "timeout", self.expected_wait(urgent=False)) from error
        except RuntimeError as error:
            if not self._closed:
                raise
            raise stopping() from error

    def _require_time(self, limit: WaitLimit | None) -> float:
        """Return the seconds that are left, or may be; raise Overloaded if none are."""
        left = self._settings.max_wait if limit is None else limit.left
        if left <= 0:
            raise Overloaded(_TOO_LATE, "timeout", self.expected_wait(urgent=False))
        return left

    def _observe(self, key: Key, images: int, waits: Sequence[float]) -> None:
        if self.metrics is not None and images:
            self.metrics.record_batch(type(key[1]).__name__.lower(), images, waits)

    def _run(
        self, key: Key, requests: Sequence[Request | None]
    ) -> Generator[None, None, list[Answer | Exception]]:
        classifier, task, steps = key
        try:
            with _memory_errors():
                if steps is None:
                    complete = answers = yield from _answers(classifier, requests)
                else:
                    answers = [step := next(steps, {})]
                    complete = [*step.get("end", ())]
        except RuntimeError:
            self._gpu_failure = gpu_failure()
            raise
        if self.metrics is not None and complete:
            self.metrics.record_answers(classifier.name, task, complete)
        return answers


def only_to_check(settings: Settings) -> Settings:
    """Return the settings of a process that loads the models and serves none, as workers will.

    It must not take memory of a GPU. Raises ConfigError if there is no such device.
    """
    find_device(settings.device)
    return settings.model_copy(update={"device": "cpu"})


def _too_long(seconds: float) -> Overloaded:
    return Overloaded("the request would wait for too long", "wait", seconds)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise MemoryError where PyTorch raises an error of its own for it, of a GPU's memory too."""
    try:
        yield
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        clear_frames(error.__traceback__)  # they hold the tensors
        torch.cuda.empty_cache()  # it gives back what is free now; without a GPU it does nothing
    else:
        return
    raise MemoryError


def _key(classifier: Classifier, task: Task) -> Key:
    """Return what runs together: equal tasks, and those that differ in their seed alone.

    The default seed, whose masks are drawn already, is kept apart.
    """
    if type(task) is Uncertainty and task.seed:
        task = replace(task, seed=-1)
    return classifier, task, None


def _classify(key: Key) -> tuple[Hashable, int]:
    """Name what costs alike, by name and version: a model that is unloaded is not kept for it.

    And say how many passes an image takes: more of them cost in proportion, nearly.
    """
    classifier, task, steps = key
    name, version, kind = classifier.name, classifier.version, type(task)
    if isinstance(task, Predict) or steps is not None:
        return (name, version, kind), 1
    if isinstance(task, Compare):
        return (name, version, kind, task.passes.bit_length()), task.passes
    samples = task.samples
    return (name, version, kind, samples.bit_length(), task.masks, task.include_samples), samples


def _fits(_key: Key) -> Callable[[Request], bool]:
    """Make what says, request by request, if one fits into a batch: more seeds share no work."""
    seeds: set[int] = set()

    def fits(request: Request) -> bool:
        seeds.add(_seed(request))
        return len(seeds) <= _SEEDS

    return fits


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
    answers: list[Any] = [request and _decoded(request[1]) for request in requests]
    runs = [
        (_seed(request), number, request[0])
        for number, request in enumerate(requests)
        if request is not None and not isinstance(answers[number], Exception)
    ]
    runs.sort(key=itemgetter(0))  # images of one seed side by side
    if runs:
        images = [answers[number] for _, number, _ in runs]
        each = [seed for seed, number, _ in runs for _ in answers[number]]
        seeds = each if runs[0][0] != runs[-1][0] else []
        found = yield from classifier.run(runs[0][2], images, seeds)
        for (_, number, _), answer in zip(runs, found, strict=True):
            answers[number] = answer
    return answers


def _seed(request: Request) -> int:
    return getattr(request[0], "seed", 0)


def _decoded(pixels: Pixels | Read | None) -> Pixels | Exception | None:
    try:
        return pixels() if callable(pixels) else pixels
    except Exception as error:
        return error
