"""Owns the models and the one thread that runs them."""

import asyncio
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from models import catalogue
from models.memory import keep_freed_memory
from service.batching import Batcher, QueueFull
from service.classifier import Answer, Classifier, Pixels, Predict, Task
from service.errors import Overloaded
from service.registry import Registry
from service.settings import Settings


def load_all(settings: Settings) -> Registry[Classifier]:
    """Load every version of every model under the checkpoints folder.

    Raises:
        CheckpointError, UnsupportedModule: one of them cannot be served.
        RegistryError: there is none, or the default is not among them.
    """
    root = settings.checkpoints

    def classifier(name: str, version: int) -> Classifier:
        path = root / name / str(version)
        return Classifier(name, version, path, settings.factories, settings.precision)

    models = {
        name: {version: classifier(name, version) for version in versions}
        for name, versions in catalogue.find(root).items()
    }
    return Registry(models, settings.default_model, where=str(root))


Read = Callable[[], Pixels]
"""Decodes and prepares a request's pictures."""


class Inference:
    """Runs tasks on one worker thread, which alone touches the modules once they are loaded.

    Args:
        settings: threads, batch and queue sizes, where checkpoints are.
        load: makes the registry; the seam for tests.
    """

    def __init__(
        self, settings: Settings, load: Callable[[Settings], Registry[Classifier]] = load_all
    ) -> None:
        self._settings = settings
        self._worker = ThreadPoolExecutor(1, "inference")
        self._decoders = ThreadPoolExecutor(2, "decoding")
        self._decoding = 0
        self._batcher: Batcher[tuple[Classifier, Task], Pixels | Read, Answer] = Batcher(
            _answers,
            self._worker,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
        )
        self.registry = self._worker.submit(self._load, load).result()

    def _load(self, load: Callable[[Settings], Registry[Classifier]]) -> Registry[Classifier]:
        keep_freed_memory()
        torch.set_num_threads(self._settings.threads)
        return load(self._settings)

    async def decode(self, work: Callable[[], Pixels]) -> Pixels:
        """Run decoding off the event loop.

        Raises:
            Overloaded: as many requests as the queue holds images wait to be decoded.
        """
        if self._decoding >= self._settings.max_queue:
            raise Overloaded("too many pictures are waiting; try again in a second")
        self._decoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, work)
        finally:
            self._decoding -= 1

    async def run(
        self, classifier: Classifier, task: Task, pixels: Pixels | Read, images: int
    ) -> Answer:
        """Answer one request, together with others of the same task that wait.

        A prediction goes before other tasks: it waits for one step of theirs at most.

        Args:
            classifier: from the registry.
            task: what to do.
            pixels: uint8 [B, C, H, W], or what reads them in no time: pictures that are decoded
                one after another take half as long as those between which other code runs.
            images: B.

        Raises:
            Overloaded: the queue is full.
            RequestError: they could not be read.
        """
        try:
            return await self._batcher.submit(
                (classifier, task), pixels, images, urgent=isinstance(task, Predict)
            )
        except QueueFull as error:
            raise Overloaded("too many images are waiting; try again in a second") from error

    def close(self) -> None:
        """Stop the threads when what they are at is done; what waits is dropped."""
        self._batcher.close()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)


def _answers(
    key: tuple[Classifier, Task], requests: Sequence[Pixels | Read]
) -> Generator[None, None, list[Answer | Exception]]:
    """Read what is left to be read, and answer all that could be."""
    classifier, task = key
    read = [_read(request) if callable(request) else request for request in requests]
    sound = [pixels for pixels in read if not isinstance(pixels, Exception)]
    answers: list[Answer] = (yield from classifier.run(task, sound)) if sound else []
    rest = iter(answers)
    return [found if isinstance(found, Exception) else next(rest) for found in read]


def _read(read: Read) -> Pixels | Exception:
    try:
        return read()
    except Exception as error:
        return error
