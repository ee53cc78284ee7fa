"""Names and versions: which model a request means. Names are looked up, never joined to a path."""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from service.errors import NotFound

Served = TypeVar("Served")


class RegistryError(Exception):
    """There is nothing to serve, or nothing to serve by default."""


class Registry(Generic[Served]):
    """Every version of every model.

    Args:
        models: name to version to what is served.
        default: the model that is meant where none is named; None: the only one.
        where: the models come from, for messages.

    Attributes:
        default: name of the default model; None where there are several and none was chosen.

    Raises:
        RegistryError: there is no model, or no such default.
    """

    def __init__(
        self, models: Mapping[str, Mapping[int, Served]], default: str | None, where: str
    ) -> None:
        if not models:
            raise RegistryError(f"{where}: no checkpoint in it; make one with `dropserve train`")
        if default is not None and default not in models:
            raise RegistryError(
                f"{where}: the default model {default!r} is not in it; there are "
                f"{', '.join(sorted(models))}"
            )
        self._models = {name: dict(sorted(found.items())) for name, found in models.items()}
        self.default = default or (next(iter(models)) if len(models) == 1 else None)

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
        plain = version.isascii() and version.isdecimal() and len(version) <= 9
        number = int(version) if plain else 0
        if number not in versions:
            raise NotFound("no such version of the model; GET /v1/models lists them")
        return versions[number]

    def versions(self, name: str) -> list[int]:
        """List a model's versions, in ascending order."""
        return list(self._models[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)
