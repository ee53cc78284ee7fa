"""Versions in object storage, read through a cache on disk.

A version is the objects `<name>/<version>/{model.json,model.safetensors,manifest.json}`. Whoever
publishes one creates its model.json first, by a write that fails if there is one: that gives it the
number. Its manifest comes last: without one, a version is incomplete and is not read. What is read
is compared with the size and the SHA-256 that the manifest has for it.

The cache has a folder for each version that was read, below one named after its manifest's digest.
Processes share it: one at a time downloads, and what another one reads is not removed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dropserve.models import checkpoint, storage
from dropserve.models.errors import (
    CheckpointError,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointNotWritten,
    CheckpointRefused,
    StorageUnavailable,
)
from dropserve.models.object_storage import open_store, unavailable
from dropserve.models.repository import Folder, Repository

if TYPE_CHECKING:
    from torch import nn

_FILES = (checkpoint.METADATA, checkpoint.WEIGHTS, checkpoint.MANIFEST)
_MANIFEST_BYTES = storage.MAX_HEADER_BYTES
_PART = 8 * 2**20
"""Bytes of one request, which the time limit of requests is for."""
_RETRY_SECONDS = 1.0, 300.0
"""Seconds until what failed is read again: at first, doubled with each failure, and at most."""
_ABANDONED = timedelta(days=1)
"""Age at which an incomplete version is nobody's."""
_KEY = 16
"""Digits of a manifest's SHA-256 in a folder's name."""
Objects = dict[str, str]
"""File: what changes when the object does, its entity tag or else its time and size."""


@dataclass
class _Listing:
    """What the storage holds."""

    versions: dict[str, dict[int, Objects]] = field(default_factory=dict)
    pins: dict[str, str] = field(default_factory=dict)
    changed: dict[tuple[str, int], datetime] = field(default_factory=dict)


@dataclass(frozen=True)
class _Failure:
    """A version that could not be downloaded: its objects then, how often, when to try again."""

    objects: Objects
    times: int
    due: float  # of time.monotonic()


class Bucket(Repository):
    """A prefix in object storage, whose versions are cached in a folder of `cache_bytes` at most.

    The newest version read stays in the cache even if it is larger. With `start_from_cache`, `find`
    may return the last listing that the cache has seen, until the storage has answered once;
    `problem` then says so.

    Raises:
        StorageUnavailable: the URL or the credentials are of no use.
    """

    def __init__(
        self, url: str, cache: Path, cache_bytes: int, *, start_from_cache: bool = False
    ) -> None:
        self.where: str = url
        self._store = open_store(self.where)
        self._cache, self._cache_bytes = cache, cache_bytes
        self._start_from_cache = start_from_cache
        key = hashlib.sha256(self.where.encode()).hexdigest()[:_KEY]
        self._known = cache / f"listing-{key}.json"
        self._workspaces = cache / f"training-{key}"
        self._listing: _Listing | None = None
        self._manifests: dict[str, str] = {}  # entity tag of a manifest: its SHA-256
        self._pins: dict[str, tuple[str, int]] = {}  # by model: entity tag of the pin, the version
        self._failed: dict[tuple[str, int], _Failure] = {}

    def relative(self, text: str) -> str:
        """Shorten the places that a message names, in the storage and in the cache."""
        cached = rf"{re.escape(str(self._cache))}/versions/[0-9a-f]{{{_KEY}}}/"
        return re.sub(cached, "", super().relative(text))

    # What there is

    def find(self) -> dict[str, list[int]]:
        """List all by one listing, of a request for every thousand objects."""
        try:
            self._listing, self.problem = self._list(), None
        except StorageUnavailable as error:
            started = self._listing is not None and self.problem is None
            if started or not self._start_from_cache:
                raise
            self._restore(error)
        assert self._listing is not None  # noqa: S101  for the type checker
        return {name: sorted(found) for name, found in self._listing.versions.items()}

    def versions(self, name: str) -> list[int]:
        """List a model's complete versions, in ascending order."""
        found = self._require_listing().versions.get(name, {})
        return sorted(version for version, objects in found.items() if _is_complete(objects))

    def mark(self, name: str, version: int) -> Hashable:
        """Return what changes when the objects do, or when a failed download is due again."""
        objects = self._require_listing().versions.get(name, {}).get(version)
        if objects is None:
            return None
        failure = self._failed.get((name, version))
        if failure is None or failure.objects != objects:
            return tuple(sorted(objects.items())), 0
        due = time.monotonic() >= failure.due
        return tuple(sorted(objects.items())), failure.times - (0 if due else 1)

    def pinned(self, name: str) -> int | None:
        """Return the pinned version; the pin is read when it has changed."""
        tag = self._require_listing().pins.get(name)
        if tag is None:
            return None
        known = self._pins.get(name)
        if known is None or known[0] != tag:
            place = f"{self.where}/{name}/{checkpoint.PIN}"
            raw = self._get(f"{name}/{checkpoint.PIN}", checkpoint.MAX_PIN_BYTES)
            known = self._pins[name] = tag, checkpoint.parse_pin(place, raw)
            self._remember()
        return known[1]

    def _require_listing(self) -> _Listing:
        if self._listing is None:
            self.find()
        assert self._listing is not None  # noqa: S101  for the type checker
        return self._listing

    def _list(self) -> _Listing:
        found = _Listing()
        with unavailable(f"{self.where}: cannot be listed"):
            objects = self._store.list().collect()
        for entry in objects:
            name, *rest = entry["path"].split("/")
            tag = entry["e_tag"] or f"{entry['last_modified'].isoformat()} {entry['size']}"
            if not checkpoint.is_name(name):
                continue
            if rest == [checkpoint.PIN]:
                found.pins[name] = tag
            elif len(rest) == 2 and checkpoint.is_version(rest[0]) and rest[1] in _FILES:
                version = int(rest[0])
                found.versions.setdefault(name, {}).setdefault(version, {})[rest[1]] = tag
                key, changed = (name, version), entry["last_modified"]
                found.changed[key] = max(found.changed.get(key, changed), changed)
        return found

    # Reading

    @contextmanager
    def local(self, name: str, version: int) -> Iterator[Path]:
        """Have a version in the cache for the length of the block.

        Raises:
            CheckpointNotFound: it is not there.
            CheckpointIncomplete: it has no manifest yet.
            CheckpointRefused: an object is not what the manifest says, or was replaced meanwhile.
            StorageUnavailable: it cannot be read.
            CheckpointNotWritten: the cache cannot be written.
        """
        objects = self._require_listing().versions.get(name, {}).get(version)
        if objects is None:
            raise CheckpointNotFound(f"{self.place(name, version)}: no such checkpoint")
        folder: Path | None = None
        try:
            if not _is_complete(objects):
                missing = ", ".join(sorted({*_FILES} - objects.keys()))
                reason = f"incomplete: no {missing}; it is being uploaded, or was not to the end"
                raise CheckpointIncomplete(self.place(name, version), reason)
            folder, manifest = self._folder(name, version, objects)
            with self._held(name, version, manifest, folder):
                os.utime(folder)
                yield folder
        except CheckpointError as error:
            if isinstance(error, CheckpointIncomplete) or (folder and _is_intact(folder)):
                raise  # another try would find the same
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            self._manifests.pop(objects[checkpoint.MANIFEST], None)
            self._note_failure(name, version, objects)
            raise
        self._failed.pop((name, version), None)
        self._remember()

    def _note_failure(self, name: str, version: int, objects: Objects) -> None:
        before = self._failed.get((name, version))
        times = before.times + 1 if before and before.objects == objects else 1
        first, most = _RETRY_SECONDS
        due = time.monotonic() + min(most, first * 2 ** (times - 1))
        self._failed[name, version] = _Failure(objects, times, due)

    def _folder(self, name: str, version: int, objects: Objects) -> tuple[Path, bytes]:
        """Name the folder of a version in the cache, and return its manifest."""
        tag = objects[checkpoint.MANIFEST]
        if tag in self._manifests:
            folder = self._cached(name, version, self._manifests[tag])
            with suppress(CheckpointRefused):
                return folder, storage.read_once(folder / checkpoint.MANIFEST, _MANIFEST_BYTES)
        manifest = self._get(f"{name}/{version}/{checkpoint.MANIFEST}", _MANIFEST_BYTES)
        self._manifests[tag] = digest = hashlib.sha256(manifest).hexdigest()
        return self._cached(name, version, digest), manifest

    @contextmanager
    def _held(self, name: str, version: int, manifest: bytes, folder: Path) -> Iterator[None]:
        """Download a version that is not in the cache, and keep it there during the block."""
        with storage.changing(self._cache, "keep downloaded versions"):
            storage.make_folder(self._cache)
            lock = (self._cache / "lock").open("wb")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until another process has downloaded its version
            if not folder.is_dir():
                self._download(name, version, manifest, folder)
            with storage.open_folder(folder) as held:
                fcntl.flock(held, fcntl.LOCK_SH)
                self._evict()
                fcntl.flock(lock, fcntl.LOCK_UN)
                yield

    def _download(self, name: str, version: int, manifest: bytes, folder: Path) -> None:
        place = self.place(name, version)
        listed = checkpoint.parse_manifest(f"{place}/{checkpoint.MANIFEST}", manifest)
        with storage.changing(folder, "keep a downloaded version"):
            storage.make_folder(folder.parent)
            for left in self._cache.glob(".new-*"):  # by a killed process: this one has the lock
                shutil.rmtree(left, ignore_errors=True)
            with TemporaryDirectory(
                prefix=".new-", dir=self._cache, ignore_cleanup_errors=True
            ) as made:
                for file in (checkpoint.METADATA, checkpoint.WEIGHTS):
                    self._fetch(f"{name}/{version}/{file}", listed[file], Path(made, file))
                storage.write_durably(Path(made, checkpoint.MANIFEST), manifest)
                Path(made).rename(folder)

    def _fetch(self, key: str, expected: object, path: Path) -> None:
        """Download an object in parts, and compare it with what the manifest says of it."""
        place = f"{self.where}/{key}"
        if not isinstance(expected, dict) or type(size := expected.get("bytes")) is not int:
            raise CheckpointRefused(place, f"{checkpoint.MANIFEST} does not say how long it is")
        if not 0 <= size <= checkpoint.MAX_BYTES:
            raise CheckpointRefused(place, f"{size} bytes, more than {checkpoint.MAX_BYTES}")
        digest, got = hashlib.sha256(), 0
        with path.open("xb") as file:
            while got < size:
                asked = min(_PART, size - got)
                part = self._get(key, asked, start=got)
                digest.update(part)
                file.write(part)
                got += len(part)
                if len(part) < asked:
                    break
            file.flush()
            os.fsync(file.fileno())
        if got != size or digest.hexdigest() != expected.get("sha256"):
            has = f"{got} bytes and SHA-256 {digest.hexdigest()}"
            reason = f"damaged or replaced: it has {has}, {checkpoint.MANIFEST} says otherwise"
            raise CheckpointRefused(place, reason)

    def _get_manifest(self, name: str, version: int) -> bytes:
        return self._get(f"{name}/{version}/{checkpoint.MANIFEST}", _MANIFEST_BYTES)

    def _get(self, key: str, size: int, start: int = 0) -> bytes:
        """Read so many bytes of an object, or those that there are."""
        try:
            with unavailable(f"{self.where}/{key}: cannot be read"):
                found = self._store.get(key, options={"range": (start, start + size)})
                return bytes(found.bytes())
        except FileNotFoundError as error:
            raise CheckpointRefused(f"{self.where}/{key}", "removed while it was read") from error

    # The cache

    def _evict(self) -> None:
        """Remove versions from the cache, those not used for longest first, until it is in bounds.

        Those that a process reads stay.
        """
        sizes: dict[Path, int] = {}
        used: dict[Path, float] = {}
        for folder in self._cache.glob("versions/*/*/[1-9]*"):
            with suppress(OSError):
                sizes[folder] = sum(file.stat().st_size for file in folder.iterdir())
                used[folder] = folder.stat().st_mtime
        left = sum(sizes.values())
        for folder in sorted(used, key=used.__getitem__):
            if left <= self._cache_bytes:
                break
            with suppress(OSError), storage.open_folder(folder) as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                left -= sizes[folder]
                folder.parent.rmdir()  # unless it holds another version
                folder.parent.parent.rmdir()

    def _remember(self) -> None:
        """Keep what is listed, for a start without the storage."""
        listing = self._require_listing()
        known = {
            "where": self.where,
            "listed": time.time(),
            "versions": listing.versions,
            "pins": self._pins,
            "manifests": self._manifests,
        }
        with suppress(OSError):  # it is of use only if the next start finds no storage
            storage.replace_durably(self._known, json.dumps(known).encode())

    def _restore(self, error: StorageUnavailable) -> None:
        """Take what the cache holds of the last listing; raise `error` if that is nothing."""
        try:
            known = json.loads(self._known.read_bytes())
            kept, self._manifests = known["versions"], known["manifests"]
            self._pins = {name: (tag, version) for name, (tag, version) in known["pins"].items()}
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(known["listed"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise error from None
        versions = {
            name: {int(v): objects for v, objects in found.items() if self._has(name, v, objects)}
            for name, found in kept.items()
        }
        if not any(versions.values()):
            raise error
        self._listing = _Listing(versions, {name: tag for name, (tag, _) in self._pins.items()})
        self.problem = f"started from the cache, as of {when}: {error}"

    def _has(self, name: str, version: str, objects: Mapping[str, str]) -> bool:
        digest = self._manifests.get(objects.get(checkpoint.MANIFEST, ""), "")
        return self._cached(name, version, digest).is_dir()

    def _cached(self, name: str, version: object, digest: str) -> Path:
        return self._cache / "versions" / digest[:_KEY] / name / str(version)

    # Publishing

    def save(self, module: "nn.Module", metadata: checkpoint.Metadata) -> int:
        """Publish the next version; of two that are published at once, each gets a number.

        CheckpointNotWritten: it is not there, or incomplete, and the next one removes it.
        """
        files, name = checkpoint.dump(module, metadata), metadata.name
        self.find()
        self._remove_abandoned(name)
        version = max(self._require_listing().versions.get(name, {}), default=0) + 1
        while not self._create(f"{name}/{version}/{checkpoint.METADATA}", files):
            version += 1
        weights = f"{name}/{version}/{checkpoint.WEIGHTS}"
        with self._writing(weights):
            self._store.put(weights, files[checkpoint.WEIGHTS])
        manifest = f"{name}/{version}/{checkpoint.MANIFEST}"
        if not self._create(
            manifest, files
        ):  # perhaps by us: a write whose answer is lost is sent again
            found = self._get(manifest, _MANIFEST_BYTES)
            if found != files[checkpoint.MANIFEST]:
                raise CheckpointNotWritten(f"{self.where}/{manifest}: another one was written")
        self.find()
        return version

    def _create(self, key: str, files: Mapping[str, bytes]) -> bool:
        """Write a file as a new object; False: there is one already."""
        from obstore.exceptions import AlreadyExistsError

        raw = files[key.rpartition("/")[2]]
        try:
            with self._writing(key):
                self._store.put(key, raw, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            with unavailable(f"{self.where}/{key}: cannot be written"):
                yield
        except StorageUnavailable as error:
            raise CheckpointNotWritten(str(error)) from error

    def _remove_abandoned(self, name: str) -> None:
        listing = self._require_listing()
        newest = max(listing.changed.values(), default=None)  # by the storage's clock
        for version, objects in listing.versions.get(name, {}).items():
            age = newest - listing.changed[name, version] if newest else timedelta()
            if age > _ABANDONED and not _is_complete(objects):
                self._delete(name, version, objects)

    def pin(self, name: str, version: int | None) -> None:
        """Pin a version, or none, by one write."""
        key = f"{name}/{checkpoint.PIN}"
        with self._writing(key):
            if version is None:
                with suppress(FileNotFoundError):
                    self._store.delete(key)
            else:
                self._store.put(key, checkpoint.dump_pin(version), use_multipart=False)
        self.find()

    def remove(self, name: str, version: int) -> bool:
        """Remove a version, its manifest first: without it the version is incomplete."""
        if self.pinned(name) == version:
            return False
        self._delete(name, version, self._require_listing().versions[name][version])
        self.find()
        return True

    def _delete(self, name: str, version: int, objects: Objects) -> None:
        for file in sorted(objects, key=_FILES.index, reverse=True):
            key = f"{name}/{version}/{file}"
            with self._writing(key), suppress(FileNotFoundError):
                self._store.delete(key)

    def workspace(self, name: str) -> Path:
        """Name a folder beside the cached versions."""
        return self._workspaces / name


def open_repository(
    where: Path | str, cache: Path, cache_bytes: int, *, start_from_cache: bool = False
) -> Repository:
    """Open a folder, or a URL of object storage, which is cached; see `Bucket`."""
    if isinstance(where, Path):
        return Folder(where)
    return Bucket(where, cache, cache_bytes, start_from_cache=start_from_cache)


def _is_complete(objects: Mapping[str, str]) -> bool:
    return objects.keys() >= {*_FILES}


def _is_intact(folder: Path) -> bool:
    """Say if the files of a folder are those of its manifest, so that nothing was damaged."""
    try:
        files = {file: storage.read_once(folder / file, checkpoint.MAX_BYTES) for file in _FILES}
        listed = checkpoint.parse_manifest(folder, files.pop(checkpoint.MANIFEST))
    except CheckpointError:
        return False
    return all(
        listed[file] == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for file, raw in files.items()
    )
