"""Saved models: `<root>/<name>/<version>/` holds model.safetensors, model.json and manifest.json.

Safetensors and JSON only: nothing is ever pickled or unpickled. A version is written to a temporary
folder, flushed to disk and renamed, so it is there whole or not at all; the next process that saves
removes what a killed one left. Reading trusts nothing: bytes are read once, from one descriptor,
and every claim of the header is checked. The manifest has the size and SHA-256 of both other files:
it shows damage and changes, not who made them.

What is missing raises CheckpointNotFound; what is damaged or was tampered with CheckpointRefused,
which names the file or tensor. PyTorch is imported by the functions that need it: listing and
pinning versions do not load it.
"""

import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dropserve.models import storage
from dropserve.models.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointRefused,
    ConfigError,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dropserve.models.examples import Example
    from dropserve.models.networks import NetworkConfig
    from dropserve.models.preprocessing import Preprocessing

WEIGHTS = "model.safetensors"
METADATA = "model.json"
MANIFEST = "manifest.json"
PIN = "pin.json"
MAX_PIN_BYTES = 1000
NAME_RULE = "use 1 to 64 of A-Z a-z 0-9 . _ -, and no dot in front"
MAX_BYTES = 8 * 2**30
"""Of the weights."""
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_TO_SAFETENSORS = """\
  import torch; from safetensors.torch import save_file
  state = torch.load({file!r}, map_location="cpu", weights_only=True)
  save_file({{k: v.contiguous().clone() for k, v in state.items()}}, {to!r})"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metadata:
    """What `model.json` says: how to rebuild the network, and where it comes from."""

    name: str
    network: "NetworkConfig"
    preprocessing: "Preprocessing"
    classes: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    examples: "tuple[Example, ...]" = ()
    sha256: str = ""  # of the weights; `save` fills it in, and the next
    torch_version: str = ""


@dataclass(frozen=True)
class Version:
    """One version as it was read: its bytes are verified, and no code that it names has run."""

    path: Path
    metadata: Metadata
    tensors: "Mapping[str, Tensor]"
    files: Mapping[str, Any]  # name: size and SHA-256, as a manifest has them
    manifest_sha256: str | None  # hence of every byte of the version; None: it has no manifest

    def build(self, factories: Collection[str] | None = ()) -> "nn.Module":
        """Rebuild the module, in eval mode. Only these factories may be called; None: any."""
        import torch

        if self.manifest_sha256 is None:
            command = f"dropserve manifest {self.path.parent.name} --version {self.path.name}"
            _log.warning(
                f"{self.path} has no {MANIFEST}, so that a change of its {METADATA} would not be "
                f"noticed; one is written by: {command}"
            )
        network = self.metadata.network
        try:
            with torch.random.fork_rng(devices=[]):
                module = network.build(factories)
        except ConfigError as error:
            raise CheckpointRefused(self.path / METADATA, str(error)) from error
        if not network.is_builtin:
            _check_tensors(self.path / WEIGHTS, self.tensors, module.state_dict())
        module.load_state_dict(self.tensors)
        return module.eval()


def dump(module: "nn.Module", metadata: Metadata) -> dict[str, bytes]:
    """Return a version's files by name, in the order to write them: the manifest is the last.

    CheckpointError: they could not be read again.
    """
    import torch

    tensors, path = module.state_dict(), Path(WEIGHTS)
    weights = storage.dump_tensors(path, tensors)
    # By the reader's own checks: a version that it would refuse is not written.
    _check_tensors(path, storage.parse_tensors(path, weights), tensors)
    sha256 = hashlib.sha256(weights).hexdigest()
    about = _dump_metadata(replace(metadata, sha256=sha256, torch_version=torch.__version__))
    if not is_name(metadata.name):
        raise CheckpointError(f"{metadata.name!r} cannot name a model: {NAME_RULE}")
    manifest = _dump_json({"files": _digests(about, weights)})
    return {METADATA: about, WEIGHTS: weights, MANIFEST: manifest}


def save(root: Path, module: "nn.Module", metadata: Metadata) -> Path:
    """Write the next version of `metadata.name`, whole or not at all; return its folder.

    CheckpointError: it cannot be written (CheckpointNotWritten), or could not be read again;
    nothing is left behind.
    """
    files, folder = dump(module, metadata), root / metadata.name
    with storage.changing(folder, "write a version"):
        storage.make_folder(folder)
        with _temporary(folder) as temporary:
            temporary.chmod(0o755)
            for name, raw in files.items():
                storage.write_durably(temporary / name, raw)
            storage.sync_folder(temporary)
            return _publish(temporary, max(versions(root, metadata.name), default=0) + 1)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Make a folder for a version in a model's; first remove those that killed processes left.

    A process that writes a version holds a shared lock on the model's folder, so that whoever gets
    an exclusive one knows that nobody writes. Where there are no locks, nothing is removed.
    """
    with storage.open_folder(folder) as model:
        with suppress(OSError):
            fcntl.flock(model, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(".new-*"):  # renamed, so that nobody can publish half of it
                left.rename(folder / f".removed-{left.name.lstrip('.')}")
            _delete_removed(folder)
        with suppress(OSError):
            fcntl.flock(model, fcntl.LOCK_SH)
        with TemporaryDirectory(prefix=".new-", dir=folder, ignore_cleanup_errors=True) as made:
            yield Path(made)


def _publish(temporary: Path, version: int) -> Path:
    """Give a folder the first free version number, for good; OSError: it has none."""
    path = _rename(temporary, version)
    try:
        storage.sync_folder(path.parent)
    except OSError:
        path.rename(temporary)
        raise
    return path


def _rename(temporary: Path, version: int) -> Path:
    """Rename to the first free version number; someone else may be saving at the same time."""
    folder = temporary.parent
    while True:
        target = folder / str(version)
        try:
            if not target.exists():  # an empty folder would be replaced
                return temporary.rename(target)
        except OSError:
            if not target.exists():
                raise
        version += 1


def read(path: Path) -> Version:
    """Read the version in a folder and verify it, without running code that it names."""
    import torch

    if not path.is_dir():
        raise CheckpointNotFound(f"{path}: no such checkpoint")
    manifest, about, weights, files = _read_files(path)
    metadata = _parse_metadata(path / METADATA, about)
    tensors = storage.parse_tensors(path / WEIGHTS, weights)
    if (got := files[WEIGHTS]["sha256"]) != metadata.sha256:
        reason = f"damaged or exchanged: SHA-256 is {got}, {METADATA} says {metadata.sha256}"
        raise CheckpointRefused(path / WEIGHTS, reason)
    if metadata.network.is_builtin:  # a false size is found before it takes memory
        with torch.device("meta"):
            _check_tensors(path / WEIGHTS, tensors, metadata.network.build().state_dict())
    digest = None if manifest is None else hashlib.sha256(manifest).hexdigest()
    return Version(path, metadata, tensors, files, digest)


def is_intact(path: Path) -> bool:
    """Say if the files in a folder are those of its manifest: then none was damaged."""
    try:
        manifest, *_ = _read_files(path)
    except CheckpointError:
        return False
    return manifest is not None


def _read_files(path: Path) -> tuple[bytes | None, bytes, bytes, Mapping[str, Any]]:
    """Return manifest, metadata, weights and their digests, which the manifest agrees with."""
    manifest = storage.read_if_there(path / MANIFEST, storage.MAX_HEADER_BYTES)
    about = storage.read_once(path / METADATA, storage.MAX_HEADER_BYTES)
    weights = storage.read_once(path / WEIGHTS, MAX_BYTES)
    files = _digests(about, weights)
    if manifest is not None:
        _check_manifest(path, manifest, files)
    return manifest, about, weights, files


def stated_sha256(path: Path) -> str:
    """Return the SHA-256 of the weights that a version's metadata states; nothing is verified."""
    about = path / METADATA
    values = storage.parse_json(about, storage.read_once(about, storage.MAX_HEADER_BYTES))
    return str(values.get("sha256"))


def load(path: Path, factories: Collection[str] | None = ()) -> "tuple[nn.Module, Metadata]":
    """Read the version in a folder and rebuild its module, as `Version.build` does."""
    version = read(path)
    return version.build(factories), version.metadata


def add_manifest(version: Version) -> Version:
    """Write the manifest that a version lacks, of the bytes that were verified."""
    manifest, path = _dump_json({"files": version.files}), version.path / MANIFEST
    with storage.changing(path, "write the manifest"):
        storage.replace_durably(path, manifest)
    return replace(version, manifest_sha256=hashlib.sha256(manifest).hexdigest())


def load_weights(path: Path, module: "nn.Module") -> None:
    """Put the tensors of a safetensors file into a module: all of its own, and no others.

    A pickle is refused with a note that says how to convert it to safetensors.
    """
    file = path.resolve() if path.is_symlink() else path  # as in a cache of downloads
    raw = storage.read_once(file, MAX_BYTES)
    if raw.startswith((b"PK\3\4", b"\x80\2\x8a", b"\x80\4\x95")):
        reason = "PyTorch's pickle, which is never read here; convert it once:"
        refused, to = CheckpointRefused(path, reason), path.with_suffix(".safetensors")
        refused.add_note(_TO_SAFETENSORS.format(file=str(path), to=str(to)))
        raise refused
    tensors = storage.parse_tensors(path, raw)
    _check_tensors(path, tensors, module.state_dict())
    module.load_state_dict(tensors)


def _dump_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"


def _digests(about: bytes, weights: bytes) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for name, raw in ((METADATA, about), (WEIGHTS, weights))
    }


def _check_manifest(path: Path, raw: bytes, files: Mapping[str, Any]) -> None:
    """Refuse a version whose files are not those that its manifest was written for."""
    listed = parse_manifest(path / MANIFEST, raw)
    for name, found in files.items():
        if listed[name] != found:
            has = f"{found['bytes']} bytes and SHA-256 {found['sha256']}, {MANIFEST} says otherwise"
            raise CheckpointRefused(path / name, f"damaged, edited or exchanged: it has {has}")


def parse_manifest(path: Path | str, raw: bytes) -> Mapping[str, Any]:
    """Return the size and the SHA-256 of both other files, as the bytes of a manifest have them."""
    listed = storage.parse_json(path, raw).get("files")
    if not isinstance(listed, dict) or listed.keys() != {METADATA, WEIGHTS}:
        raise CheckpointRefused(path, f"must name {METADATA} and {WEIGHTS} alone")
    return listed


def _dump_metadata(metadata: Metadata) -> bytes:
    """Return a `model.json` that a reader accepts, without examples where it gets too long."""
    try:
        raw = _dump_json(asdict(metadata))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{metadata.name}: not for JSON: {error}") from error
    if len(raw) > storage.MAX_HEADER_BYTES:
        if metadata.examples:
            return _dump_metadata(replace(metadata, examples=()))
        size = f"{len(raw)} bytes, more than {storage.MAX_HEADER_BYTES}"
        raise CheckpointError(f"{metadata.name}: {METADATA} would have {size}")
    _parse_metadata(Path(METADATA), raw)
    return raw


def _parse_metadata(path: Path, raw: bytes) -> Metadata:
    from dropserve.models.examples import examples_from_json
    from dropserve.models.networks import NetworkConfig
    from dropserve.models.preprocessing import Preprocessing

    values = storage.parse_json(path, raw)
    if unknown := values.keys() - {f.name for f in fields(Metadata)}:
        raise CheckpointRefused(path, f"unknown fields: {', '.join(sorted(unknown)):.200}")
    try:
        network = NetworkConfig.from_json(values["network"])
        prepared = Preprocessing.from_json(values["preprocessing"])
        classes = tuple(str(c) for c in values["classes"])
        shown = examples_from_json(values.get("examples", []), classes, prepared)
        made, data, figures = (dict(values[n]) for n in ("recipe", "data", "evaluation"))
        name, sha256, release = (str(values[n]) for n in ("name", "sha256", "torch_version"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointRefused(path, f"{type(error).__name__}: {error}") from error
    if len(classes) != network.classes:
        raise CheckpointRefused(path, "one class name a logit is needed")
    if prepared.shape != network.input:
        raise CheckpointRefused(path, "preprocessing and network disagree on the input's shape")
    return Metadata(name, network, prepared, classes, made, data, figures, shown, sha256, release)


def _check_tensors(
    path: Path, got: "Mapping[str, Tensor]", expected: "Mapping[str, Tensor]"
) -> None:
    """Refuse tensors that are not the network's: by name, shape, dtype and finiteness."""
    missing, extra = expected.keys() - got.keys(), got.keys() - expected.keys()
    if missing or extra:
        wrong = [f"tensor {min(missing)!r} is missing"] if missing else []
        wrong += [f"tensor {min(extra)!r} belongs to no layer"] if extra else []
        raise CheckpointRefused(path, ", ".join(wrong))
    for name, want in expected.items():  # in the network's order, and not the file's
        tensor = got[name]
        if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
            needed = f"the network needs {want.dtype} {list(want.shape)}"
            found = f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}"
            raise CheckpointRefused(path, f"{found}, {needed}")
        if not tensor.isfinite().all():
            raise CheckpointRefused(path, f"tensor {name!r} holds NaN or infinity")


# Which versions there are, and which is pinned: nothing below needs PyTorch.


def is_name(name: str) -> bool:
    """Say if `name` can name a model: 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot."""
    return re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,64}", name) is not None


def is_version(text: str) -> bool:
    """Say if `text` is a version's number, as it is written."""
    return _VERSION.fullmatch(text) is not None


def default_name(dataset: str, network: str) -> str:
    """Name a model after its dataset, or the folder that holds it, and its network or factory."""
    name = f"{Path(dataset).resolve().name}-{network.rpartition(':')[2]}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".")[:64]


def names(root: Path) -> list[str]:
    """List the folders under `root` that may hold a model's versions, in order."""
    return sorted(d.name for d in root.iterdir() if is_name(d.name)) if root.is_dir() else []


def versions(root: Path, name: str) -> list[int]:
    """List a model's versions, in ascending order; folders that are not numbers are no versions."""
    folder = root / name
    if not is_name(name) or not folder.is_dir():
        return []
    numbered = (d for d in folder.iterdir() if is_version(d.name))
    return sorted(int(d.name) for d in numbered if d.is_dir())


def pinned(root: Path, name: str) -> int | None:
    """Return the version that is to answer whatever newer ones there are; None: the latest is."""
    path = root / name / PIN
    raw = storage.read_if_there(path, MAX_PIN_BYTES)
    return None if raw is None else parse_pin(path, raw)


def parse_pin(path: Path | str, raw: bytes) -> int:
    """Read the pinned version from the bytes of a pin."""
    version = storage.parse_json(path, raw).get("version")
    if type(version) is not int or not is_version(str(version)):
        raise CheckpointRefused(path, 'not {"version": a number from 1 to 999999999}')
    return version


def dump_pin(version: int) -> bytes:
    """Return the bytes of a pin."""
    return json.dumps({"version": version}).encode() + b"\n"


def pin(root: Path, name: str, version: int | None) -> None:
    """Pin a version, or none. A reader of the folder finds the old pin or the new one."""
    path = root / name / PIN
    with storage.changing(path, "change the pin"):
        if version is None:
            path.unlink(missing_ok=True)
            storage.sync_folder(path.parent)
        else:
            storage.replace_durably(path, dump_pin(version))


def remove(root: Path, name: str, version: int) -> bool:
    """Remove a version, first by a rename that hides it; False: it is pinned, and stays."""
    folder = root / name
    if pinned(root, name) == version:
        return False
    (folder / str(version)).rename(folder / f".removed-{version}")
    storage.sync_folder(folder)
    _delete_removed(folder)
    return True


def _delete_removed(folder: Path) -> None:
    """Delete what removals have hidden: an interrupted one leaves some."""
    for removed in folder.glob(".removed-*"):
        with suppress(FileNotFoundError):  # another process removes it
            removed.unlink() if removed.is_symlink() else shutil.rmtree(removed)


def mark(folder: Path) -> tuple[tuple[str, int, int, int], ...] | None:
    """Return what changes when the files in a version's folder do; None: it cannot be listed."""
    try:
        files = [(path.name, path.lstat()) for path in sorted(folder.iterdir())]
    except OSError:  # it is being removed
        return None
    return tuple((name, s.st_ctime_ns, s.st_size, s.st_ino) for name, s in files)
