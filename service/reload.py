"""Keeps a registry equal to a folder of checkpoints: new versions come, old ones go.

A version is looked at once. If it loads it is served, and the latest is what a request means that
names none; what it replaces answers until its last request is done, because requests hold what they
use. If it does not load it is refused, and looked at again when its files have changed.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.logs import FIELDS
from service.registry import Registry

Served = TypeVar("Served")
_log = logging.getLogger("dropserve.versions")


@dataclass(frozen=True)
class Folder(Generic[Served]):
    """Where versions come from.

    Attributes:
        find: lists all models and their versions, in ascending order.
        mark: of a version: equal as long as its files are.
        load: makes a version ready, or raises what is wrong with it.
    """

    find: Callable[[], Mapping[str, Sequence[int]]]
    mark: Callable[[str, int], Hashable]
    load: Callable[[str, int], Served]


@dataclass(frozen=True)
class Refusal:
    """Why a version is not served, and the mark that its files had."""

    error: Exception
    mark: Hashable


class Reloader(Generic[Served]):
    """Loads what has come and lets go of what has gone. One thread uses it; any may read.

    Args:
        registry: what is served.
        folder: where it comes from.
        keep: versions before the latest that stay served.

    Attributes:
        found: the models and versions that were there at the last look.
        refused: versions of a model that cannot be served.
        left_out: names of models that are not to be served.
        loads: how often versions of a model were "loaded" or "refused".
        closing: whether to load no more versions.
    """

    def __init__(self, registry: Registry[Served], folder: Folder[Served], keep: int) -> None:
        self._registry = registry
        self._folder = folder
        self._keep = keep
        self.found: Mapping[str, Sequence[int]] = {}
        self.refused: Mapping[str, Mapping[int, Refusal]] = {}
        self.left_out: frozenset[str] = frozenset()
        self._marks: dict[tuple[str, int], Hashable] = {}
        self.loads: Counter[tuple[str, str]] = Counter()
        self.closing = False

    def look(self) -> None:
        """Bring the registry up to date."""
        for name in self.left_out:
            self._registry.replace(name, {})
        try:
            self.found = self._folder.find()
        except OSError as error:
            _log.warning(f"the checkpoints cannot be listed: {error}")
            return
        for name, versions in self.found.items():
            if name not in self.left_out and (versions or name in self.refused):
                self._refresh(name, versions)

    def forget(self) -> None:
        """Look again at what was refused, although the files are the same."""
        self.refused = {}

    def _refresh(self, name: str, versions: Sequence[int]) -> None:
        """Go from the latest version to older ones until there are enough.

        A model whose last version is gone stays as it was: more likely its volume is away.
        """
        before = self._registry.versions(name)
        known = self.refused.get(name, {})
        chosen: dict[int, Served] = {}
        refused = {version: known[version] for version in versions if version in known}
        for version in reversed(versions):
            if len(chosen) > self._keep or self.closing:
                break
            found = self._load(name, version, known.get(version))
            if isinstance(found, Refusal):
                refused[version] = found
                if version in before:  # it was replaced by a bad one of its number
                    chosen[version] = before[version]
            else:
                refused.pop(version, None)
                chosen[version] = found
                if before.get(version) is not found:
                    self._registry.replace(name, {**before, **chosen})  # older ones may take long
        self.refused = {**self.refused, name: refused}
        if chosen and not self.closing:
            self._registry.replace(name, chosen)

    def _load(self, name: str, version: int, known: Refusal | None) -> Served | Refusal:
        mark = self._folder.mark(name, version)
        served = self._registry.versions(name).get(version)
        if served is not None and self._marks.get((name, version)) == mark:
            return served
        if known is not None and known.mark == mark:
            return known
        started = time.perf_counter()
        try:
            served = self._folder.load(name, version)
        except Exception as error:
            about = {"model": name, "version": version, "reason": str(error)}
            _log.exception("version refused", extra={FIELDS: about})
            self.loads[name, "refused"] += 1
            return Refusal(_bare(error), mark)
        milliseconds = round(1000 * (time.perf_counter() - started))
        about = {"model": name, "version": version, "milliseconds": milliseconds}
        self.loads[name, "loaded"] += 1
        self._marks[name, version] = mark
        _log.info("version ready", extra={FIELDS: about})
        return served


def _bare(error: Exception) -> Exception:
    """Free an error of the frames that it came through: they hold the weights that were read."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
