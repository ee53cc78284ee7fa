"""Networks, built from a description that is saved in the checkpoint."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from dropserve.models import architectures
from dropserve.models.errors import ConfigError
from dropserve.models.factories import FORMS, call_factory, trusted
from dropserve.models.regularizers import (
    METHODS,
    SCOPES,
    DropConnect,
    Method,
    RecurrentDropConnect,
    Scope,
    SpatialDropout,
    check_rate,
)
from dropserve.models.storage import parse_dataclass

NETWORKS = ("mlp", "cnn", "gru", "wrn", "vit")
_MAX_WIDTH = 65_536
_MAX_DEPTH = 64


@dataclass(frozen=True)
class NetworkConfig:
    """Description of a network; ConfigError if a value is invalid.

    Attributes:
        kind: one of `NETWORKS`, or a factory (`models/factories.py`).
        input: shape of one image, (channels, height, width).
        classes: number of logits.
        hidden: widths of the fully connected layers before the logits; of a gru its state, of a vit
            its tokens. A wrn without any averages its last stage.
        dropout: the regularizer's rates, or one for all: one a hidden layer; of a gru, inputs and
            state, or state alone for zoneout; of a wrn blocks, then hidden layers; of a vit one.
        channels: output channels of a CNN's blocks, each convolution, batch norm, ReLU, pool, or of
            a wrn's stages.
        spatial_dropout: rate at which a CNN drops whole channels between its blocks.
        arguments: JSON keyword arguments for a factory.
        blocks: of each stage of a wrn, or of a vit.
        regularizer: one of `METHODS`.
        input_dropout: the regularizer's rate on the input; of DropConnect, of inverted dropout.
        noise_mean: of additive noise.
        mask_scope: what shares a draw in training; stochastic depth draws for each example.
        before_activation: whether noise comes before the activation, and not after it.
        batch_norm: whether hidden layers of an mlp have batch normalisation.
        init_std: standard deviation of fresh weights, with biases of 0; None: PyTorch's own.
        stochastic_depth: rate of the last residual block; it grows linearly up to there.
    """

    kind: str
    input: tuple[int, int, int]
    classes: int
    hidden: tuple[int, ...] = (256, 256)
    dropout: tuple[float, ...] = (0.2, 0.5)
    channels: tuple[int, ...] = ()
    spatial_dropout: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    blocks: int = 1
    regularizer: str = "dropout"
    input_dropout: float = 0.0
    noise_mean: float = 0.0
    mask_scope: Scope = "example"
    before_activation: bool = False
    batch_norm: bool = False
    init_std: float | None = None
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        if not self.is_builtin and ":" not in self.kind:
            raise ConfigError(f"network must be {', '.join(NETWORKS)}, {FORMS}: {self.kind!r}")
        if len(self.input) != 3:
            raise ConfigError(f"input must be (channels, height, width): {self.input}")
        widths = (*self.input, self.classes, *self.hidden, *self.channels, self.blocks)
        if not all(0 < w <= _MAX_WIDTH for w in widths) or self.classes < 2:
            raise ConfigError(f"widths must be 1 to {_MAX_WIDTH}, classes at least 2: {widths}")
        if len(self.hidden) + max(len(self.channels), self.blocks > 1) * self.blocks > _MAX_DEPTH:
            raise ConfigError(f"at most {_MAX_DEPTH} layers")
        if self.kind == "cnn" and min(self.input[1:]) >> len(self.channels) == 0:
            raise ConfigError(f"{len(self.channels)} blocks halve {self.input} to nothing")
        if self.init_std is not None and not 0 < self.init_std < 100:
            raise ConfigError("init_std must be in (0, 100)")
        if self.is_builtin:
            self._check_method()
            self._check_options()

    def _check_method(self) -> None:
        """Refuse what the network cannot have, and say what it can."""
        kind, name, method = self.kind, self.regularizer, METHODS.get(self.regularizer)
        if method is None or kind not in method.networks:
            right = ", ".join(n for n, m in METHODS.items() if kind in m.networks)
            where = f"; {name} is for {', '.join(method.networks)}" if method else ""
            raise ConfigError(f"{kind} can have regularizer {right}, not {name!r}{where}")
        wanted, what = len(self.hidden), "one rate a hidden layer"
        if method.on == "update":
            wanted, what = 1, "that of the state"
        elif kind == "gru":
            wanted, what = 2, "inputs and state"
        elif kind in ("wrn", "vit"):
            wanted, what = (wanted + 1 if kind == "wrn" else 1), "of blocks, then of hidden layers"
        if len(self.dropout) == 1:  # for all
            object.__setattr__(self, "dropout", self.dropout * wanted)
        if len(self.dropout) != wanted:
            count = f"1 or {wanted} rates" if wanted > 1 else "1 rate"
            raise ConfigError(f"dropout needs {count}, not {len(self.dropout)}: {what}")
        for p in self.dropout:
            method.check(p)
        (method.check if method.on == "units" else check_rate)(self.input_dropout)
        for p in (self.spatial_dropout, self.stochastic_depth):
            check_rate(p)

    def _check_options(self) -> None:
        """Refuse options that the network, or its regularizer, cannot have."""
        kind, on = self.kind, self.method.on
        for name, kinds in _ONLY.items():
            if getattr(self, name) != getattr(NetworkConfig, name) and kind not in kinds:
                raise ConfigError(f"{name} is for {', '.join(kinds)}, not for {kind}")
        loses_mean = self.regularizer != "noise" or not all(self.dropout)
        for wrong, why in (
            (kind in ("gru", "vit") and len(self.hidden) != 1, f"a {kind} needs one width"),
            (kind == "wrn" and not self.channels, "a wrn needs channels, one number a stage"),
            (self.mask_scope not in SCOPES, f"mask_scope must be {', '.join(SCOPES)}"),
            (self.noise_mean and loses_mean, "noise_mean is for additive noise, no rate of it 0"),
            (self.before_activation and on != "units", "before_activation is for noise on units"),
            (
                kind == "gru" and on == "weights" and self.mask_scope == "example",
                "DropConnect of a gru draws its weights once a batch: give mask_scope batch",
            ),
        ):
            if wrong:
                raise ConfigError(why)

    @property
    def is_builtin(self) -> bool:
        """Say if no factory is needed."""
        return self.kind in NETWORKS

    @property
    def is_noisy(self) -> bool:
        """Say if it may draw noise; what a factory makes may."""
        rates = *self.dropout, self.input_dropout, self.spatial_dropout, self.stochastic_depth
        return not self.is_builtin or any(rates)

    @property
    def method(self) -> Method:
        """The regularizer's entry in the registry."""
        return METHODS[self.regularizer]

    def build(self, factories: Collection[str] | None = None) -> nn.Module:
        """Make the module, with fresh weights from PyTorch's global generator.

        A checkpoint names its factory, so a server says which it trusts: `factories`, named as
        `kind` is (None: any). ConfigError if it is not trusted, not there, or makes no module.
        """
        if self.is_builtin:
            builtin = _BUILDERS[self.kind](self)
            if self.init_std is not None:
                _initialise(builtin, self.init_std)
            return builtin.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
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
        return parse_dataclass("network", cls, values, _ADDED)


_ONLY = {
    "channels": ("cnn", "wrn"), "blocks": ("wrn", "vit"), "spatial_dropout": ("cnn",),
    "input_dropout": ("mlp", "cnn", "wrn"), "before_activation": ("mlp", "cnn"),
    "batch_norm": ("mlp",), "stochastic_depth": ("wrn", "vit"),
}  # fmt: skip
"""Fields that not every network has."""
_ADDED = {f.name for f in fields(NetworkConfig)[8:]}  # since the first release


def default_config(
    kind: str, input_shape: tuple[int, int, int], classes: int, regularizer: str | None = None
) -> NetworkConfig:
    """Describe the default network of a kind with a regularizer.

    The MLP is 256-256 with rates .2 and .5; the CNN doubles its channels from 32 while the image
    is large enough, up to three blocks, then 128 units with rate .5. The wide residual network has
    such stages of two blocks; the GRU has 128 units, the transformer four blocks of width 96.
    """
    halvings = min(3, max(1, min(input_shape[1:]).bit_length() - 2))
    channels = tuple(32 << i for i in range(halvings))
    usual: dict[str, dict[str, Any]] = {
        "cnn": {"hidden": (128,), "dropout": (0.5,), "channels": channels},
        "gru": {"hidden": (128,), "dropout": (0.1, 0.2)},
        "wrn": {"hidden": (), "dropout": (0.1,), "channels": channels, "blocks": 2},
        "vit": {"hidden": (96,), "dropout": (0.1,), "blocks": 4, "stochastic_depth": 0.1},
    }
    options = usual.get(kind, {}) | ({"regularizer": regularizer} if regularizer else {})
    method = METHODS.get(regularizer or "dropout")  # `NetworkConfig` refuses a wrong one
    if method and method.on == "update":
        options["dropout"] = (0.1,)
    if method and method.on == "weights" and kind == "gru":
        options["mask_scope"] = "batch"
    return NetworkConfig(kind, input_shape, classes, **options)


def _noise(config: NetworkConfig, p: float, method: Method | None = None) -> nn.Module:
    """Make a layer of noise on units, or an identity: the rate is 0, or noise is elsewhere."""
    method = method or config.method
    if not p or method.on == "weights":
        return nn.Identity()
    mean = {"mean": config.noise_mean} if config.noise_mean else {}
    return method.layer(p, scope=config.mask_scope, **mean)


def _input_noise(config: NetworkConfig) -> Iterator[tuple[str, nn.Module]]:
    own = config.method.on == "units"
    if config.input_dropout:
        yield "input", _noise(config, config.input_dropout, None if own else METHODS["dropout"])


def _linear(config: NetworkConfig, inputs: int, outputs: int, p: float) -> nn.Module:
    if config.method.on == "weights":
        return config.method.layer(inputs, outputs, p, config.mask_scope)
    return nn.Linear(inputs, outputs)


def _hidden(
    config: NetworkConfig, width: int, rates: tuple[float, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the fully connected layers after `width` units, and the logits."""
    for i, (units, p) in enumerate(zip(config.hidden, rates, strict=True), 1):
        yield f"hidden{i}", _linear(config, width, units, p)
        if config.batch_norm:
            yield f"norm{i}", nn.BatchNorm1d(units)
        layers: list[tuple[str, nn.Module]] = [(f"hidden{i}_relu", nn.ReLU())]
        if p and config.method.on == "units":
            place = 0 if config.before_activation else 1
            layers.insert(place, (f"dropout{i}", _noise(config, p)))
        yield from layers
        width = units
    yield "logits", nn.Linear(width, config.classes)


def _sequential(config: NetworkConfig) -> nn.Module:
    """Make a CNN's blocks, then the layers that it shares with the MLP."""
    width, *size = config.input
    layers = [*_input_noise(config)]
    for i, channels in enumerate(config.channels, 1):
        layers += [
            (f"conv{i}", nn.Conv2d(width, channels, 3, padding=1, bias=False)),
            (f"norm{i}", nn.BatchNorm2d(channels)),
            (f"relu{i}", nn.ReLU()),
            (f"pool{i}", nn.MaxPool2d(2)),
        ]
        if config.spatial_dropout and i < len(config.channels):
            drop = SpatialDropout(config.spatial_dropout, config.mask_scope)
            layers.append((f"spatial_dropout{i}", drop))
        width, size = channels, [side // 2 for side in size]
    layers.append(("flatten", nn.Flatten()))
    layers += _hidden(config, width * size[0] * size[1], config.dropout)
    return nn.Sequential(OrderedDict(layers))


def _gru(config: NetworkConfig) -> nn.Module:
    channels, _, width = config.input
    (units,), on, state = config.hidden, config.method.on, config.dropout[-1]
    inputs = 0.0 if on == "update" else config.dropout[0]
    from_input = _linear(config, channels * width, 3 * units, inputs)
    from_state: nn.Module = nn.Linear(units, 3 * units)
    if on == "weights":
        from_state = RecurrentDropConnect(units, 3 * units, state, config.mask_scope)
    return architectures.GRU(
        units,
        config.classes,
        inputs=_noise(config, inputs),
        state=nn.Identity() if on == "update" else _noise(config, state),
        update=_noise(config, state) if on == "update" else nn.Identity(),
        from_input=from_input,
        from_state=from_state,
    )


def _wrn(config: NetworkConfig) -> nn.Module:
    channels, *size = config.input
    noise = partial(_noise, config, config.dropout[0])
    depth = _depth_rates(config, len(config.channels) * config.blocks)
    layers = [*_input_noise(config)]
    layers += architectures.residual_blocks(channels, config.channels, noise, depth)
    width = config.channels[-1]
    if config.hidden:
        for _ in config.channels[1:]:
            size = [(side + 1) // 2 for side in size]
        width *= size[0] * size[1]
    else:
        layers.append(("average", nn.AdaptiveAvgPool2d(1)))
    layers += [("flatten", nn.Flatten()), *_hidden(config, width, config.dropout[1:])]
    return nn.Sequential(OrderedDict(layers))


def _vit(config: NetworkConfig) -> nn.Module:
    noise, side = partial(_noise, config, config.dropout[0]), min(config.input[1:])
    patch = min(side, max(2, side // 7))
    depth = _depth_rates(config, config.blocks)
    return architectures.VisionTransformer(
        config.input, config.classes, config.hidden[0], patch, noise, depth
    )


def _depth_rates(config: NetworkConfig, blocks: int) -> list[float]:
    """Raise the rate linearly with depth, as Huang et al. (2016) do."""
    return [config.stochastic_depth * (i + 1) / blocks for i in range(blocks)]


def _initialise(module: nn.Module, std: float) -> None:
    """Draw weight matrices and kernels anew, and set biases of their layers to zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | DropConnect):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


_BUILDERS: Mapping[str, Callable[[NetworkConfig], nn.Module]] = {
    "mlp": _sequential,
    "cnn": _sequential,
    "gru": _gru,
    "wrn": _wrn,
    "vit": _vit,
}
