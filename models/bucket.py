"""Versions in object storage, read through a cache on disk.

A version is the objects `<name>/<version>/{model.json,model.safetensors,manifest.json}`. Whoever
publishes one creates its model.json first, by a write that fails if there is one: that gives it the
number. Its manifest comes last: without one, a version is incomplete and is not read. What is read
is compared with the size and the SHA-256 that the manifest has for it.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from dropserve.models.version_cache import Held, VersionCache

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from torch import nn

_log = logging.getLogger(__name__)
_FILES = (checkpoint.METADATA, checkpoint.WEIGHTS, checkpoint.MANIFEST)
_MANIFEST_BYTES = storage.MAX_HEADER_BYTES
_PART = 8 * 2**20
"""Bytes of one request, which the time limit of requests is for."""
_RETRY_SECONDS = 1.0, 300.0
"""Seconds until what failed is read again: at first, doubled with each failure, and at most."""
_ABANDONED = timedelta(days=1)
"""Age at which an incomplete version is nobody's."""
Objects = dict[str, str]
"""File: its size, and what changes when the object does, its entity tag or else its time."""


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
    `problem` then says so. A thread may list while another reads.

    Raises:
        StorageUnavailable: the URL or the credentials are of no use.
    """

    def __init__(
        self, url: str, cache: Path, cache_bytes: int, *, start_from_cache: bool = False
    ) -> None:
        self.where: str = url
        self._store = open_store(self.where)
        self._cache = VersionCache(cache, cache_bytes)
        self._start_from_cache = start_from_cache
        key = hashlib.sha256(self.where.encode()).hexdigest()[:16]
        self._known = cache / f"listing-{key}.json"
        self._workspaces = cache / f"training-{key}"
        self._listing: _Listing | None = None
        self._manifests: dict[str, str] = {}  # entity tag of a manifest: its SHA-256
        self._pins: dict[str, tuple[str, int]] = {}  # by model: entity tag of the pin, the version
        self._failed: dict[tuple[str, int], _Failure] = {}
        self._refused = set[str]()  # names of objects that cannot be listed

    def relative(self, text: str) -> str:
        """Shorten the places that a message names, in the storage and in the cache."""
        return self._cache.relative(super().relative(text))

    # What there is

    def find(self) -> dict[str, list[int]]:
        """List all by one listing, of a request for every thousand objects."""
        try:
            self._listing, self.problem = self._list(), None
            self._remember()
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
        for entry in self._list_objects():
            name, *rest = entry["path"].split("/")
            tag = f"{entry['size']} {entry['e_tag'] or entry['last_modified'].isoformat()}"
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

    def _list_objects(self) -> "list[ObjectMeta]":
        """List all; where the name of an object is refused, as `a//b` is, all models but its own.

        A whole listing fails for one such name, so that it would stop the updates of all.
        """
        from obstore.exceptions import InvalidPathError

        refused = set[str]()
        with unavailable(f"{self.where}: cannot be listed"):
            try:
                found = [entry for page in self._store.list() for entry in page]
            except InvalidPathError:
                found = []
                for name in self._store.list_with_delimiter()["common_prefixes"]:
                    try:
                        found += [entry for page in self._store.list(prefix=name) for entry in page]
                    except InvalidPathError as error:
                        reason = str(error).partition("\n")[0]
                        refused.add(f"{self.where}/{name}: cannot be listed: {reason}")
        for reason in refused - self._refused:
            _log.error(reason)
        self._refused = refused
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
        if not _is_complete(objects):
            missing = ", ".join(sorted({*_FILES} - objects.keys()))
            reason = f"incomplete: no {missing}; it is being uploaded, or was not to the end"
            raise CheckpointIncomplete(self.place(name, version), reason)
        held: Held | None = None
        try:
            folder, manifest = self._folder(name, version, objects)
            listed = _listed(f"{self.place(name, version)}/{checkpoint.MANIFEST}", manifest)
            for file, about in listed.items():  # before others make room for it in the cache
                if (has := objects[file].partition(" ")[0]) != str(about["bytes"]):
                    reason = f"damaged or replaced: it has {has} bytes, the manifest says otherwise"
                    raise CheckpointRefused(f"{self.place(name, version)}/{file}", reason)
            size = len(manifest) + sum(file["bytes"] for file in listed.values())
            download = partial(self._download, name, version, manifest, listed)
            with self._cache.held(folder, size, download) as held:
                yield folder
        except CheckpointError:
            if held is None or held.damaged:  # else another try would find the same
                self._manifests.pop(objects[checkpoint.MANIFEST], None)
                self._note_failure(name, version, objects)
            raise
        if (failure := self._failed.get((name, version))) is not None:
            self._failed[name, version] = replace(failure, due=0.0)  # so that its mark stays
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
        if (known := self._manifests.get(tag)) is not None:
            folder = self._cache.path(name, version, known)
            with suppress(CheckpointRefused):
                return folder, storage.read_once(folder / checkpoint.MANIFEST, _MANIFEST_BYTES)
        manifest = self._get(f"{name}/{version}/{checkpoint.MANIFEST}", _MANIFEST_BYTES)
        self._manifests[tag] = digest = hashlib.sha256(manifest).hexdigest()
        return self._cache.path(name, version, digest), manifest

    def _download(
        self, name: str, version: int, manifest: bytes, listed: Mapping[str, Any], folder: Path
    ) -> None:
        for file in (checkpoint.METADATA, checkpoint.WEIGHTS):
            self._fetch(f"{name}/{version}/{file}", listed[file], folder / file)
        storage.write_durably(folder / checkpoint.MANIFEST, manifest)

    def _fetch(self, key: str, expected: Mapping[str, Any], path: Path) -> None:
        """Download an object in parts, and compare it with what the manifest says of it."""
        place, size = f"{self.where}/{key}", expected["bytes"]
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
        if got != size or digest.hexdigest() != expected["sha256"]:
            has = f"{got} bytes and SHA-256 {digest.hexdigest()}"
            reason = f"damaged or replaced: it has {has}, {checkpoint.MANIFEST} says otherwise"
            raise CheckpointRefused(place, reason)

    def _get(self, key: str, size: int, start: int = 0) -> bytes:
        """Read so many bytes of an object, or those that there are."""
        try:
            with unavailable(f"{self.where}/{key}: cannot be read"):
                found = self._store.get(key, options={"range": (start, start + size)})
                return bytes(found.bytes())
        except FileNotFoundError as error:
            raise CheckpointRefused(f"{self.where}/{key}", "removed while it was read") from error

    # A start without the storage

    def _remember(self) -> None:
        """Keep what is listed, with what this process and others know of manifests and pins."""
        if self.problem is not None:
            return
        listing = self._require_listing()
        with suppress(OSError):  # it is of use only if a start finds no storage
            storage.make_folder(self._cache.root)
            with self._known.with_suffix(".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                before = self._read_known()
                tags = {
                    o.get(checkpoint.MANIFEST)
                    for v in listing.versions.values()
                    for o in v.values()
                }
                manifests = {**before.get("manifests", {}), **self._manifests}
                pins = {**before.get("pins", {}), **self._pins}
                self._manifests = {t: digest for t, digest in manifests.items() if t in tags}
                self._pins = {
                    name: (tag, version)
                    for name, (tag, version) in pins.items()
                    if listing.pins.get(name) == tag
                }
                known = {
                    "where": self.where,
                    "versions": listing.versions,
                    "manifests": self._manifests,
                    "pins": self._pins,
                }
                raw = json.dumps(known).encode()
                if json.loads(raw) != before:
                    storage.replace_durably(self._known, raw)
                os.utime(self._known)  # it was so at this time

    def _read_known(self) -> dict[str, Any]:
        try:
            known = json.loads(self._known.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        same = isinstance(known, dict) and known.get("where") == self.where
        return known if same and _is_listing(known) else {}

    def _restore(self, error: StorageUnavailable) -> None:
        """Take what the cache holds of the last listing; raise `error` if that is nothing."""
        try:
            known = self._read_known()
            kept, self._manifests = known["versions"], known["manifests"]
            self._pins = {name: (tag, version) for name, (tag, version) in known["pins"].items()}
            when = time.gmtime(self._known.stat().st_mtime)
            versions = {
                name: {int(v): o for v, o in found.items() if self._has(name, v, o)}
                for name, found in kept.items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise error from None
        if not any(versions.values()):
            raise error
        self._listing = _Listing(versions, {name: tag for name, (tag, _) in self._pins.items()})
        time_ = time.strftime("%Y-%m-%d %H:%M UTC", when)
        self.problem = f"started from the cache, as of {time_}: {error}"

    def _has(self, name: str, version: str, objects: Mapping[str, str]) -> bool:
        digest = self._manifests.get(objects.get(checkpoint.MANIFEST, ""))
        return digest is not None and self._cache.path(name, version, digest).is_dir()

    # Publishing

    def save(self, module: "nn.Module", metadata: checkpoint.Metadata) -> int:
        """Publish the next version; of two that are published at once, each gets a number.

        What broke off at least a day ago is removed. CheckpointNotWritten: it is not there, or
        incomplete.
        """
        files, name = checkpoint.dump(module, metadata), metadata.name
        self.find()
        version = max(self._require_listing().versions.get(name, {}), default=0) + 1
        about = files[checkpoint.METADATA]
        while not self._create(f"{name}/{version}/{checkpoint.METADATA}", about):
            version += 1
        weights = f"{name}/{version}/{checkpoint.WEIGHTS}"
        with self._writing(weights):
            self._store.put(weights, files[checkpoint.WEIGHTS])
        key, manifest = f"{name}/{version}/{checkpoint.MANIFEST}", files[checkpoint.MANIFEST]
        # One that is there may be ours: a write whose answer is lost is sent again.
        if not self._create(key, manifest) and self._get(key, _MANIFEST_BYTES) != manifest:
            raise CheckpointNotWritten(f"{self.where}/{key}: another one was written")
        self._list_again()
        with suppress(StorageUnavailable, CheckpointNotWritten):  # the next one may remove it
            self._remove_abandoned(name)
        return version

    def _create(self, key: str, raw: bytes) -> bool:
        """Write a new object; False: there is one already."""
        from obstore.exceptions import AlreadyExistsError

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

    def _list_again(self) -> None:
        """Note what was changed; that is done, even if this fails."""
        self._listing = None
        with suppress(StorageUnavailable):
            self.find()

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
        self._list_again()

    def remove(self, name: str, version: int) -> bool:
        """Remove a version, its manifest first: without it the version is incomplete."""
        self._listing = None  # it may have been pinned meanwhile
        if self.pinned(name) == version:
            return False
        self._delete(name, version, self._require_listing().versions.get(name, {}).get(version, {}))
        self._list_again()
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


def _is_listing(known: Mapping[str, Any]) -> bool:
    """Say if a file has the fields of a listing: another release may have written it."""
    manifests, pins = known.get("manifests"), known.get("pins")
    return (
        isinstance(known.get("versions"), dict)
        and isinstance(manifests, dict)
        and all(isinstance(digest, str) for digest in manifests.values())
        and isinstance(pins, dict)
        and all(isinstance(pin, list) and len(pin) == 2 for pin in pins.values())
    )


def _is_complete(objects: Mapping[str, str]) -> bool:
    return objects.keys() >= {*_FILES}


def _listed(place: str, manifest: bytes) -> Mapping[str, Any]:
    """Return size and SHA-256 of the other files; CheckpointRefused unless they can be."""
    listed = checkpoint.parse_manifest(place, manifest)
    for file in listed.values():
        size = file.get("bytes") if isinstance(file, dict) else None
        if type(size) is not int or not 0 <= size <= checkpoint.MAX_BYTES or "sha256" not in file:
            reason = f"sizes of 0 to {checkpoint.MAX_BYTES} bytes and digests are needed"
            raise CheckpointRefused(place, reason)
    return listed
