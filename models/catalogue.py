"""Which versions of which models there are, and which is pinned: asking is quick, without torch."""

import json
import re
import shutil
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from dropserve.models.errors import CheckpointNotFound, CheckpointRefused
from dropserve.models.storage import parse_json, read_if_there, replace_durably, sync_folder

PIN = "pin.json"
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def is_name(name: str) -> bool:
    """Say if `name` can name a model: 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot."""
    return re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,64}", name) is not None


def versions(root: Path, name: str) -> list[int]:
    """List a model's versions, in ascending order; folders that are not numbers are no versions."""
    folder = root / name
    if not is_name(name) or not folder.is_dir():
        return []
    numbered = (d for d in folder.iterdir() if _VERSION.fullmatch(d.name))
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


def pinned(root: Path, name: str) -> int | None:
    """Return the version that is to answer whatever newer ones there are; None: the latest is.

    Raises:
        CheckpointRefused: the pin cannot be read.
    """
    path = root / name / PIN
    raw = read_if_there(path, 1000)
    if raw is None:
        return None
    version = parse_json(path, raw).get("version")
    if type(version) is not int or not _VERSION.fullmatch(str(version)):
        raise CheckpointRefused(path, 'not {"version": a number from 1 to 999999999}')
    return version


def pin(root: Path, name: str, version: int | None) -> None:
    """Pin a version, or none. What reads the folder finds the pin before or this one.

    Raises:
        OSError: it cannot be written.
    """
    path = root / name / PIN
    if version is None:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    else:
        replace_durably(path, json.dumps({"version": version}).encode() + b"\n")


def remove(root: Path, name: str, version: int) -> bool:
    """Remove a version: at once for whoever reads the folder, then its files; says if it was done.

    A version that is pinned meanwhile stays.

    Raises:
        CheckpointRefused: the pin cannot be read.
        OSError: it cannot be removed.
    """
    folder = root / name
    if pinned(root, name) == version:
        return False
    (folder / str(version)).rename(folder / f".removed-{version}")
    sync_folder(folder)
    for removed in folder.glob(".removed-*"):  # those of an interrupted removal, too
        with suppress(FileNotFoundError):  # another process is at it
            removed.unlink() if removed.is_symlink() else shutil.rmtree(removed)
    return True


def mark(folder: Path) -> tuple[tuple[str, int, int, int], ...] | None:
    """Return what changes when the files in a version's folder do, or who may read them.

    Returns:
        None where there is no such folder, or none that can be listed.
    """
    try:
        files = [(path.name, path.lstat()) for path in sorted(folder.iterdir())]
    except OSError:  # it is going just now
        return None
    return tuple((name, s.st_ctime_ns, s.st_size, s.st_ino) for name, s in files)


def default_name(dataset: str, network: str) -> str:
    """Name a model after its dataset, or the folder that holds it, and its network or factory."""
    name = f"{Path(dataset).resolve().name}-{network.rpartition(':')[2]}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".")[:64]
