"""Several processes on one port: they start together, and what one is told all do.

They share one socket and a folder. The first to listen would answer for all, so each leaves a file
in the folder once it is done loading, and waits until there are as many as workers; one that is
started later, in place of one that died, finds them there and does not wait. A request to unload a
model reaches one of them: it posts a notice, which the others look for, and each marks what it did.
"""

import asyncio
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

_FOLDER = "_DROPSERVE_SHARED"
"""Environment variable by which workers find the folder; no setting, hence no DROPSERVE_ first."""
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable by which prometheus_client finds where workers add up their figures."""


class StartupBarrier:
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
        return cls(_shared("line"), workers)

    def arrive(self, name: str) -> None:
        """Say that this worker waits for nothing any more: it has loaded its models, or failed."""
        (self._folder / name).touch()

    async def wait(self) -> None:
        """Wait until all have arrived."""
        while sum(1 for _ in self._folder.iterdir()) < self._workers:  # noqa: ASYNC110  processes
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class ControlMessage:
    """The models that an operator has unloaded; numbered, so that the latest is known."""

    number: int = 0
    unloaded: frozenset[str] = frozenset()


class ControlState:
    """Where one worker tells the others which models are unloaded.

    Args:
        folder: the same for all workers, and for this alone; None: there is one worker.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._own = ControlMessage()

    @classmethod
    def of_this_worker(cls) -> Self:
        """Find the board that the parent process put up."""
        return cls(_shared("board"))

    def read(self) -> ControlMessage:
        """Return the latest notice."""
        if self._folder is None:
            return self._own
        try:
            number, unloaded = json.loads((self._folder / "notice").read_text())
        except FileNotFoundError:
            return ControlMessage()
        return ControlMessage(number, frozenset(unloaded))

    def post(self, name: str, *, loaded: bool) -> ControlMessage:
        """Say that a model is loaded, or unloaded, from now on."""
        if self._folder is None:
            self._own = _next(self._own, name, loaded)
            return self._own
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            notice = _next(self.read(), name, loaded)
            written = self._folder / "notice.new"
            written.write_text(json.dumps([notice.number, sorted(notice.unloaded)]))
            written.replace(self._folder / "notice")
        return notice

    def obeyed(self, notice: ControlMessage) -> None:
        """Mark that this worker has done as a notice says."""
        if self._folder is not None:
            mark = self._folder / f"{os.getpid()}.new"
            mark.write_text(str(notice.number))
            mark.replace(mark.with_suffix(".done"))

    async def all_obeyed(self, notice: ControlMessage) -> None:
        """Wait until every worker that lives has done as a notice says."""
        while self._awaited(notice):  # noqa: ASYNC110  processes
            await asyncio.sleep(0.02)

    def _awaited(self, notice: ControlMessage) -> bool:
        """Say if a worker that lives has not obeyed a notice yet."""
        marks = [] if self._folder is None else self._folder.glob("*.done")
        return any(int(m.read_text()) < notice.number and lives(int(m.stem)) for m in marks)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Make the folder that the processes started inside the block share."""
    with tempfile.TemporaryDirectory(prefix="dropserve-") as folder:
        for use in ("line", "board", "metrics"):
            (Path(folder) / use).mkdir()
        os.environ[_FOLDER] = folder
        os.environ[METRICS_FOLDER] = str(Path(folder) / "metrics")
        try:
            yield Path(folder)
        finally:
            del os.environ[_FOLDER], os.environ[METRICS_FOLDER]


def kept_keys() -> Path | None:
    """Name the file for the last good API keys; None where there is one worker."""
    return _shared("keys") if _FOLDER in os.environ else None


def _shared(use: str) -> Path:
    return Path(os.environ[_FOLDER], use)


def _next(notice: ControlMessage, name: str, loaded: bool) -> ControlMessage:
    unloaded = notice.unloaded - {name} if loaded else notice.unloaded | {name}
    return replace(notice, number=notice.number + 1, unloaded=unloaded)


def lives(process: int) -> bool:
    """Say if there is such a process of ours."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # or its number is another user's by now
        return False
    return True
