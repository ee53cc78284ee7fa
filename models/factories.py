"""Networks of one's own: a factory is a user's callable that returns a module.

It is named `package.module:factory`, which is imported, or `path/to/file.py:factory`, whose file is
run as a module of its own. A relative path starts in the working directory.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from dropserve.models.errors import ConfigError

FORMS = "package.module:factory or path/to/file.py:factory"


def trusted(name: str, allowed: Collection[str]) -> str:
    """Return which of the allowed factories `name` means; ConfigError if none, or several may be.

    A network may be served where its file is in another folder than where it was trained: a file
    is identified by its path, or else by its own name, if only one of that name is allowed.
    """
    if name in allowed:
        return name
    own = {other: other.rpartition("/")[2] for other in (name, *allowed)}  # file.py:factory
    alike = [other for other in allowed if _is_file(other) and own[other] == own[name]]
    same = [other for other in alike if os.path.normpath(other) == os.path.normpath(name)]
    if len(found := same[:1] or alike) == 1:
        return found[0]
    if found:
        raise ConfigError(f"the factory {name!r} could be {' or '.join(found)}: allow one of them")
    raise ConfigError(
        f"the factory {name!r} is not trusted here: name it in DROPSERVE_FACTORIES if you want "
        f"this checkpoint to import and call it; named there: "
        + (", ".join(own[other] for other in allowed) or "none")
    )


def _is_file(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def call_factory(name: str, arguments: Mapping[str, object]) -> object:
    """Import a factory and call it; ConfigError if it is not there, or fails."""
    where, _, attribute = name.rpartition(":")
    try:
        if not _is_file(name):
            return getattr(importlib.import_module(where), attribute)(**arguments)
        with _run(Path(where)) as module:
            return getattr(module, attribute)(**arguments)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error


@contextmanager
def _run(file: Path) -> Iterator[ModuleType]:
    """Run a file anew; for the length of the block it can import its neighbours.

    It may `import blocks`, as a script does, or `from .blocks import Block`, as a package does.
    Files and neighbours of one name in two folders are different modules: the package's name is
    made of the path, and what was imported as a script does is removed again.
    """
    file = file.resolve()
    folder = str(file.parent)
    neighbours = {path.name.partition(".")[0] for path in file.parent.iterdir()}
    package = ModuleType(f"_factory_{sha256(bytes(file)).hexdigest()[:16]}")
    package.__path__ = [folder]
    name = f"{package.__name__}.{file.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    _forget({package.__name__})
    before = set(sys.modules)
    sys.modules |= {package.__name__: package, name: module}
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        _forget((set(sys.modules) - before) & neighbours)


def _forget(packages: Collection[str]) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]
