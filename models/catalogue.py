"""Which versions of which models there are: folder names alone, so that asking is quick."""

import re
from difflib import get_close_matches
from pathlib import Path

from models.errors import CheckpointNotFound


def is_name(name: str) -> bool:
    """Say if `name` can name a model: 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot."""
    return re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,64}", name) is not None


def versions(root: Path, name: str) -> list[int]:
    """List a model's versions, in ascending order; folders that are not numbers are no versions."""
    folder = root / name
    if not is_name(name) or not folder.is_dir():
        return []
    numbered = (d for d in folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,8}", d.name))
    return sorted(int(d.name) for d in numbered if d.is_dir())


def names(root: Path) -> list[str]:
    """List the folders under `root` that may hold a model's versions, in order."""
    return sorted(d.name for d in root.iterdir() if is_name(d.name)) if root.is_dir() else []


def choose(root: Path, name: str, version: int | None = None) -> int:
    """Return a version that is there: the latest where None is asked for.

    Raises:
        CheckpointNotFound: it is not; says which there are.
    """
    found = versions(root, name)
    if not found:
        known = [other for other in names(root) if versions(root, other)]
        like = "".join(f"; did you mean {x}?" for x in get_close_matches(name, known, 1))
        there = f"there are {', '.join(known)}{like}" if known else "there is none"
        raise CheckpointNotFound(f"no model {name!r} in {root}: {there}")
    if version not in (None, *found):
        there = ", ".join(map(str, found))
        raise CheckpointNotFound(f"no version {version} of {name!r} in {root}: there are {there}")
    return version or found[-1]


def mark(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return what changes when the files in a version's folder do, or who may read them."""
    try:
        files = [(path.name, path.lstat()) for path in sorted(folder.iterdir())]
    except OSError:  # it is going just now
        return ()
    return tuple((name, s.st_ctime_ns, s.st_size, s.st_ino) for name, s in files)


def default_name(dataset: str, network: str) -> str:
    """Name a model after its dataset, or the folder that holds it, and its network or factory."""
    name = f"{Path(dataset).resolve().name}-{network.rpartition(':')[2]}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".")[:64]
