"""Owns the models, the one thread that runs them and the one that loads new ones."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from dropserve.models import catalogue
from dropserve.models.memory import keep_freed_memory, release_freed_memory
from dropserve.service.errors import Overloaded
from dropserve.service.http.decoding import Decoder, Pixels, Steps
from dropserve.service.http.images import memory_of
from dropserve.service.inference.batcher import Batcher, Place, QueueFull, QueueTimeout
from dropserve.service.inference.classifier import Answer, Classifier
from dropserve.service.inference.reload import Folder
from dropserve.service.inference.repository import Repository
from dropserve.service.inference.tasks import Predict, Stream, Task
from dropserve.service.inference.workers import ControlState
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.observability.metrics import Metrics
    from dropserve.service.observability.tracing import Tracing

Result = TypeVar("Result")
Read = Callable[[], Pixels]
"""Decodes and prepares a request's pictures."""
Answers = Iterator[Answer]
"""Of a request that is answered in steps: those that have not been sent yet."""
Key = tuple[Classifier, Task, Answers | None]
"""What runs together; who is answered in steps runs alone."""
Waiting = Place[Key, Pixels | Read | None, Answer]
"""A request in the queue."""
MAX_STREAMS = 64
"""Most requests that are answered in steps at once: each is remembered until its last."""
_log = logging.getLogger("dropserve.versions")
_FULL = "too many images are waiting; try again in a second"


def checkpoints(settings: Settings) -> Folder[Classifier]:
    """Return where versions come from: the checkpoints folder."""
    root = settings.checkpoints

    def load(name: str, version: int) -> Classifier:
        path = root / name / str(version)
        return Classifier(name, version, path, settings.factories, settings.precision)

    def find() -> dict[str, list[int]]:
        found = {}
        for name in catalogue.names(root):
            try:
                found[name] = catalogue.versions(root, name)
            except OSError as error:
                _log.warning(f"a model cannot be looked at: {error}")
        return found

    return Folder(
        find=find,
        mark=lambda name, version: catalogue.mark(root / name / str(version)),
        load=load,
        pinned=lambda name: catalogue.pinned(root, name),
    )


class Inference:
    """Runs tasks on one worker thread; versions are made ready on another, before they serve.

    Args:
        settings: threads, batch and queue sizes, where checkpoints are.
        folder: where versions come from; the seam for tests.
        board: shared with other workers, if there are any.
        check: whether a start that serves no model is an error, see `Repository`.

    Raises:
        RegistryError: no model can be served, or there is no such default.

    Attributes:
        repository: the models, and how they come and go.
        registry: the same, to look them up.
        metrics: told of batches and answers, if there are any.
        tracing: told of a request's stages, if it is on.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Folder[Classifier] | None = None,
        board: ControlState | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._settings = settings
        self._set_threads = set_threads = partial(torch.set_num_threads, settings.threads)
        self._worker = ThreadPoolExecutor(1, "inference", set_threads)
        self._loader = ThreadPoolExecutor(1, "loading", set_threads)
        self._decoder = Decoder(2, memory_of((settings.max_pixels, 1)), release_freed_memory)
        self._decoding = 0
        self._streams = 0
        self.metrics: Metrics | None = None
        self.tracing: Tracing | None = None
        self._batcher: Batcher[Key, Pixels | Read | None, Answer] = Batcher(
            self._run,
            self._worker,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            inline=_is_inline,
            observe=self._observe,
        )
        keep_freed_memory()
        found = folder or checkpoints(settings)
        self.repository = Repository(settings, found, self._loader, board, check=check)
        self.registry = self.repository.registry

    def adopt_this_thread(self) -> None:
        """Set up the thread of the event loop, on which inline batches run."""
        self._set_threads()

    @property
    def store(self) -> Repository[Classifier]:
        """The models."""
        return self.repository

    @property
    def queued(self) -> int:
        """Images that wait."""
        return self._batcher.queued

    def _observe(self, key: Key, images: int, waits: Sequence[float]) -> None:
        if self.metrics is not None and images:
            self.metrics.batch(type(key[1]).__name__.lower(), images, waits)

    def _run(
        self, key: Key, requests: Sequence[Pixels | Read | None]
    ) -> Generator[None, None, list[Answer | Exception]]:
        classifier, task, steps = key
        if steps is None:
            whole = answers = yield from _answers(classifier, task, requests)
        else:
            answers = [step := next(steps, {})]
            whole = [*step.get("end", ())]
        if self.metrics is not None and whole:
            self.metrics.answered(classifier.name, task, whole)
        return answers

    async def decode(self, steps: Steps[Result]) -> Result:
        """Run decoding off the event loop; what has not begun when it is cancelled is let go of.

        Raises:
            Overloaded: as many requests as the queue holds images wait to be decoded.
        """
        if self._decoding >= self._settings.max_queue:
            raise Overloaded(
                "too many pictures are waiting; try again in a second", reason="decode"
            )
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
        """Answer one request, together with others of the same task that wait.

        A prediction goes before other tasks: it waits for one step of theirs at most.

        Args:
            classifier: from the registry.
            task: what to do.
            pixels: uint8 [B, C, H, W], or what reads them in no time: pictures that are decoded
                one after another take half as long as those between which other code runs.
            images: B.
            max_wait: seconds to wait in the queue at most; 0: no limit.

        Raises:
            Overloaded: the queue is full, or the time is over before the run has begun.
            RequestError: they could not be read.
        """
        submit: Callable[..., Awaitable[Answer]] = self._batcher.submit
        if self.tracing is not None:
            submit = self.tracing.staged(submit)
        try:
            return await submit(
                (classifier, task, None),
                pixels,
                images,
                urgent=isinstance(task, Predict),
                max_wait=max_wait,
            )
        except QueueFull as error:
            raise Overloaded(_FULL) from error
        except QueueTimeout as error:
            raise Overloaded(
                "the request waited in the queue for longer than its timeout"
            ) from error

    def queue(self, classifier: Classifier, task: Task, pixels: Read) -> Waiting:
        """Do as `run` does for one picture, and wait for nothing; who gives up must `leave`.

        Raises:
            Overloaded: the queue is full.
        """
        try:
            return self._batcher.queue(
                (classifier, task, None), pixels, urgent=isinstance(task, Predict)
            )
        except QueueFull as error:
            raise Overloaded(_FULL) from error

    def leave(self, waiting: Waiting) -> None:
        """Give up what `queue` queued."""
        self._batcher.leave(waiting)

    async def stream(
        self, classifier: Classifier, task: Stream, pixels: Pixels | Read
    ) -> AsyncGenerator[Answer, None]:
        """Answer one request in steps, as `Classifier.watch` does, each waiting for its turn.

        A step is made when it is asked for: who reads slowly holds one step and no thread, and
        nothing is computed for who has left.

        Args:
            classifier: from the registry.
            task: what to do.
            pixels: of one image, as for `run`; let go of once the first step is made.

        Raises:
            Overloaded: the queue is full, or many are answered in this way; neither holds up who
                has begun.
            RequestError: the picture could not be read.
        """
        if self._streams >= MAX_STREAMS:
            raise Overloaded(
                "too many pictures are watched; try again in a second", reason="streams"
            )
        self._streams += 1
        steps = _steps(classifier, task, pixels)
        del pixels
        place = 1
        try:
            while step := await self._batcher.submit((classifier, task, steps), None, place):
                yield step
                place = 0
        except QueueFull as error:
            raise Overloaded(_FULL) from error
        finally:
            self._streams -= 1

    def close(self) -> None:
        """Stop the threads when what they are at is done; what waits is dropped."""
        self._batcher.close()
        self.repository.close()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self._loader.shutdown(wait=False, cancel_futures=True)


def _is_inline(key: Key, images: int) -> bool:
    """Say if a batch may hold up the event loop; steps of streams, which weigh nothing, may not."""
    classifier, task, _ = key
    return 0 < images <= classifier.inline.get(task, 0)


def _steps(classifier: Classifier, task: Stream, pixels: Pixels | Read) -> Answers:
    if callable(pixels):
        pixels = pixels()  # in its place: with it goes the request's body
    yield from classifier.stream(task, pixels)


def _answers(
    classifier: Classifier, task: Task, requests: Sequence[Pixels | Read | None]
) -> Generator[None, None, list[Answer | Exception]]:
    """Read what is left to be read, and answer all that could be."""
    read = [_read(request) if callable(request) else request for request in requests]
    sound = [pixels for pixels in read if isinstance(pixels, np.ndarray)]
    answers: list[Answer] = (yield from classifier.run(task, sound)) if sound else []
    rest = iter(answers)
    return [found if isinstance(found, Exception) else next(rest) for found in read]


def _read(read: Read) -> Pixels | Exception:
    try:
        return read()
    except Exception as error:
        return error
