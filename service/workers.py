"""Workers that start together: none listens before each of them has loaded its models.

They share one socket, and the first to listen on it would answer for all. So each leaves a file of
its own in a folder once it is done loading, and waits until there are as many as workers. One that
is started later, in place of one that died, finds them there and does not wait.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_FOLDER = "_DROPSERVE_STARTING"
"""Environment variable by which workers find the folder; no setting, hence no DROPSERVE_ first."""


class StartingLine:
    """Where workers wait for each other.

    Args:
        folder: the same for all of them, and theirs alone.
        workers: how many there are.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder = folder
        self._workers = workers

    @classmethod
    def of_this_worker(cls, workers: int) -> Self:
        """Find the line that the parent process drew."""
        return cls(Path(os.environ[_FOLDER]), workers)

    def arrive(self, name: str) -> None:
        """Say that this worker waits for nothing any more: it has loaded its models, or failed."""
        (self._folder / name).touch()

    async def wait(self) -> None:
        """Wait until all have arrived."""
        while sum(1 for _ in self._folder.iterdir()) < self._workers:  # noqa: ASYNC110  processes
            await asyncio.sleep(0.02)


@contextmanager
def starting_line() -> Iterator[None]:
    """Draw a line for the processes that are started inside the block."""
    with tempfile.TemporaryDirectory(prefix="dropserve-") as folder:
        os.environ[_FOLDER] = folder
        yield
