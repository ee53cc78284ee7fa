"""Where versions are found and published: a folder, or a prefix in object storage.

Commands and the service know a `Repository` alone. `checkpoint.py` says what a version is, and how
a folder holds several; `bucket.py` keeps them in object storage.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from dropserve.models import checkpoint, storage
from dropserve.models.errors import CheckpointError, CheckpointNotFound

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)


class Repository(ABC):
    """Models and their versions, whose names and numbers are plain (see `checkpoint.is_name`).

    Attributes:
        where: the folder or the URL.
        problem: why what `find` returns may be out of date; None: it is not.
    """

    where: Path | str
    problem: str | None = None

    @abstractmethod
    def find(self) -> dict[str, list[int]]:
        """List all models and their versions as they are now, unfinished ones included.

        OSError, StorageUnavailable: they cannot be listed.
        """

    @abstractmethod
    def versions(self, name: str) -> list[int]:
        """List a model's versions, in ascending order."""

    @abstractmethod
    def mark(self, name: str, version: int) -> Hashable:
        """Return a value that changes when the version should be read again; None: it is gone."""

    @abstractmethod
    def local(self, name: str, version: int) -> AbstractContextManager[Path]:
        """Have a version in a folder of this machine for the length of the block.

        CheckpointError: it cannot be had.
        """

    @abstractmethod
    def pinned(self, name: str) -> int | None:
        """Return the version that is to answer whatever newer ones there are; None: the latest."""

    @abstractmethod
    def pin(self, name: str, version: int | None) -> None:
        """Pin a version, or none. A reader finds the old pin or the new one."""

    @abstractmethod
    def save(self, module: "nn.Module", metadata: checkpoint.Metadata) -> int:
        """Publish the next version of `metadata.name`, whole or not at all; return its number.

        CheckpointError: it cannot be written, or could not be read again.
        """

    @abstractmethod
    def remove(self, name: str, version: int) -> bool:
        """Remove a version; False: it is pinned, and stays."""

    @abstractmethod
    def workspace(self, name: str) -> Path:
        """Name the folder of this machine for the state of a model's training."""

    def relative(self, text: str) -> str:
        """Shorten the places that a message names."""
        return text.replace(f"{self.where}/", "")

    def place(self, name: str, version: int) -> str:
        """Say where a version is."""
        return f"{self.where}/{name}/{version}"

    def choose(self, name: str, version: int | None = None) -> int:
        """Return a version that is there: the latest where None is asked for."""
        found = self.versions(name)
        if not found:
            known = [other for other in self.find() if self.versions(other)]
            like = "".join(f"; did you mean {x}?" for x in get_close_matches(name, known, 1))
            there = f"there are {', '.join(known)}{like}" if known else "there is none"
            raise CheckpointNotFound(f"no model {name!r} in {self.where}: {there}")
        if version not in (None, *found):
            there = ", ".join(map(str, found))
            raise CheckpointNotFound(
                f"no version {version} of {name!r} in {self.where}: there are {there}"
            )
        return version or found[-1]

    def read(self, name: str, version: int) -> checkpoint.Version:
        """Read a version and verify it, without running code that it names."""
        with self.local(name, version) as path:
            return checkpoint.read(path)

    def holding(self, name: str, module: "nn.Module") -> tuple[int, checkpoint.Metadata] | None:
        """Find the newest version if it has a module's weights, to the bit; None: others."""
        weights = storage.dump_tensors(Path(checkpoint.WEIGHTS), module.state_dict())
        try:
            newest = self.choose(name)
            metadata = self.read(name, newest).metadata
        except CheckpointError:
            return None
        same = metadata.sha256 == hashlib.sha256(weights).hexdigest()
        return (newest, metadata) if same else None


class Folder(Repository):
    """A folder of models, each a folder of versions."""

    def __init__(self, where: Path) -> None:
        self.where: Path = where

    def find(self) -> dict[str, list[int]]:
        """List all; a model that cannot be read is left out, and logged."""
        found = {}
        for name in checkpoint.names(self.where):
            try:
                found[name] = checkpoint.versions(self.where, name)
            except OSError as error:
                _log.warning(f"a model cannot be read: {error}")
        return found

    def versions(self, name: str) -> list[int]:
        """List a model's versions, in ascending order."""
        return checkpoint.versions(self.where, name)

    def mark(self, name: str, version: int) -> Hashable:
        """Return what changes when the version's files do; None: it is gone."""
        return checkpoint.mark(self.where / name / str(version))

    def local(self, name: str, version: int) -> AbstractContextManager[Path]:
        """Name the version's own folder."""
        return nullcontext(self.where / name / str(version))

    def pinned(self, name: str) -> int | None:
        """Return the pinned version."""
        return checkpoint.pinned(self.where, name)

    def pin(self, name: str, version: int | None) -> None:
        """Pin a version, or none."""
        checkpoint.pin(self.where, name, version)

    def save(self, module: "nn.Module", metadata: checkpoint.Metadata) -> int:
        """Write the next version."""
        return int(checkpoint.save(self.where, module, metadata).name)

    def remove(self, name: str, version: int) -> bool:
        """Remove a version, first by a rename that hides it."""
        return checkpoint.remove(self.where, name, version)

    def workspace(self, name: str) -> Path:
        """Name a folder beside the versions."""
        return self.where / name / ".training"
