"""Model store: reloads versions from disk, and loads and unloads models for the admin API.

A version that appears is loaded once. If it loads it is served; requests that name no version get
the pinned one, or else the latest. A replaced version answers until its last request is done,
because requests hold what they use. A version that does not load is refused, and tried again when
its files have changed.
"""

import asyncio
import itertools
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from dropserve.models.bucket import open_repository
from dropserve.models.device import find_device
from dropserve.models.errors import CheckpointIncomplete, StorageUnavailable
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
_ATTEMPTS = 3
"""Times that a model is loaded for a request while others push it out of memory."""
_MAX_LOADING = 8
"""Models that are loaded on request at a time, or wait for it: then others are refused at once."""
_REASON = 1000
"""Most characters of why a version is refused."""
_LISTED = 20
"""Names that an error lists."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_log = logging.getLogger("dropserve.versions")


class CheckpointSource:
    """Where versions come from: a folder or object storage. The seam for tests."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._repository = open_repository(
            settings.checkpoints,
            settings.cache,
            settings.cache_bytes,
            start_from_cache=settings.start_from_cache,
        )
        self._device = find_device(settings.device)
        self.find = self._repository.find
        self.mark = self._repository.mark
        self.pinned = self._repository.pinned
        self.relative = self._repository.relative

    @property
    def problem(self) -> str | None:
        """Say why what `find` returns may be out of date."""
        return self._repository.problem

    def load(self, name: str, version: int) -> Classifier:
        """Make a version ready, or raise what is wrong with it."""
        settings = self._settings
        with self._repository.local(name, version) as path:
            return Classifier(
                name, version, path, settings.factories, settings.precision, self._device
            )


class _NotLoaded(Overloaded):
    """The model `name` is one that is loaded when it is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__("the model is not loaded", "loading")
        self.name = name


class _Listing(NamedTuple):
    """The versions that there are, None if they cannot be listed, and why they may be others.

    The `number` says in which order listings began.
    """

    number: int
    found: Mapping[str, Sequence[int]] | None
    problem: str | None


class _Refusal(NamedTuple):
    """Why a version cannot be loaded, and the mark of its files then."""

    reason: str
    mark: Hashable
    incomplete: bool = False  # it is being published, or was not to the end


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
        problem: why new versions would not be found now; None: they would be.

    Raises:
        ModelStoreError: no model can be served, or there is no such default.
        OSError, StorageUnavailable: the checkpoints cannot be listed.
    """

    def __init__(
        self,
        settings: Settings,
        loader: Executor,
        source: CheckpointSource | None = None,
        control: ControlState | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._settings = settings
        self._source = source or CheckpointSource(settings)
        self._loader = loader
        self._control = control or ControlState()
        self._done = ControlMessage(number=-1)
        self._models: Mapping[str, _Model] = {}
        self._marks: dict[tuple[str, int], Hashable] = {}  # of the versions that are served
        self._used: dict[str, float] = {}  # when models were last asked for, if not all are loaded
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._changed = False  # what is served, in the last update
        self._closing = False
        self._listings = itertools.count(1)
        self._followed = 0
        self.default = settings.default_model
        self.problem: str | None = None
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
        found = self._find(name, version)
        if self._settings.max_loaded_models:
            self._used[name or self.default or ""] = time.monotonic()
        return found

    def _find(self, name: str | None, version: str | None) -> Classifier:
        meant = self.default if name is None else name
        if meant is None:
            raise NotFound(
                f"there are several models and no default: name one of {_listed(self)}, or "
                f"set DROPSERVE_DEFAULT_MODEL"
            )
        model = self._model(meant)
        if not model.versions:
            if self._waits(meant):
                self._require_found(model, version)
                raise _NotLoaded(meant)
            if self._settings.max_loaded_models and model.refused:
                raise Overloaded("the model cannot be loaded now; /readyz says why", "loading")
            raise self._no_model(name)
        number = model.answers if version is None else plain_number(version)
        if number is None or number not in model.versions:
            raise NotFound(f"no such version of the model; served are {_listed(model.versions)}")
        return model.versions[number]

    @staticmethod
    def _require_found(model: _Model, version: str | None) -> None:
        """Raise NotFound for a version for which a model need not be loaded."""
        if version is not None and plain_number(version) not in model.found:
            raise NotFound(f"no such version of the model; there are {_listed(model.found)}")

    async def find_or_load(self, name: str | None, version: str | None) -> Classifier:
        """Do as `find`, after loading a model that waits to be asked for.

        Raises:
            NotFound: no such model or version, or no default.
            Overloaded: it could not be loaded, or not in the time that a request may wait.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self.find(name, version)
            except _NotLoaded as error:
                await self._load_awaited(error.name)
        raise Overloaded("more models are asked for than may be loaded", "loading")

    async def _load_awaited(self, name: str) -> None:
        """Load a model in the loader thread, once for all who wait for it."""
        loading = self._loading.get(name)
        if loading is None:
            if len(self._loading) >= _MAX_LOADING:
                raise Overloaded("other models are being loaded", "loading")
            run = asyncio.get_running_loop().run_in_executor
            loading = self._loading[name] = run(self._loader, self._load_on_request, name)
            loading.add_done_callback(lambda _: self._loading.pop(name))
        try:
            async with asyncio.timeout(self._settings.max_wait):
                await asyncio.shield(loading)
        except TimeoutError:
            raise Overloaded("the model is being loaded", "loading") from None

    def _load_on_request(self, name: str) -> None:
        """Load a model, then unload the least recently used ones; in the loader thread."""
        if self._model(name).versions or self._closing:
            return
        self._refresh(name, self._model(name).found)
        loaded = {n: self._used.get(n, 0.0) for n, model in self._models.items() if model.versions}
        excess = len(loaded) - self._settings.max_loaded_models
        if loaded.pop(name, None) is None:  # none makes room for one that cannot be loaded
            return
        for other in sorted(loaded, key=loaded.__getitem__)[: max(0, excess)]:
            self._change(other, versions={}, answers=None)
            _log.info("model unloaded", extra={FIELDS: {"model": other, "for": name}})
        self._used[name] = time.monotonic()
        release_freed_memory()

    def _waits(self, name: str) -> bool:
        """Say if a model is not loaded because nobody has asked for it lately."""
        model = self._model(name)
        return (
            self._settings.max_loaded_models > 0
            and not model.versions
            and name not in self._done.unloaded
            and not model.refused.keys() >= {*model.found}
        )

    def __iter__(self) -> Iterator[str]:
        """Name the models that answer, in order: those served, and those loaded on request."""
        return (name for name, model in self._models.items() if model.versions or self._waits(name))

    def check(self, name: str, version: str | None = None) -> None:
        """Raise what `find_or_load` would, NotFound or Overloaded; this is no use of the model."""
        with suppress(_NotLoaded):
            self._find(name, version)

    def versions(self, name: str) -> Mapping[int, Classifier]:
        """Return a model's served versions, in ascending order."""
        return self._model(name).versions

    def models(self) -> list[str]:
        """Name all models that answer, or have versions that cannot be served."""
        answering = {*self}
        return [name for name, model in self._models.items() if name in answering or model.refused]

    def state(self, name: str) -> dict[str, Any]:
        """Say which versions of a model answer and which cannot; the fields of `ModelState`."""
        model = self._model(name)
        bad = {v: self._source.relative(r.reason) for v, r in model.refused.items()}
        bad |= {v: "its files are gone" for v in model.versions if v not in model.found}
        listed = [{"version": v, "reason": reason} for v, reason in sorted(bad.items())]
        return {
            "version": model.answers,
            "versions": list(model.versions),
            "on_request": list(model.found) if self._waits(name) else [],
            "refused": [entry for entry in listed if entry["version"] not in model.versions],
            "changed": [entry for entry in listed if entry["version"] in model.versions],
            "pinned": model.pinned,
            "pin_problem": model.pin_problem and self._source.relative(model.pin_problem),
        }

    def count_refused(self, name: str) -> int:
        """Count the versions that cannot be served, but for those that are being published."""
        model = self._model(name)
        refused = {v: r for v, r in model.refused.items() if v not in model.versions}
        return sum(not refusal.incomplete for refusal in refused.values())

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
                elif self._waits(name):
                    reason = "loaded when it is asked for"
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
        if self._waits(name):
            await self._load_awaited(name)
        model = self._model(name)
        if not model.found:
            raise NotFound("no such model in the checkpoints")
        if not model.versions:
            reasons = {self._source.relative(refusal.reason) for refusal in model.refused.values()}
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
        due = loop.time() + self._poll_seconds()
        while True:
            await asyncio.sleep(_POLL_CONTROL)
            try:
                if loop.time() >= due or self._control.read() != self._done:
                    due = loop.time() + self._poll_seconds()
                    # not in the loader thread, where models on this machine are loaded meanwhile
                    listing = await asyncio.to_thread(self._list)
                    await loop.run_in_executor(self._loader, self.update, listing)
                    due = loop.time() + self._poll_seconds()
            except Exception:  # the next scan may succeed, and what is served is served
                _log.exception("looking for new versions failed")

    def _poll_seconds(self) -> float:
        """Draw the time until the next scan: replicas that started together do not stay so."""
        return self._settings.poll_seconds * random.uniform(0.9, 1.1)  # noqa: S311  no secret

    def close(self) -> None:
        """Load no more versions than the one that is being loaded."""
        self._closing = True

    def update(self, listing: _Listing | None = None) -> None:
        """Carry out the latest control message and follow the source; in the loader thread."""
        if self._changed:  # the last requests of what was served are mostly done by now
            release_freed_memory()
        before = self._served()
        message = self._control.read()
        for name in self._models:
            if message != self._done:  # what was refused is tried again
                self._change(name, refused={})
            if name in message.unloaded:
                self._change(name, versions={}, answers=None)
        self._follow(listing or self._list(), message.unloaded)
        marks = self._marks.items()
        self._marks = {(n, v): mark for (n, v), mark in marks if v in self.versions(n)}
        self._changed = self._served() != before
        if message != self._done:
            self._control.acknowledge(message)
            self._done = message

    def _list(self) -> _Listing:
        number = next(self._listings)
        try:
            return _Listing(number, self._source.find(), self._source.problem)
        except Exception as error:  # what is served stays served
            foreseen = isinstance(error, (OSError, StorageUnavailable))
            reason = f"the checkpoints cannot be listed: {error if foreseen else repr(error)}"
            return _Listing(number, None, self._source.relative(reason))

    def _follow(self, listing: _Listing, unloaded: frozenset[str]) -> None:
        number, found, problem = listing
        if number < self._followed:
            return
        self._followed = number
        if problem != self.problem:
            _log.warning(problem or "the checkpoints can be listed again")
        self.problem = problem
        if found is None:
            return
        known = self._models.keys()  # a name without versions was perhaps never a model
        found = {name: versions for name, versions in found.items() if versions or name in known}
        first = self.default if not known else None  # loaded at the start, whoever asks for it
        for name in sorted({*known, *found}):
            versions = found.get(name, ())
            self._change(name, found=versions)
            if name in found and name not in unloaded:
                before = self._model(name)
                if before.versions or not self._settings.max_loaded_models or name == first:
                    self._refresh(name, versions)
                else:  # what may be read again is tried when it is asked for
                    mark = partial(self._source.mark, name)
                    refused = {v: r for v, r in before.refused.items() if mark(v) == r.mark}
                    self._change(name, refused=refused)
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
                reason = (str(error) or type(error).__name__)[:_REASON]
                incomplete = isinstance(error, CheckpointIncomplete)  # as while it is published
                _log.log(
                    logging.INFO if incomplete else logging.ERROR,
                    "version refused" if served is None else "version changed, served from memory",
                    extra={FIELDS: {"reason": reason}},
                    exc_info=_log.isEnabledFor(logging.DEBUG),
                )
                self.loads[name, "refused"] += not incomplete
                return _Refusal(reason, mark, incomplete)
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
        refused = [refusal for _, m in models for refusal in m.refused.values()]
        if not any(self):
            reasons = "; ".join(refusal.reason for refusal in refused)
            raise ModelStoreError(f"no model can be served: {reasons}")
        problems = [refusal.reason for refusal in refused if not refusal.incomplete]
        problems += [f"{name}: {m.pin_problem}" for name, m in models if m.pin_problem]
        if strict and problems:
            raise ModelStoreError(f"DROPSERVE_STRICT_START is set, and {'; '.join(problems)}")

    def _no_model(self, name: str | None) -> NotFound:
        if name is None:
            return NotFound("the default model is not served now")
        if not any(self):
            return NotFound("no such model; none is served")
        return NotFound(f"no such model; served are {_listed(self)}{did_you_mean(name, self)}")


def plain_number(text: str) -> int:
    """Read a number from a path: as it is written and not too long; -1: it is something else."""
    return int(text) if _NUMBER.fullmatch(text) else -1


def _listed(names: Iterable[object]) -> str:
    first = [str(name) for name in islice(names, _LISTED + 1)]
    return ", ".join([*first[:_LISTED], "..."] if len(first) > _LISTED else first)
