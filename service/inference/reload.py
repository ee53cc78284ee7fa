"""Keeps a registry equal to a folder of checkpoints: new versions come, old ones go.

A version is looked at once. If it loads it is served, and what a request means that names none is
the pinned version, or else the latest; what it replaces answers until its last request is done,
because requests hold what they use. If it does not load it is refused, and looked at again when its
files have changed.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from dropserve.service.inference.registry import Registry
from dropserve.service.observability.logs import FIELDS, context

Served = TypeVar("Served")
_log = logging.getLogger("dropserve.versions")


@dataclass(frozen=True)
class Folder(Generic[Served]):
    """Where versions come from.

    Attributes:
        find: lists all models and their versions, in ascending order.
        mark: of a version: equal as long as its files are; None: it is gone.
        load: makes a version ready, or raises what is wrong with it.
        pinned: the version of a model that is to answer, or None; or raises why it is not known.
    """

    find: Callable[[], Mapping[str, Sequence[int]]]
    mark: Callable[[str, int], Hashable]
    load: Callable[[str, int], Served]
    pinned: Callable[[str], int | None] = lambda _name: None


@dataclass(frozen=True)
class Refusal:
    """Why a version cannot be loaded, and the mark that its files had."""

    error: Exception
    mark: Hashable


@dataclass(frozen=True)
class Pin:
    """The version of a model that is to answer, if any; and why another one does, if so."""

    version: int | None = None
    problem: str | None = None


class Reloader(Generic[Served]):
    """Loads what has come and lets go of what has gone. One thread uses it; any may read.

    Args:
        registry: what is served.
        folder: where it comes from.
        keep: versions before the latest that stay served.
        default_version: of the registry's default model, to answer whatever is pinned.

    Attributes:
        found: the models and versions that were there at the last look.
        refused: versions of a model that cannot be loaded; those that were before serve on.
        pins: of models that have been looked at.
        left_out: names of models that are not to be served.
        loads: how often versions of a model were "loaded" or "refused".
        closing: whether to load no more versions.
    """

    def __init__(
        self,
        registry: Registry[Served],
        folder: Folder[Served],
        keep: int,
        default_version: int | None = None,
    ) -> None:
        self._registry = registry
        self._folder = folder
        self._keep = keep
        self._default_version = default_version
        self.found: Mapping[str, Sequence[int]] = {}
        self.refused: Mapping[str, Mapping[int, Refusal]] = {}
        self.pins: Mapping[str, Pin] = {}
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
        known = {*self.found, *self._registry}
        self.refused = {name: them for name, them in self.refused.items() if name in known}
        for name, versions in self.found.items():
            if name not in self.left_out and (versions or name in self.refused):
                self._refresh(name, versions)

    def forget(self) -> None:
        """Look again at what was refused, although the files are the same."""
        self.refused = {}

    def _refresh(self, name: str, versions: Sequence[int]) -> None:
        """Load the pinned version, then go from the latest to older ones until there are enough.

        A model whose last version is gone stays as it was: more likely its volume is away.
        """
        model = self._registry.model(name)
        before = model.versions
        known = self.refused.get(name, {})
        pin = self._read_pin(name)
        chosen: dict[int, Served] = {}
        refused = {version: known[version] for version in versions if version in known}
        for version in sorted(versions, key=lambda v: (v != pin.version, -v)):
            newer = sum(v > version for v in chosen)
            if self.closing or (newer > self._keep and version != pin.version):
                break
            found = self._load(name, version, known.get(version))
            if isinstance(found, Refusal):
                refused[version] = found
                if version in before:  # it was replaced by a bad one of its number
                    chosen[version] = before[version]
            elif found is not None:
                refused.pop(version, None)
                chosen[version] = found
                # the others may take long, the last ones of which have been served so far
                self._registry.replace(name, {**before, **chosen}, pin.version)
        self.refused = {**self.refused, name: refused}
        if chosen and not self.closing:
            self._registry.replace(name, chosen, pin.version)
        if not self.closing:
            self._note_pin(name, _followed(pin, chosen, refused), model.answers)

    def _read_pin(self, name: str) -> Pin:
        """Read which version is to answer; where that fails, it stays the one that it was."""
        if self._default_version is not None and name == self._registry.default:
            return Pin(self._default_version)
        try:
            return Pin(self._folder.pinned(name))
        except Exception as error:
            return Pin(self.pins.get(name, Pin()).version, f"the pin cannot be read: {error}")

    def _note_pin(self, name: str, pin: Pin, answered: int | None) -> None:
        """Remember a pin, and log what has become of it and of the version that answers."""
        answers = self._registry.model(name).answers
        about = {"model": name, "version": answers, "pinned": pin.version}
        if pin.problem and pin != self.pins.get(name):
            _log.error("pin not followed", extra={FIELDS: {**about, "reason": pin.problem}})
        self.pins = {**self.pins, name: pin}
        if answers != answered:
            _log.info("version answers", extra={FIELDS: about})

    def _load(self, name: str, version: int, known: Refusal | None) -> Served | Refusal | None:
        """Load a version, unless it is served or refused already; None: it has just gone."""
        mark = self._folder.mark(name, version)
        served = self._registry.versions(name).get(version)
        if mark is None:
            return None
        if served is not None and self._marks.get((name, version)) == mark:
            return served
        if known is not None and known.mark == mark:
            return known
        with context(model=name, version=version):
            started = time.perf_counter()
            try:
                loaded = self._folder.load(name, version)
            except Exception as error:
                if self._folder.mark(name, version) is None:
                    return None
                _log.error(
                    "version refused" if served is None else "version changed, served from memory",
                    extra={FIELDS: {"reason": str(error) or type(error).__name__}},
                    exc_info=_log.isEnabledFor(logging.DEBUG),
                )
                self.loads[name, "refused"] += 1
                return Refusal(_bare(error), mark)
            milliseconds = round(1000 * (time.perf_counter() - started))
            self.loads[name, "loaded"] += 1
            self._marks[name, version] = mark
            _log.info("version ready", extra={FIELDS: {"milliseconds": milliseconds}})
            return loaded


def _followed(pin: Pin, chosen: Container[int], refused: Mapping[int, Refusal]) -> Pin:
    """Add to a pin why its version does not answer, if it does not."""
    if pin.problem or pin.version is None or pin.version in chosen:
        return pin
    refusal = refused.get(pin.version)
    why = "is not there" if refusal is None else f"cannot be loaded: {refusal.error}"
    return replace(pin, problem=f"version {pin.version} {why}")


def _bare(error: Exception) -> Exception:
    """Free an error of the frames that it came through: they hold the weights that were read."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
