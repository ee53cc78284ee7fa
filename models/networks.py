"""Networks, built from a description that is saved in the checkpoint: MLPs, CNNs, and factories.

A factory is a user's callable that returns a module. It is named `package.module:factory`, which is
imported, or `path/to/file.py:factory`, whose file is run as a module of its own. A relative path
starts in the working directory.
"""

import importlib
import importlib.util
import os
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from torch import nn

from dropserve.models.dropout import InvertedDropout, SpatialDropout, check_rate
from dropserve.models.errors import ConfigError
from dropserve.models.storage import parse_dataclass

FORMS = "package.module:factory or path/to/file.py:factory"
_MAX_WIDTH = 65_536
_MAX_DEPTH = 64


@dataclass(frozen=True)
class NetworkConfig:
    """Description of a network; ConfigError if a value is invalid.

    Attributes:
        kind: "mlp", "cnn", or a factory as this module's docstring has it.
        input: shape of one image, (channels, height, width).
        classes: number of logits.
        hidden: widths of the fully connected layers before the logits.
        dropout: rate after each of them.
        channels: output channels of a CNN's blocks, each convolution, batch norm, ReLU, pool.
        spatial_dropout: rate at which a CNN drops whole channels between its blocks.
        arguments: JSON keyword arguments for a factory.
    """

    kind: str
    input: tuple[int, int, int]
    classes: int
    hidden: tuple[int, ...] = (256, 256)
    dropout: tuple[float, ...] = (0.2, 0.5)
    channels: tuple[int, ...] = ()
    spatial_dropout: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.is_builtin and ":" not in self.kind:
            raise ConfigError(f"network must be mlp, cnn, {FORMS}: {self.kind!r}")
        if len(self.input) != 3:
            raise ConfigError(f"input must be (channels, height, width): {self.input}")
        widths = (*self.input, self.classes, *self.hidden, *self.channels)
        if not all(0 < w <= _MAX_WIDTH for w in widths) or self.classes < 2:
            raise ConfigError(f"widths must be 1 to {_MAX_WIDTH}, classes at least 2: {widths}")
        if len(self.hidden) != len(self.dropout):
            raise ConfigError("dropout needs one rate a hidden layer")
        if len(self.hidden) + len(self.channels) > _MAX_DEPTH:
            raise ConfigError(f"at most {_MAX_DEPTH} layers")
        for p in (*self.dropout, self.spatial_dropout):
            check_rate(p)
        if self.kind == "cnn" and min(self.input[1:]) >> len(self.channels) == 0:
            raise ConfigError(f"{len(self.channels)} blocks halve {self.input} to nothing")

    @property
    def is_builtin(self) -> bool:
        """Say if no factory is needed."""
        return self.kind in ("mlp", "cnn")

    def build(self, factories: Collection[str] | None = None) -> nn.Module:
        """Make the module, with fresh weights from PyTorch's global generator.

        A checkpoint names its factory, so a server says which it trusts: `factories`, named as
        `kind` is (None: any). ConfigError if it is not trusted, not there, or makes no module.
        """
        if self.is_builtin:
            return nn.Sequential(OrderedDict(_layers(self)))
        kind = self.kind if factories is None else trusted(self.kind, factories)
        module = call_factory(kind, self.arguments)
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{kind} made a {type(module).__name__}, not a torch.nn.Module")
        return module

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json()`; ConfigError if a value is missing or invalid."""
        return parse_dataclass("network", cls, values)


def default_config(kind: str, input_shape: tuple[int, int, int], classes: int) -> NetworkConfig:
    """Describe the default network of a kind.

    The MLP is 256-256 with rates .2 and .5; the CNN doubles its channels from 32 while the image
    is large enough, up to three blocks, then 128 units with rate .5.
    """
    if kind != "cnn":
        return NetworkConfig(kind, input_shape, classes)
    blocks = min(3, max(1, min(input_shape[1:]).bit_length() - 2))
    channels = tuple(32 << i for i in range(blocks))
    return NetworkConfig(kind, input_shape, classes, (128,), (0.5,), channels)


def _layers(config: NetworkConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield a CNN's blocks, then the layers that it shares with the MLP."""
    width, *size = config.input
    blocks = config.channels if config.kind == "cnn" else ()
    for i, channels in enumerate(blocks, 1):
        yield f"conv{i}", nn.Conv2d(width, channels, 3, padding=1, bias=False)
        yield f"norm{i}", nn.BatchNorm2d(channels)
        yield f"relu{i}", nn.ReLU()
        yield f"pool{i}", nn.MaxPool2d(2)
        if config.spatial_dropout and i < len(blocks):
            yield f"spatial_dropout{i}", SpatialDropout(config.spatial_dropout)
        width, size = channels, [side // 2 for side in size]
    yield "flatten", nn.Flatten()
    width *= size[0] * size[1]
    for i, (units, p) in enumerate(zip(config.hidden, config.dropout, strict=True), 1):
        yield f"hidden{i}", nn.Linear(width, units)
        yield f"hidden{i}_relu", nn.ReLU()
        if p:
            yield f"dropout{i}", InvertedDropout(p)
        width = units
    yield "logits", nn.Linear(width, config.classes)


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
