"""Names and versions: which model a request means. Names are looked up, never joined to a path."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from service.errors import NotFound

Served = TypeVar("Served")


class RegistryError(Exception):
    """There is nothing to serve, or nothing to serve by default."""


class Registry(Generic[Served]):
    """The versions of every model that are served; at first none.

    Any thread may look up while one thread replaces.

    Args:
        default: the model that is meant where none is named; None: see `open`.
        where: the models come from, for messages.

    Attributes:
        default: name of that model; None where there were several and none was chosen.
    """

    def __init__(self, default: str | None, where: str) -> None:
        self.default = default
        self._where = where
        self._models: Mapping[str, Mapping[int, Served]] = {}

    def open(self) -> None:
        """Settle the default, once the models of the start are there: later ones don't change it.

        Raises:
            RegistryError: there is no model, or no such default.
        """
        models = list(self._models)
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
        """Look up a version; the latest where none is asked for.

        Raises:
            NotFound: no such model or version, or no default.
        """
        if name is None and self.default is None:
            raise NotFound(
                "there are several models and no default: name one, or set DROPSERVE_DEFAULT_MODEL"
            )
        versions = self._models.get(self.default or "" if name is None else name)
        if versions is None:
            raise NotFound("no such model; GET /v1/models lists them")
        if version is None:
            return versions[max(versions)]
        number = plain_number(version)
        if number not in versions:
            raise NotFound("no such version of the model; GET /v1/models lists them")
        return versions[number]

    def versions(self, name: str) -> Mapping[int, Served]:
        """Return a model's versions, in ascending order; none where there is no such model."""
        return self._models.get(name, {})

    def replace(self, name: str, versions: Mapping[int, Served]) -> None:
        """Serve these versions of a model and no others; none: the model is not served."""
        models = {**self._models, name: dict(sorted(versions.items()))}
        # in one assignment, so that a lookup sees what was before or what is after
        self._models = {n: found for n, found in sorted(models.items()) if found}

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)


def plain_number(text: str) -> int:
    """Read a number from a path: plain decimal digits, not too many; -1: it is something else."""
    plain = text.isascii() and text.isdecimal() and len(text) <= 9
    return int(text) if plain else -1
