"""What several worker processes on one port share: a folder, in which they coordinate.

Start-up: the first worker to listen would answer for all, so each leaves a file once it has loaded
its models and waits until there are as many files as workers. A worker that replaces a dead one
finds the files there and does not wait.

Control: a request to unload a model reaches one worker. It publishes the message to a file that the
others poll; each acknowledges what it has carried out.
"""

import asyncio
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_FOLDER = "_DROPSERVE_SHARED"
"""Environment variable by which workers find the folder; no setting, hence no DROPSERVE_ first."""
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable by which prometheus_client finds where workers add up their figures."""


@dataclass(frozen=True)
class StartupBarrier:
    """Where the workers wait for each other, in a folder of its own."""

    folder: Path
    workers: int

    @classmethod
    def of_this_worker(cls, workers: int) -> Self:
        """Find the barrier that the parent process made."""
        return cls(_shared("barrier"), workers)

    def ready(self, name: str) -> None:
        """Signal that loading finished or failed in the worker of this name."""
        (self.folder / name).touch()

    async def wait(self) -> None:
        """Wait until all workers are ready."""
        while sum(1 for _ in self.folder.iterdir()) < self.workers:  # noqa: ASYNC110  processes
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class ControlMessage:
    """The models that an operator has unloaded; numbered, so that the latest is known."""

    number: int = 0
    unloaded: frozenset[str] = frozenset()


class ControlState:
    """The latest control message, shared by the workers through a folder; None: one worker."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._own = ControlMessage()

    @classmethod
    def of_this_worker(cls) -> Self:
        """Find the folder that the parent process made."""
        return cls(_shared("control"))

    def read(self) -> ControlMessage:
        """Return the latest message."""
        if self._folder is None:
            return self._own
        try:
            number, unloaded = json.loads((self._folder / "message").read_text())
        except FileNotFoundError:
            return ControlMessage()
        return ControlMessage(number, frozenset(unloaded))

    def publish(self, name: str, *, loaded: bool) -> ControlMessage:
        """Declare a model loaded or unloaded, for all workers."""
        if self._folder is None:
            self._own = self._next(name, loaded)
            return self._own
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            message = self._next(name, loaded)
            written = self._folder / "message.new"
            written.write_text(json.dumps([message.number, sorted(message.unloaded)]))
            written.replace(self._folder / "message")
        return message

    def _next(self, name: str, loaded: bool) -> ControlMessage:
        latest = self.read()
        unloaded = latest.unloaded - {name} if loaded else latest.unloaded | {name}
        return ControlMessage(latest.number + 1, unloaded)

    def acknowledge(self, message: ControlMessage) -> None:
        """Record that this worker has carried out a message."""
        if self._folder is not None:
            mark = self._folder / f"{os.getpid()}.new"
            mark.write_text(str(message.number))
            mark.replace(mark.with_suffix(".done"))

    async def all_acknowledged(self, message: ControlMessage) -> None:
        """Wait until every live worker has carried out a message."""
        while self._is_awaited(message):  # noqa: ASYNC110  processes
            await asyncio.sleep(0.02)

    def _is_awaited(self, message: ControlMessage) -> bool:
        marks = [] if self._folder is None else self._folder.glob("*.done")
        return any(int(m.read_text()) < message.number and lives(int(m.stem)) for m in marks)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Make the folder for the processes that are started inside the block."""
    with tempfile.TemporaryDirectory(prefix="dropserve-") as folder:
        for use in ("barrier", "control", "metrics"):
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


def lives(process: int) -> bool:
    """Say if there is such a process of ours."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # its number may be another user's by now
        return False
    return True
