"""Safetensors and JSON files: validated when they are read, flushed to disk when written."""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from dropserve.models.errors import CheckpointNotWritten, CheckpointRefused, ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor  # what reads and writes JSON alone starts without PyTorch

T = TypeVar("T", bound="DataclassInstance")
MAX_HEADER_BYTES = 1_000_000
MAX_TENSORS = 10_000
_FREE = "free some space"
_PERMIT = "make it writable, or choose another folder"
_REMEDIES = {
    errno.ENOSPC: _FREE, errno.EDQUOT: _FREE, errno.EFBIG: "raise the limit on a file's size",
    errno.EROFS: _PERMIT, errno.EACCES: _PERMIT, errno.EPERM: _PERMIT, errno.EIO: "check the disk",
}  # fmt: skip


def read_once(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; CheckpointRefused for all else.

    Links, pipes and files that change meanwhile are refused. The file is not mapped: a mapped file
    that is truncated later kills the process.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointRefused(path, "not a plain file")
            if status.st_size > limit:
                raise CheckpointRefused(path, f"{status.st_size} bytes, more than {limit}")
            raw = file.read(status.st_size + 1)
    except OSError as error:
        why = "a symbolic link: put the file itself there" if path.is_symlink() else error.strerror
        raise CheckpointRefused(path, f"cannot be opened: {why}") from error
    if len(raw) != status.st_size:
        raise CheckpointRefused(path, "changed while it was being read")
    return raw


def read_if_there(path: Path, limit: int) -> bytes | None:
    """Do as `read_once`; None where there is no such file."""
    try:
        return read_once(path, limit)
    except CheckpointRefused as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def parse_tensors(path: Path, raw: bytes) -> "dict[str, Tensor]":
    """Read tensors from the bytes of a safetensors file; CheckpointRefused if they are invalid.

    The library checks offsets: no overlap, no hole, no byte left over.
    """
    import safetensors.torch

    check_header(path, raw)
    try:
        return safetensors.torch.load(raw)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointRefused(path, f"invalid safetensors: {error}") from error


def dump_tensors(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None
) -> bytes:
    """Return the bytes of a safetensors file; CheckpointRefused if a reader would refuse them.

    Of copies, because safetensors refuses tensors that share memory, as tied weights do.
    """
    import safetensors.torch

    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    raw = safetensors.torch.save(copies, metadata)
    check_header(path, raw)
    return raw


def check_header(path: Path, raw: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file; CheckpointRefused if it claims too much."""
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > MAX_HEADER_BYTES:
        raise CheckpointRefused(path, f"not safetensors: a header of {size} bytes")
    if size > len(raw) - 8:
        raise CheckpointRefused(path, "truncated in its header")
    header = parse_json(path, raw[8 : 8 + size])
    if len(header) > MAX_TENSORS + 1:
        raise CheckpointRefused(path, f"{len(header)} tensors, more than {MAX_TENSORS}")
    return header


def parse_json(path: Path | str, raw: bytes) -> dict[str, Any]:
    """Parse a JSON object; CheckpointRefused for a duplicate name, which most parsers accept.

    Refused too is what a response cannot hold: integers of more than 64 bits, text that is not
    Unicode, and values nested deeper than some 250 times.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("duplicate name")
        return values

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
        orjson.dumps([[[[value]]]])  # a response nests it as deep
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointRefused(path, f"invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointRefused(path, "not a JSON object")
    return value


def parse_dataclass(
    name: str, kind: type[T], values: Mapping[str, Any], optional: Collection[str] = ()
) -> T:
    """Build a dataclass strictly from JSON's values; ConfigError says what is wrong.

    All fields are needed but the `optional` ones, which earlier releases did not write.
    """
    try:
        made = TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        wrong = [".".join([name, *map(str, e["loc"])]) + f": {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(wrong)) from error
    if missing := {f.name for f in fields(kind)} - values.keys() - {*optional}:
        raise ConfigError(f"{name}: {min(missing)} is missing")
    return made


@contextmanager
def changing(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError of the block into CheckpointNotWritten: `path` cannot `what`, the remedy."""
    try:
        yield
    except OSError as error:
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        reason = f"cannot {what}: {error.strerror or error}{remedy}"
        raise CheckpointNotWritten(f"{path}: {reason}") from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Replace a file: a reader, or a crash, finds the old one or the new one.

    OSError: it is the old one, and no half-written one is left; or the new one may not last.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    try:
        write_durably(part, data)
        part.replace(path)
    except OSError:
        with suppress(OSError):  # the first error is the one to report
            part.unlink()
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, and flush their names to disk."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it lasts."""
    with open_folder(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Yield a descriptor of a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder for the length of the block; BlockingIOError if another process does."""
    make_folder(folder)
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
