"""Versions on this machine that were downloaded, shared by its processes.

A version is a folder, below one named after its manifest's digest. Whoever reads it holds a shared
lock on it; it is removed by whoever gets an exclusive one, first by a rename that hides it. One
process at a time downloads.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from dropserve.models import checkpoint, storage
from dropserve.models.errors import CheckpointError

_KEY = 16
"""Digits of a digest in a folder's name."""


@dataclass
class Held:
    """A version that is being read; `damaged`: its reader found that it is, and it is removed."""

    path: Path
    damaged: bool = False


class VersionCache:
    """The folder `root`, of at most `limit` bytes, or of the one version that is larger."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self._limit = limit

    def path(self, name: str, version: object, digest: str) -> Path:
        """Name the folder of a version, whose manifest has this SHA-256."""
        return self.root / "versions" / digest[:_KEY] / name / str(version)

    def relative(self, text: str) -> str:
        """Shorten the folders that a message names."""
        return re.sub(rf"{re.escape(str(self.root))}/versions/[0-9a-f]{{{_KEY}}}/", "", text)

    @contextmanager
    def held(self, path: Path, size: int, download: Callable[[Path], None]) -> Iterator[Held]:
        """Have a version stay for the length of the block.

        If it is not there, `download` fills an empty folder with its `size` bytes. If the block
        raises a CheckpointError, and the files are not those of the manifest, they are removed.

        Raises:
            CheckpointNotWritten: it cannot be written.
        """
        with storage.changing(self.root, "keep downloaded versions"):
            found = self._open(path)
            descriptor = self._add(path, size, download) if found is None else found
        held = Held(path)
        try:
            yield held
        except CheckpointError:
            held.damaged = not checkpoint.is_intact(path)
            if held.damaged:
                self._remove(path, descriptor)
            raise
        finally:
            os.close(descriptor)

    def _open(self, path: Path) -> int | None:
        """Return a descriptor of a folder with a shared lock; None: it is not there."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):  # removed before it was locked
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.utime(path)
                return descriptor
        os.close(descriptor)
        return None

    def _add(self, path: Path, size: int, download: Callable[[Path], None]) -> int:
        storage.make_folder(self.root)
        with (self.root / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := self._open(path)) is not None:  # another process has downloaded it
                return found
            for left in self.root.glob(".[no][el][wd]-*"):  # by killed processes
                shutil.rmtree(left, ignore_errors=True)
            self._make_room(size)
            new = TemporaryDirectory(prefix=".new-", dir=self.root, ignore_cleanup_errors=True)
            with new as made:
                download(Path(made))
                storage.make_folder(path.parent)
                Path(made).rename(path)
            if (found := self._open(path)) is None:
                raise FileNotFoundError(f"{path} was removed")
            return found

    def _make_room(self, size: int) -> None:
        """Remove versions, those not used for longest first, except what is being read."""
        sizes: dict[Path, int] = {}
        used: dict[Path, float] = {}
        for path in self.root.glob("versions/*/*/[1-9]*"):
            with suppress(OSError):
                sizes[path] = sum(file.stat().st_size for file in path.iterdir())
                used[path] = path.stat().st_mtime
        total = size + sum(sizes.values())
        for path in sorted(used, key=used.__getitem__):
            if total <= self._limit:
                break
            with suppress(OSError), storage.open_folder(path) as descriptor:
                if self._remove(path, descriptor):
                    total -= sizes[path]

    def _remove(self, path: Path, descriptor: int) -> bool:
        """Remove a version that this process alone has open; False: another one reads it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        hidden = Path(mkdtemp(prefix=".old-", dir=self.root))
        path.rename(hidden / path.name)
        shutil.rmtree(hidden, ignore_errors=True)
        with suppress(OSError):  # unless they hold another version
            path.parent.rmdir()
            path.parent.parent.rmdir()
        return True
