"""Networks, from a frozen description that goes into the checkpoint and rebuilds them."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import nn

from dropserve.models.dropout import InvertedDropout, SpatialDropout, check_rate
from dropserve.models.errors import ConfigError
from dropserve.models.factories import FORMS, call_factory, trusted
from dropserve.models.storage import whole_numbers

_MAX_WIDTH = 65_536
_MAX_DEPTH = 64


@dataclass(frozen=True)
class NetworkConfig:
    """What to build.

    Attributes:
        kind: "mlp", "cnn", or a callable that returns a module: "package.module:factory" or
            "path/to/file.py:factory".
        input: shape of one image, (channels, height, width).
        classes: how many logits.
        hidden: widths of the fully connected layers before the logits.
        dropout: rate after each of them, one a layer.
        channels: output channels of a CNN's blocks, each convolution, batch norm, ReLU, pool.
        spatial_dropout: rate at which a CNN drops whole channels between its blocks.
        arguments: JSON keyword arguments for a factory.

    Raises:
        ConfigError: a value makes no sense.
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
        """Say if it is made here, and not by a factory."""
        return self.kind in ("mlp", "cnn")

    def build(self, factories: Collection[str] | None = None) -> nn.Module:
        """Make the module, with fresh weights from PyTorch's global generator.

        Args:
            factories: names, as `kind` has them, that may be imported and called; None: any.
                A checkpoint names its factory, so a server must say which it trusts.

        Raises:
            ConfigError: the factory is not trusted, not there, or makes no module.
        """
        if self.kind == "mlp":
            return _mlp(self)
        if self.kind == "cnn":
            return _cnn(self)
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
        """Rebuild from `to_json()`.

        Raises:
            ConfigError: a value is missing or makes no sense.
        """
        try:
            channels, height, width = whole_numbers(values["input"])
            return cls(
                kind=str(values["kind"]),
                input=(channels, height, width),
                classes=whole_numbers([values["classes"]])[0],
                hidden=whole_numbers(values["hidden"]),
                dropout=tuple(float(v) for v in values["dropout"]),
                channels=whole_numbers(values["channels"]),
                spatial_dropout=float(values["spatial_dropout"]),
                arguments=dict(values["arguments"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"network: {type(error).__name__}: {error}") from error


def default_config(kind: str, input_shape: tuple[int, int, int], classes: int) -> NetworkConfig:
    """Describe the network we suggest of a kind.

    The MLP is 256-256 with rates .2 and .5; the CNN doubles its channels from 32 while the image
    is large enough, up to three blocks, then 128 units with rate .5.
    """
    if kind != "cnn":
        return NetworkConfig(kind, input_shape, classes)
    blocks = min(3, max(1, min(input_shape[1:]).bit_length() - 2))
    channels = tuple(32 << i for i in range(blocks))
    return NetworkConfig(kind, input_shape, classes, (128,), (0.5,), channels)


def _mlp(config: NetworkConfig) -> nn.Module:
    """Flatten, then linear, ReLU, dropout a hidden layer, then logits."""
    channels, height, width = config.input
    return nn.Sequential(
        OrderedDict([("flatten", nn.Flatten()), *_head(config, channels * height * width)])
    )


def _cnn(config: NetworkConfig) -> nn.Module:
    """Blocks of convolution, batch norm, ReLU, pool (and spatial dropout); then the MLP's head."""
    layers: list[tuple[str, nn.Module]] = []
    width, (_, *size) = config.input[0], config.input
    for i, channels in enumerate(config.channels, 1):
        layers += [
            (f"conv{i}", nn.Conv2d(width, channels, 3, padding=1, bias=False)),
            (f"norm{i}", nn.BatchNorm2d(channels)),
            (f"relu{i}", nn.ReLU()),
            (f"pool{i}", nn.MaxPool2d(2)),
        ]
        if config.spatial_dropout and i < len(config.channels):
            layers.append((f"spatial_dropout{i}", SpatialDropout(config.spatial_dropout)))
        width, size = channels, [side // 2 for side in size]
    layers.append(("flatten", nn.Flatten()))
    return nn.Sequential(OrderedDict([*layers, *_head(config, width * size[0] * size[1])]))


def _head(config: NetworkConfig, width: int) -> list[tuple[str, nn.Module]]:
    layers: list[tuple[str, nn.Module]] = []
    for i, (units, p) in enumerate(zip(config.hidden, config.dropout, strict=True), 1):
        layers += [(f"hidden{i}", nn.Linear(width, units)), (f"hidden{i}_relu", nn.ReLU())]
        if p:
            layers.append((f"dropout{i}", InvertedDropout(p)))
        width = units
    return [*layers, ("logits", nn.Linear(width, config.classes))]
