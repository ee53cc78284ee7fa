"""One folder a version: `<root>/<name>/<version>/model.safetensors`, `model.json`, `manifest.json`.

Safetensors and JSON only: nothing is ever pickled or unpickled. A version is written to a temporary
folder, flushed to disk and renamed, so it is there whole or not at all. Reading trusts nothing:
bytes are read once, from one descriptor, and every claim of the header is checked. The manifest has
the size and SHA-256 of both other files: it shows damage and changes, not who made them.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dropserve.models.catalogue import is_name, versions
from dropserve.models.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointRefused,
    ConfigError,
)
from dropserve.models.examples import Example, examples_from_json
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.storage import (
    MAX_HEADER_BYTES,
    dump_tensors,
    parse_json,
    parse_tensors,
    read_if_there,
    read_once,
    replace_durably,
    sync_folder,
    write_durably,
)

WEIGHTS = "model.safetensors"
METADATA = "model.json"
MANIFEST = "manifest.json"
_MAX_BYTES = 8 * 2**30
_TO_SAFETENSORS = """\
  import torch; from safetensors.torch import save_file
  state = torch.load({file!r}, map_location="cpu", weights_only=True)
  save_file({{k: v.contiguous().clone() for k, v in state.items()}}, {to!r})
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metadata:
    """What `model.json` says: how to rebuild the network, and where it comes from."""

    name: str
    network: NetworkConfig
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    sha256: str = ""
    torch_version: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json()`.

        Raises:
            ConfigError: a value is missing or makes no sense.
        """
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"unknown fields: {', '.join(sorted(unknown)):.200}")
        try:
            preprocessing = Preprocessing.from_json(values["preprocessing"])
            classes = tuple(str(c) for c in values["classes"])
            metadata = cls(
                name=str(values["name"]),
                network=NetworkConfig.from_json(values["network"]),
                preprocessing=preprocessing,
                classes=classes,
                recipe=dict(values["recipe"]),
                data=dict(values["data"]),
                evaluation=dict(values["evaluation"]),
                examples=examples_from_json(values.get("examples", []), classes, preprocessing),
                sha256=str(values["sha256"]),
                torch_version=str(values["torch_version"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{type(error).__name__}: {error}") from error
        if len(metadata.classes) != metadata.network.classes:
            raise ConfigError("one class name a logit is needed")
        if metadata.preprocessing.shape != metadata.network.input:
            raise ConfigError("preprocessing and network disagree on the input's shape")
        return metadata


def save(root: Path, module: nn.Module, metadata: Metadata) -> Path:
    """Write the next version of `metadata.name`, whole or not at all.

    Returns:
        The version's folder.

    Raises:
        CheckpointError: it could not be written, or could not be read again (a weight is NaN, there
            are too many tensors or too long metadata); nothing is left behind.
    """
    weights = dump_tensors(Path(WEIGHTS), module.state_dict())
    # By the reader's own checks: a version that would be refused must not come to be.
    _check_tensors(Path(WEIGHTS), parse_tensors(Path(WEIGHTS), weights), module.state_dict())
    metadata = replace(
        metadata, sha256=hashlib.sha256(weights).hexdigest(), torch_version=torch.__version__
    )
    about = _dump_metadata(metadata)
    if not is_name(metadata.name):
        raise CheckpointError(
            f"{metadata.name!r} cannot name a model: use 1 to 64 letters, digits, '.', '_' or '-'"
        )
    folder = root / metadata.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(root)
        with _temporary_folder(folder) as temporary:
            write_durably(temporary / WEIGHTS, weights)
            write_durably(temporary / METADATA, about)
            write_durably(temporary / MANIFEST, _manifest(_digests(about, weights)))
            sync_folder(temporary)
            version = _publish(temporary, folder, (versions(root, metadata.name) or [0])[-1] + 1)
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write a version: {error}") from error
    return version


@dataclass(frozen=True)
class Version:
    """One version as it was read: its bytes are verified, and no code that it names has run.

    Attributes:
        path: its folder.
        metadata: what its `model.json` says.
        tensors: of `model.safetensors`, by name.
        digests: size and SHA-256 of its files, by name.
        manifest_sha256: of its `manifest.json`, hence of every byte of the version; None: it has
            none.
    """

    path: Path
    metadata: Metadata
    tensors: Mapping[str, Tensor]
    digests: Mapping[str, Any]
    manifest_sha256: str | None

    def build(self, factories: Collection[str] | None = ()) -> nn.Module:
        """Rebuild the module, in eval mode.

        Args:
            factories: factory names that may be imported and called; None: any.

        Raises:
            CheckpointRefused: the metadata describe another network than the tensors are of.
        """
        if self.manifest_sha256 is None:
            _log.warning(
                f"{self.path} has no {MANIFEST}, so that a change of its {METADATA} would not be "
                f"noticed; one is written by: dropserve manifest {self.path.parent.name} "
                f"--version {self.path.name}"
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


def load(path: Path, factories: Collection[str] | None = ()) -> tuple[nn.Module, Metadata]:
    """Read one version, verify all of it, and rebuild its module, in eval mode.

    Args:
        path: the version's folder.
        factories: as in `Version.build`.

    Raises:
        CheckpointNotFound: no such folder.
        CheckpointRefused: it is damaged or was tampered with; names the file or tensor.
    """
    version = read(path)
    return version.build(factories), version.metadata


def read(path: Path) -> Version:
    """Read one version and verify it, as far as can be without running code that it names.

    Args:
        path: the version's folder.

    Raises:
        CheckpointNotFound: no such folder.
        CheckpointRefused: it is damaged or was tampered with; names the file or tensor.
    """
    if not path.is_dir():
        raise CheckpointNotFound(f"{path}: no such checkpoint")
    manifest = read_if_there(path / MANIFEST, MAX_HEADER_BYTES)
    about = read_once(path / METADATA, MAX_HEADER_BYTES)
    weights = read_once(path / WEIGHTS, _MAX_BYTES)
    digests = _digests(about, weights)
    if manifest is not None:
        _check_manifest(path, manifest, digests)
    metadata = _parse_metadata(path / METADATA, about)
    tensors = parse_tensors(path / WEIGHTS, weights)
    if (got := digests[WEIGHTS]["sha256"]) != metadata.sha256:
        raise CheckpointRefused(
            path / WEIGHTS,
            f"damaged or exchanged: SHA-256 is {got}, {METADATA} says {metadata.sha256}",
        )
    if metadata.network.is_builtin:  # a description may lie: weigh it before it takes memory
        with torch.device("meta"):
            _check_tensors(path / WEIGHTS, tensors, metadata.network.build().state_dict())
    digest = None if manifest is None else hashlib.sha256(manifest).hexdigest()
    return Version(path, metadata, tensors, digests, digest)


def add_manifest(version: Version) -> Version:
    """Write the manifest that a version lacks, of the bytes that were verified, and return it so.

    Raises:
        OSError: it cannot be written.
    """
    manifest = _manifest(version.digests)
    replace_durably(version.path / MANIFEST, manifest)
    return replace(version, manifest_sha256=hashlib.sha256(manifest).hexdigest())


def _digests(about: bytes, weights: bytes) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of each file of a version."""
    return {
        name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for name, raw in ((METADATA, about), (WEIGHTS, weights))
    }


def _manifest(digests: Mapping[str, Any]) -> bytes:
    return json.dumps({"files": digests}, indent=2).encode() + b"\n"


def _check_manifest(path: Path, raw: bytes, digests: Mapping[str, Any]) -> None:
    """Refuse a version whose files are not those that its manifest was written for."""
    told = parse_json(path / MANIFEST, raw).get("files")
    if not isinstance(told, dict) or told.keys() != digests.keys():
        raise CheckpointRefused(path / MANIFEST, f"must name {METADATA} and {WEIGHTS} alone")
    for name, found in digests.items():
        if told[name] != found:
            raise CheckpointRefused(
                path / name,
                f"damaged, edited or exchanged: it has {found['bytes']} bytes and SHA-256 "
                f"{found['sha256']}, {MANIFEST} says otherwise",
            )


def load_weights(path: Path, module: nn.Module) -> None:
    """Put the tensors of a safetensors file into a module: all of its own, and no others.

    Raises:
        CheckpointRefused: the file is damaged, or has other tensors; names one. Or it is a pickle:
            then notes say how to turn it into safetensors.
    """
    file = path.resolve() if path.is_symlink() else path  # as in a cache of downloads
    raw = read_once(file, _MAX_BYTES)
    if raw.startswith((b"PK\3\4", b"\x80\2\x8a", b"\x80\4\x95")):
        error = CheckpointRefused(path, "PyTorch's pickle, which is never read here; turn it once:")
        to = path.with_suffix(".safetensors")
        error.add_note(_TO_SAFETENSORS.format(file=str(path), to=str(to)).rstrip())
        raise error
    tensors = parse_tensors(path, raw)
    _check_tensors(path, tensors, module.state_dict())
    module.load_state_dict(tensors)


def _dump_metadata(metadata: Metadata) -> bytes:
    """Return the bytes of a `model.json` that a reader will accept; what is too long is refused.

    Examples are left out if the file would be too long with them.
    """
    try:
        raw = json.dumps(metadata.to_json(), indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{metadata.name}: not for JSON: {error}") from error
    if len(raw) > MAX_HEADER_BYTES:
        if metadata.examples:
            return _dump_metadata(replace(metadata, examples=()))
        raise CheckpointError(
            f"{metadata.name}: {METADATA} would have {len(raw)} bytes, more than {MAX_HEADER_BYTES}"
        )
    _parse_metadata(Path(METADATA), raw)
    return raw


def _parse_metadata(path: Path, raw: bytes) -> Metadata:
    try:
        return Metadata.from_json(parse_json(path, raw))
    except ConfigError as error:
        raise CheckpointRefused(path, str(error)) from error


def _check_tensors(path: Path, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not the network's: by name, shape, dtype and finiteness."""
    missing, extra = expected.keys() - got.keys(), got.keys() - expected.keys()
    if missing or extra:
        wrong = [f"tensor {min(missing)!r} is missing"] if missing else []
        wrong += [f"tensor {min(extra)!r} belongs to no layer"] if extra else []
        raise CheckpointRefused(path, ", ".join(wrong))
    for name, want in expected.items():  # in the network's order, and not the file's
        tensor = got[name]
        if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
            raise CheckpointRefused(
                path,
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"the network needs {want.dtype} {list(want.shape)}",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointRefused(path, f"tensor {name!r} holds NaN or infinity")


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a hidden folder that is gone after the block, unless it was renamed."""
    path = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _publish(temporary: Path, folder: Path, version: int) -> Path:
    """Rename to the first free version number; someone else may be saving at the same time."""
    while True:
        target = folder / str(version)
        if not target.exists():
            try:
                return temporary.rename(target)
            except FileExistsError:
                pass
            except OSError as error:
                if not target.exists():
                    raise CheckpointError(f"{target}: {error}") from error
        version += 1
