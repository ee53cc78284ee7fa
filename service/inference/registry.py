"""Names and versions: which model a request means. Names are looked up, never joined to a path."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from dropserve.service.errors import NotFound, did_you_mean

Served = TypeVar("Served")
_PLAIN = re.compile(r"0|[1-9][0-9]{0,8}")
_LISTED = 20
"""Names that an error lists."""


class RegistryError(Exception):
    """There is nothing to serve, or nothing to serve by default."""


@dataclass(frozen=True)
class Model(Generic[Served]):
    """A model as it is served at one moment.

    Attributes:
        versions: in ascending order; none: it is not served.
        answers: the one that is meant where none is named.
    """

    versions: Mapping[int, Served] = field(default_factory=dict)
    answers: int | None = None


class Registry(Generic[Served]):
    """The versions of every model that are served; at first none.

    Any thread may look up while one thread replaces.

    Args:
        default: the model that is meant where none is named; None: see `resolve_default`.
        where: the models come from, for messages.

    Attributes:
        default: name of that model; None where there were several and none was chosen.
    """

    def __init__(self, default: str | None, where: str) -> None:
        self.default = default
        self._where = where
        self._models: Mapping[str, Model[Served]] = {}

    def resolve_default(self, models: Sequence[str]) -> None:
        """Resolve the default by the models of the start: later ones do not change it.

        Raises:
            RegistryError: there is no model, or no such default.
        """
        if not models:
            raise RegistryError(
                f"{self._where}: no checkpoint in it; make one with `dropserve train`"
            )
        if self.default is not None and self.default not in models:
            raise RegistryError(
                f"{self._where}: the default model {self.default!r} is not in it; there are "
                f"{', '.join(models)}"
            )
        self.default = self.default or (models[0] if len(models) == 1 else None)

    def find(self, name: str | None = None, version: str | None = None) -> Served:
        """Look up a version; the one that answers where none is asked for.

        Raises:
            NotFound: no such model or version, or no default.
        """
        if name is None and self.default is None:
            raise NotFound(
                f"there are several models and no default: name one of {_listed(self._models)}, or "
                f"set DROPSERVE_DEFAULT_MODEL"
            )
        if name is None:
            name = self.default or ""
            if name not in self._models:
                raise NotFound("the default model is not served now")
        elif name not in self._models:
            raise self.no_model(name)
        model = self._models[name]
        number = model.answers if version is None else plain_number(version)
        if number is None or number not in model.versions:
            raise NotFound(f"no such version of the model; served are {_listed(model.versions)}")
        return model.versions[number]

    def no_model(self, name: str | None) -> NotFound:
        """Make the error that says which models there are, and which one was meant perhaps."""
        if not self._models:
            return NotFound("no such model; none is served")
        hint = did_you_mean(name or "", self._models)
        return NotFound(f"no such model; served are {_listed(self._models)}{hint}")

    def versions(self, name: str) -> Mapping[int, Served]:
        """Return a model's versions, in ascending order; none where there is no such model."""
        return self.model(name).versions

    def model(self, name: str) -> Model[Served]:
        """Return a model; one without versions where there is no such model."""
        return self._models.get(name) or Model()

    def replace(self, name: str, versions: Mapping[int, Served], pinned: int | None = None) -> None:
        """Serve these versions of a model and no others; none: the model is not served.

        Where no version is named the pinned one answers, or the latest if that is not among them.
        """
        models = {n: found for n, found in self._models.items() if n != name}
        if versions:
            answers = max(versions) if pinned is None or pinned not in versions else pinned
            models[name] = Model(dict(sorted(versions.items())), answers)
        # in one assignment, so that a lookup sees what was before or what is after
        self._models = dict(sorted(models.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)


def plain_number(text: str) -> int:
    """Read a number from a path: as it is written, and not too long; -1: it is something else."""
    return int(text) if _PLAIN.fullmatch(text) else -1


def _listed(names: Iterable[object]) -> str:
    """Write the first names of many."""
    first = [str(name) for name in islice(names, _LISTED + 1)]
    return ", ".join([*first[:_LISTED], "..."] if len(first) > _LISTED else first)
