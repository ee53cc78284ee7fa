"""Owns the models and the one thread that runs them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from models import catalogue
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
        self._batcher: Batcher[tuple[Classifier, Task], Pixels, Answer] = Batcher(
            lambda key, requests: key[0].run(key[1], requests),
            self._worker,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
        )
        self.registry = self._worker.submit(self._load, load).result()

    def _load(self, load: Callable[[Settings], Registry[Classifier]]) -> Registry[Classifier]:
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

    async def run(self, classifier: Classifier, task: Task, pixels: Pixels) -> Answer:
        """Answer one request, together with others of the same task that wait.

        A prediction goes before other tasks: it waits for one step of theirs at most.

        Args:
            classifier: from the registry.
            task: what to do.
            pixels: uint8 [B, C, H, W].

        Raises:
            Overloaded: the queue is full.
        """
        try:
            return await self._batcher.submit(
                (classifier, task), pixels, len(pixels), urgent=isinstance(task, Predict)
            )
        except QueueFull as error:
            raise Overloaded("too many images are waiting; try again in a second") from error

    def close(self) -> None:
        """Stop the threads when what they are at is done; what waits is dropped."""
        self._batcher.close()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)
