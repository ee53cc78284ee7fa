"""Factories of networks: which may be called, and where their code is found.

A factory is named `package.module:factory`, which is imported, or `path/to/file.py:factory`, whose
file is run as a module of its own. A relative path starts in the working directory.
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
    """Return which of the names that are allowed is meant.

    A network may be served where its file lies in another folder than where it was trained: a file
    is known by its path, or else by its own name, if only one of that name is allowed.

    Raises:
        ConfigError: none is meant, or several files may be.
    """
    if name in allowed:
        return name
    alike = [other for other in allowed if _is_file(other) and _own_name(other) == _own_name(name)]
    same = [other for other in alike if os.path.normpath(other) == os.path.normpath(name)]
    found = same[:1] or alike
    if len(found) == 1:
        return found[0]
    named = ", ".join(map(_own_name, allowed)) or "none"
    raise ConfigError(
        f"the factory {name!r} could be {' or '.join(found)}: allow one of them"
        if found
        else f"the factory {name!r} is not trusted here: name it in DROPSERVE_FACTORIES if you "
        f"want this checkpoint to import and call it; named there: {named}"
    )


def call_factory(name: str, arguments: Mapping[str, object]) -> object:
    """Import what a name says, and call it.

    Raises:
        ConfigError: it is not there, or fails.
    """
    where, _, attribute = name.rpartition(":")
    try:
        if not _is_file(name):
            return getattr(importlib.import_module(where), attribute)(**arguments)
        with _run(Path(where)) as module:
            return getattr(module, attribute)(**arguments)
    except (Exception, SystemExit) as error:  # somebody's own code may fail in any way
        what = f"{name}: {type(error).__name__}: {error}"
        raise ConfigError(what + _collision(where, attribute, error)) from error


def _is_file(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def _own_name(name: str) -> str:
    """Leave out the folders of `path/to/file.py:factory`."""
    return name.rpartition("/")[2]


@contextmanager
def _run(file: Path) -> Iterator[ModuleType]:
    """Run a file, each time anew, and for the length of the block let it import its neighbours.

    It does so as a script, `import blocks`, or as a part of a package, `from .blocks import Block`.
    Files and neighbours of one name are different modules: the file is known to Python by a name
    that is made of its path, and a neighbour that it imports as a script does is forgotten.
    """
    file = file.resolve()
    folder = str(file.parent)
    package = ModuleType(f"_factory_{sha256(bytes(file)).hexdigest()[:16]}")
    package.__path__ = [folder]
    spec = importlib.util.spec_from_file_location(
        f"{package.__name__}.{file.stem.replace('.', '_')}", file
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    _forget({package.__name__})
    before = set(sys.modules)
    sys.modules |= {package.__name__: package, spec.name: module}
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        new = {name for name in set(sys.modules) - before if "." not in name}
        _forget({name for name in new if _place(sys.modules[name]).parent == file.parent})


def _forget(packages: Collection[str]) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


def _place(module: ModuleType) -> Path:
    """Return a package's folder, or a module's file."""
    known = vars(module)
    return Path(next(iter(known.get("__path__", ())), known.get("__file__") or ""))


def _collision(where: str, attribute: str, error: BaseException) -> str:
    """Say, if so, that Python takes another package for one's own, and what to do."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    is_file = _is_file(f"{where}:")
    wanted = missing or ("" if is_file or not isinstance(error, AttributeError) else where)
    package, *rest = wanted.split(".")
    if (found := sys.modules.get(package)) is None:
        return ""
    own, place = Path(package, *rest), _place(found).resolve()
    here = [file for file in (own.with_suffix(".py"), own / "__init__.py") if file.is_file()]
    if package not in ("models", "service") and (not here or place.parent == Path.cwd()):
        return ""
    file = here[0] if here else own.with_suffix(".py")
    remedy = f"name the file of yours, {file}:{attribute}"
    if is_file:
        remedy = "rename yours, or write `from .module import name`"
    return f"; {package!r} is another package here, {place}: {remedy}"
