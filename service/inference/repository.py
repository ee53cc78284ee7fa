"""What is served, and how it comes and goes: by new folders, and by an operator's word."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from typing import Any, Generic, TypeVar

from dropserve.service.errors import InvalidRequest, NotFound, Overloaded
from dropserve.service.inference.registry import Registry, RegistryError
from dropserve.service.inference.reload import Folder, Pin, Reloader
from dropserve.service.inference.workers import ControlMessage, ControlState
from dropserve.service.settings import Settings

Served = TypeVar("Served")
_GLANCE = 0.1
"""Seconds between looks at the notice board."""
_PATIENCE = 60.0
"""Seconds for all workers to load or unload a model."""
_log = logging.getLogger("dropserve.versions")


class Repository(Generic[Served]):
    """Keeps the registry equal to the checkpoints folder and to the notice board.

    Args:
        settings: how often to look, how many versions to keep, where they are.
        folder: where versions come from.
        loader: a thread that makes them ready.
        board: shared with other workers, if there are any.
        check: the default is resolved, and to serve no model is an error now; with the setting
            strict_start, also to refuse any version. Workers do not: their parent did, and one may
            take a dead one's place when a bad version has come, or all models are unloaded.

    Attributes:
        registry: what is served.

    Raises:
        RegistryError: no model can be served, or there is no such default.
        OSError: the checkpoints cannot be listed.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Folder[Served],
        loader: Executor,
        board: ControlState | None,
        *,
        check: bool,
    ) -> None:
        self._where = f"{settings.checkpoints}/"
        self._poll = settings.poll_seconds
        self._loader = loader
        self._board = board or ControlState()
        self._obeyed = ControlMessage(number=-1)
        self.registry: Registry[Served] = Registry(
            settings.default_model, where=str(settings.checkpoints)
        )
        self._reloader = Reloader(
            self.registry, folder, settings.keep_versions, settings.default_version
        )
        if check:
            self._resolve_default(folder, settings.default_version)
        self._loader.submit(self._obey).result()
        if check:
            self._check(strict=settings.strict_start)

    @property
    def loads(self) -> Mapping[tuple[str, str], int]:
        """How often versions of a model were "loaded" or "refused"."""
        return self._reloader.loads

    def __iter__(self) -> Iterator[str]:
        return iter(self.registry)

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model that are served."""
        return list(self.registry.versions(name))

    async def keep_up(self) -> None:
        """Look for new versions and for other workers' notices, until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._poll
        while True:
            await asyncio.sleep(_GLANCE)
            try:
                if loop.time() >= due or self._board.read() != self._obeyed:
                    due = loop.time() + self._poll
                    await loop.run_in_executor(self._loader, self._obey)
                    due = loop.time() + self._poll
            except Exception:  # the next look may do better, and what is served is served
                _log.exception("looking for new versions failed")

    async def load(self, name: str) -> None:
        """Serve a model again, or look again at its versions that were refused; in every worker.

        Raises:
            NotFound: there is no such model in the checkpoints folder.
            InvalidRequest: none of its versions can be served; says why.
            Overloaded: not all workers have done it yet.
        """
        await self._post(name, loaded=True)
        if not self._reloader.found.get(name):
            raise NotFound("no such model in the checkpoints folder")
        if not self.registry.versions(name):
            refused: list[dict[str, Any]] = self.state(name)["refused"]
            reasons = {refusal["reason"] for refusal in refused} or {"unloaded again"}
            raise InvalidRequest(f"no version can be served: {'; '.join(sorted(reasons))}")

    async def unload(self, name: str) -> None:
        """Stop serving a model, in every worker; what it is at is finished.

        Raises:
            NotFound: it is not served.
            Overloaded: not all workers have done it yet.
        """
        if not self.registry.versions(name):
            raise self.registry.no_model(name)
        await self._post(name, loaded=False)

    def index(self) -> list[dict[str, str]]:
        """List every version there is: name, version, state READY or UNAVAILABLE, and reason."""
        found = self._reloader.found
        return [
            {"name": name, "version": str(version), **self._state(name, version)}
            for name in sorted({*found, *self.registry})
            for version in sorted({*found.get(name, ()), *self.registry.versions(name)})
        ]

    def state(self, name: str) -> dict[str, Any]:
        """Say which versions of a model answer and which cannot; the fields of `ModelState`."""
        model = self.registry.model(name)
        bad = {v: self._reason(r.error) for v, r in self._reloader.refused.get(name, {}).items()}
        there = self._reloader.found.get(name, ())
        bad |= {v: "its folder is gone" for v in model.versions if v not in there}
        listed = [{"version": v, "reason": reason} for v, reason in sorted(bad.items())]
        pin = self._reloader.pins.get(name, Pin())
        return {
            "version": model.answers,
            "versions": list(model.versions),
            "refused": [entry for entry in listed if entry["version"] not in model.versions],
            "changed": [entry for entry in listed if entry["version"] in model.versions],
            "pinned": pin.version,
            "pin_problem": pin.problem and pin.problem.replace(self._where, ""),
        }

    def models(self) -> list[str]:
        """Name all models that are served, or have versions that cannot be."""
        refused = (name for name, versions in self._reloader.refused.items() if versions)
        return sorted({*self.registry, *refused})

    def close(self) -> None:
        """Load no more versions than the one that is being loaded."""
        self._reloader.closing = True

    def _resolve_default(self, folder: Folder[Served], default_version: int | None) -> None:
        there = [name for name, versions in folder.find().items() if versions]
        self.registry.resolve_default(there)
        if self.registry.default is not None:
            return
        if default_version is not None:
            raise RegistryError(
                "DROPSERVE_DEFAULT_VERSION is of the default model: set DROPSERVE_DEFAULT_MODEL"
            )
        _log.warning(
            f"no default model: /predict is 404 until DROPSERVE_DEFAULT_MODEL is one of "
            f"{', '.join(there)}"
        )

    def _check(self, *, strict: bool) -> None:
        """Raise if there is nothing to serve, or anything to complain of in a strict start."""
        problems = [
            str(refusal.error) or type(refusal.error).__name__
            for refusals in self._reloader.refused.values()
            for refusal in refusals.values()
        ]
        if not any(self.registry):
            raise RegistryError(f"no model can be served: {'; '.join(problems)}")
        problems += [
            f"{name}: {pin.problem}" for name, pin in self._reloader.pins.items() if pin.problem
        ]
        if strict and problems:
            raise RegistryError(f"DROPSERVE_STRICT_START is set, and {'; '.join(problems)}")

    def _obey(self) -> None:
        """Do as the notice board says, and look for new versions."""
        notice = self._board.read()
        if notice != self._obeyed:
            self._reloader.forget()
        self._reloader.left_out = notice.unloaded
        self._reloader.look()
        if notice != self._obeyed:
            self._board.obeyed(notice)
            self._obeyed = notice

    async def _post(self, name: str, *, loaded: bool) -> None:
        run = asyncio.get_running_loop().run_in_executor
        try:
            async with asyncio.timeout(_PATIENCE):
                notice = await run(self._loader, lambda: self._board.post(name, loaded=loaded))
                await run(self._loader, self._obey)
                await self._board.all_obeyed(notice)
        except TimeoutError:
            text = "some workers have not done it yet, and will: ask for the index"
            raise Overloaded(text) from None

    def _state(self, name: str, version: int) -> dict[str, str]:
        state = self.state(name)
        refused, changed = (
            {entry["version"]: entry["reason"] for entry in state[kind]}
            for kind in ("refused", "changed")
        )
        if version in changed:
            return {"state": "READY", "reason": f"served from memory: {changed[version]}"}
        if version in state["versions"]:
            return {"state": "READY", "reason": ""}
        reason = refused.get(version, "older than the versions that are kept")
        unloaded = name in self._reloader.left_out
        return {"state": "UNAVAILABLE", "reason": "unloaded" if unloaded else reason}

    def _reason(self, error: Exception) -> str:
        """Say what is wrong with a version, without saying where the checkpoints lie."""
        return str(error).replace(self._where, "") or type(error).__name__
