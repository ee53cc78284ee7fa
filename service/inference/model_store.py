"""Model store: reloads versions from disk, and loads and unloads models for the admin API.

A version that appears is loaded once. If it loads it is served; requests that name no version get
the pinned one, or else the latest. A replaced version answers until its last request is done,
because requests hold what they use. A version that does not load is refused, and tried again when
its files have changed.
"""

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from dropserve.models import checkpoint
from dropserve.models.device import find_device
from dropserve.models.memory import release_freed_memory
from dropserve.service.errors import (
    InvalidRequest,
    ModelStoreError,
    NotFound,
    Overloaded,
    did_you_mean,
)
from dropserve.service.inference.classifier import Classifier
from dropserve.service.inference.workers import ControlMessage, ControlState
from dropserve.service.observability.logs import FIELDS, context
from dropserve.service.settings import Settings

_POLL_CONTROL = 0.1
"""Seconds between reads of the shared control state."""
_TIMEOUT = 60.0
"""Seconds for all workers to load or unload a model."""
_LISTED = 20
"""Names that an error lists."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_log = logging.getLogger("dropserve.versions")


class CheckpointFolder:
    """Where versions come from: the checkpoints folder. The seam for tests."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._root = settings.checkpoints
        self._device = find_device(settings.device)

    def find(self) -> dict[str, list[int]]:
        """List all models and their versions."""
        found = {}
        for name in checkpoint.names(self._root):
            try:
                found[name] = checkpoint.versions(self._root, name)
            except OSError as error:
                _log.warning(f"a model cannot be read: {error}")
        return found

    def mark(self, name: str, version: int) -> Hashable:
        """Return a value that changes when the version's files do; None: it is gone."""
        return checkpoint.mark(self._root / name / str(version))

    def load(self, name: str, version: int) -> Classifier:
        """Make a version ready, or raise what is wrong with it."""
        path, settings = self._root / name / str(version), self._settings
        return Classifier(name, version, path, settings.factories, settings.precision, self._device)

    def pinned(self, name: str) -> int | None:
        """Return the version of a model that should answer; None: the latest."""
        return checkpoint.pinned(self._root, name)


class _Refusal(NamedTuple):
    """Why a version cannot be loaded, and the mark of its files then."""

    reason: str
    mark: Hashable


@dataclass(frozen=True)
class _Model:
    """A model at one moment."""

    found: Sequence[int] = ()  # versions in the folder
    versions: Mapping[int, Classifier] = field(default_factory=dict)  # served, in ascending order
    answers: int | None = None  # the version that answers where none is named
    refused: Mapping[int, _Refusal] = field(default_factory=dict)  # one served too has changed
    pinned: int | None = None  # the version that should answer
    pin_problem: str | None = None  # why another one does


class ModelStore:
    """The models that are served. Any thread may read; only the `loader` thread changes them.

    With `check`, the default model is resolved and serving no model is an error now; with the
    setting strict_start, so is a refused version. Workers do not check: their parent did, and one
    may replace a dead one when a bad version has come, or all models are unloaded.

    Attributes:
        default: name of the model that is meant where none is named; None: there is none.
        loads: how often versions of a model were "loaded" or "refused".

    Raises:
        ModelStoreError: no model can be served, or there is no such default.
        OSError: the folder cannot be listed.
    """

    def __init__(
        self,
        settings: Settings,
        loader: Executor,
        source: CheckpointFolder | None = None,
        control: ControlState | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._settings = settings
        self._source = source or CheckpointFolder(settings)
        self._loader = loader
        self._control = control or ControlState()
        self._done = ControlMessage(number=-1)
        self._models: Mapping[str, _Model] = {}
        self._marks: dict[tuple[str, int], Hashable] = {}  # of the versions that are served
        self._changed = False  # what is served, in the last update
        self._closing = False
        self.default = settings.default_model
        self.loads: Counter[tuple[str, str]] = Counter()
        if check:
            self._resolve_default([name for name, found in self._source.find().items() if found])
        self._loader.submit(self.update).result()
        if check:
            self._check_start(strict=settings.strict_start)

    def find(self, name: str | None = None, version: str | None = None) -> Classifier:
        """Look up a version, by default the one that answers.

        Names and versions are looked up, never joined to a path.

        Raises:
            NotFound: no such model or version, or no default.
        """
        meant = self.default if name is None else name
        if meant is None:
            raise NotFound(
                f"there are several models and no default: name one of {_listed(self)}, or "
                f"set DROPSERVE_DEFAULT_MODEL"
            )
        model = self._model(meant)
        if not model.versions:
            raise self._no_model(name)
        number = model.answers if version is None else plain_number(version)
        if number is None or number not in model.versions:
            raise NotFound(f"no such version of the model; served are {_listed(model.versions)}")
        return model.versions[number]

    def __iter__(self) -> Iterator[str]:
        """Name the models that are served, in order."""
        return (name for name, model in self._models.items() if model.versions)

    def versions(self, name: str) -> Mapping[int, Classifier]:
        """Return a model's served versions, in ascending order."""
        return self._model(name).versions

    def models(self) -> list[str]:
        """Name all models that are served, or have versions that cannot be."""
        return [name for name, model in self._models.items() if model.versions or model.refused]

    def state(self, name: str) -> dict[str, Any]:
        """Say which versions of a model answer and which cannot; the fields of `ModelState`."""
        model = self._model(name)
        bad = {v: self._without_path(r.reason) for v, r in model.refused.items()}
        bad |= {v: "its folder is gone" for v in model.versions if v not in model.found}
        listed = [{"version": v, "reason": reason} for v, reason in sorted(bad.items())]
        return {
            "version": model.answers,
            "versions": list(model.versions),
            "refused": [entry for entry in listed if entry["version"] not in model.versions],
            "changed": [entry for entry in listed if entry["version"] in model.versions],
            "pinned": model.pinned,
            "pin_problem": model.pin_problem and self._without_path(model.pin_problem),
        }

    def index(self) -> list[dict[str, str]]:
        """List every version there is: name, version, state READY or UNAVAILABLE, and reason."""
        entries = []
        for name, model in self._models.items():
            state = self.state(name)
            reasons = {bad["version"]: bad["reason"] for bad in state["refused"] + state["changed"]}
            for version in sorted({*model.found, *model.versions}):
                served, reason = version in model.versions, reasons.get(version)
                if served:
                    reason = f"served from memory: {reason}" if reason else ""
                elif name in self._done.unloaded:
                    reason = "unloaded"
                elif reason is None:
                    reason = "older than the versions that are kept"
                ready = "READY" if served else "UNAVAILABLE"
                entry = {"name": name, "version": str(version), "state": ready, "reason": reason}
                entries.append(entry)
        return entries

    async def load(self, name: str) -> None:
        """Serve a model again, or try its refused versions again; in every worker.

        Raises:
            NotFound: it is not in the source.
            InvalidRequest: none of its versions can be served; says why.
            Overloaded: not all workers have done it yet.
        """
        await self._publish(name, loaded=True)
        model = self._model(name)
        if not model.found:
            raise NotFound("no such model in the checkpoints folder")
        if not model.versions:
            reasons = {self._without_path(refusal.reason) for refusal in model.refused.values()}
            reason = "; ".join(sorted(reasons or {"unloaded again"}))
            raise InvalidRequest(f"no version can be served: {reason}")

    async def unload(self, name: str) -> None:
        """Stop serving a model, in every worker; its open requests are finished.

        Raises:
            NotFound: it is not served.
            Overloaded: not all workers have done it yet.
        """
        if not self.versions(name):
            raise self._no_model(name)
        await self._publish(name, loaded=False)

    async def _publish(self, name: str, *, loaded: bool) -> None:
        run = asyncio.get_running_loop().run_in_executor
        try:
            async with asyncio.timeout(_TIMEOUT):
                publish = partial(self._control.publish, name, loaded=loaded)
                message = await run(self._loader, publish)
                await run(self._loader, self.update)
                await self._control.all_acknowledged(message)
        except TimeoutError:
            text = "not all workers have done it yet; poll the index"
            raise Overloaded(text, "workers") from None

    async def watch(self) -> None:
        """Follow the source and the shared control state, until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._settings.poll_seconds
        while True:
            await asyncio.sleep(_POLL_CONTROL)
            try:
                if loop.time() >= due or self._control.read() != self._done:
                    due = loop.time() + self._settings.poll_seconds
                    await loop.run_in_executor(self._loader, self.update)
                    due = loop.time() + self._settings.poll_seconds
            except Exception:  # the next scan may succeed, and what is served is served
                _log.exception("looking for new versions failed")

    def close(self) -> None:
        """Load no more versions than the one that is being loaded."""
        self._closing = True

    def update(self) -> None:
        """Carry out the latest control message and scan the source; in the loader thread."""
        if self._changed:  # the last requests of what was served are mostly done by now
            release_freed_memory()
        before = self._served()
        message = self._control.read()
        for name in self._models:
            if message != self._done:  # what was refused is tried again
                self._change(name, refused={})
            if name in message.unloaded:
                self._change(name, versions={}, answers=None)
        self._scan(message.unloaded)
        marks = self._marks.items()
        self._marks = {(n, v): mark for (n, v), mark in marks if v in self.versions(n)}
        self._changed = self._served() != before
        if message != self._done:
            self._control.acknowledge(message)
            self._done = message

    def _scan(self, unloaded: frozenset[str]) -> None:
        try:
            found = self._source.find()
        except OSError as error:
            _log.warning(f"the checkpoints cannot be listed: {error}")
            return
        known = self._models.keys()  # a name without versions was perhaps never a model
        found = {name: versions for name, versions in found.items() if versions or name in known}
        for name in sorted({*known, *found}):
            versions = found.get(name, ())
            self._change(name, found=versions)
            if name in found and name not in unloaded:
                self._refresh(name, versions)
        self._models = {n: m for n, m in self._models.items() if n in found or m.versions}

    def _refresh(self, name: str, found: Sequence[int]) -> None:
        """Load the pinned version, then from the latest on until enough are served.

        A model whose last version is gone stays as it was: more likely its volume is away.
        """
        before = self._model(name)
        pinned, problem = self._read_pin(name, before.pinned)
        chosen: dict[int, Classifier] = {}
        refused = {v: refusal for v, refusal in before.refused.items() if v in found}
        for version in sorted(found, key=lambda v: (v != pinned, -v)):
            newer = sum(v > version for v in chosen)
            enough = newer > self._settings.keep_versions and version != pinned
            if self._closing or enough:
                break
            loaded = self._load(name, version, before)
            if isinstance(loaded, _Refusal):
                refused[version] = loaded
                if version in before.versions:  # its files were replaced by bad ones
                    chosen[version] = before.versions[version]
            elif loaded is not None:
                refused.pop(version, None)
                chosen[version] = loaded
                # the next may take long to load, and is perhaps not served any more afterwards
                self._serve(name, {**before.versions, **chosen}, pinned)
        self._change(name, refused=refused)
        if self._closing:
            return
        if chosen:
            self._serve(name, chosen, pinned)
        if pinned is not None and pinned not in chosen and not problem:
            refusal = refused.get(pinned)
            why = f"cannot be loaded: {refusal.reason}" if refusal else "is not there"
            problem = f"version {pinned} {why}"
        self._change(name, pinned=pinned, pin_problem=problem)
        self._log_changes(name, before, self._model(name))

    def _log_changes(self, name: str, before: _Model, now: _Model) -> None:
        about = {"model": name, "version": now.answers, "pinned": now.pinned}
        problem = now.pin_problem
        if problem and (now.pinned, problem) != (before.pinned, before.pin_problem):
            _log.error("pin not followed", extra={FIELDS: {**about, "reason": problem}})
        if now.answers != before.answers:
            _log.info("version answers", extra={FIELDS: about})

    def _read_pin(self, name: str, before: int | None) -> tuple[int | None, str | None]:
        """Return the version that should answer, or the one before and why no other is known."""
        if self._settings.default_version is not None and name == self.default:
            return self._settings.default_version, None
        try:
            return self._source.pinned(name), None
        except Exception as error:
            return before, f"the pin cannot be read: {error}"

    def _load(self, name: str, version: int, before: _Model) -> Classifier | _Refusal | None:
        """Load a version, unless it is served or refused already; None: it has just gone."""
        mark = self._source.mark(name, version)
        served, known = before.versions.get(version), before.refused.get(version)
        if mark is None:
            return None
        if served is not None and self._marks.get((name, version)) == mark:
            return served
        if known is not None and known.mark == mark:
            return known
        with context(model=name, version=version):
            started = time.perf_counter()
            try:
                loaded = self._source.load(name, version)
            except Exception as error:
                if self._source.mark(name, version) is None:
                    return None
                reason = str(error) or type(error).__name__
                _log.error(
                    "version refused" if served is None else "version changed, served from memory",
                    extra={FIELDS: {"reason": reason}},
                    exc_info=_log.isEnabledFor(logging.DEBUG),
                )
                self.loads[name, "refused"] += 1
                return _Refusal(reason, mark)
            milliseconds = round(1000 * (time.perf_counter() - started))
            self.loads[name, "loaded"] += 1
            self._marks[name, version] = mark
            about = {"milliseconds": milliseconds, "device": loaded.device}
            _log.info("version ready", extra={FIELDS: about})
            return loaded

    def _serve(self, name: str, versions: Mapping[int, Classifier], pinned: int | None) -> None:
        before = versions.get(self._model(name).answers or 0)
        answers = pinned if pinned is not None and pinned in versions else max(versions)
        self._change(name, versions=dict(sorted(versions.items())), answers=answers)
        if before is not None and before is not versions[answers]:
            before.forget_masks()  # fewer requests ask for it now

    def _served(self) -> dict[str, tuple[int | None, Mapping[int, Classifier]]]:
        """Return, by model, the version that answers and all that are served."""
        return {name: (model.answers, model.versions) for name, model in self._models.items()}

    def _change(self, name: str, **changes: Any) -> None:  # noqa: ANN401  fields of _Model
        """Replace a model in one assignment, so that readers see it before or after."""
        models = {**self._models, name: replace(self._model(name), **changes)}
        self._models = dict(sorted(models.items()))

    def _model(self, name: str) -> _Model:
        return self._models.get(name) or _Model()

    def _resolve_default(self, names: Sequence[str]) -> None:
        """Take the only model at the start as the default: later ones do not change it."""
        where, listed = self._settings.checkpoints, ", ".join(names)
        if not names:
            raise ModelStoreError(f"{where}: no checkpoint in it; make one with `dropserve train`")
        if self.default is None and len(names) == 1:
            self.default = names[0]
        if self.default is None and self._settings.default_version is not None:
            raise ModelStoreError(
                "DROPSERVE_DEFAULT_VERSION is of the default model: set DROPSERVE_DEFAULT_MODEL"
            )
        if self.default is None:
            _log.warning(
                f"no default model: /predict is 404 until DROPSERVE_DEFAULT_MODEL is one of "
                f"{listed}"
            )
        elif self.default not in names:
            raise ModelStoreError(
                f"{where}: the default model {self.default!r} is not in it; there are {listed}"
            )

    def _check_start(self, *, strict: bool) -> None:
        models = self._models.items()
        problems = [refusal.reason for _, m in models for refusal in m.refused.values()]
        if not any(self):
            raise ModelStoreError(f"no model can be served: {'; '.join(problems)}")
        problems += [f"{name}: {m.pin_problem}" for name, m in models if m.pin_problem]
        if strict and problems:
            raise ModelStoreError(f"DROPSERVE_STRICT_START is set, and {'; '.join(problems)}")

    def _no_model(self, name: str | None) -> NotFound:
        if name is None:
            return NotFound("the default model is not served now")
        if not any(self):
            return NotFound("no such model; none is served")
        return NotFound(f"no such model; served are {_listed(self)}{did_you_mean(name, self)}")

    def _without_path(self, text: str) -> str:
        return text.replace(f"{self._settings.checkpoints}/", "")


def plain_number(text: str) -> int:
    """Read a number from a path: as it is written and not too long; -1: it is something else."""
    return int(text) if _NUMBER.fullmatch(text) else -1


def _listed(names: Iterable[object]) -> str:
    first = [str(name) for name in islice(names, _LISTED + 1)]
    return ", ".join([*first[:_LISTED], "..."] if len(first) > _LISTED else first)
