"""Stochastic regularizers: a file a method, and what networks and the command line know of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dropserve.models.regularizers.dropconnect import (
    DropConnect,
    RecurrentDropConnect,
    with_moment_matching,
)
from dropserve.models.regularizers.dropout import (
    InvertedDropout,
    SpatialDropout,
    StochasticDepth,
    VanillaDropout,
)
from dropserve.models.regularizers.gaussian import GaussianDropout, GaussianNoise, check_std
from dropserve.models.regularizers.noise import (
    SCOPES,
    Bernoulli,
    Elementwise,
    Gaussian,
    Law,
    Scope,
    Stochastic,
    begin_epoch,
    check_rate,
    noise,
)
from dropserve.models.regularizers.recurrent import VariationalDropout, Zoneout


@dataclass(frozen=True)
class Method:
    """What a network needs to know of a stochastic regularizer.

    Attributes:
        layer: makes a layer from a rate and a scope; a linear one where noise is on the weights.
        networks: those that can have it.
        on: what its noise is put on.
        check: returns a rate, or raises ConfigError.
    """

    layer: Callable[..., Stochastic]
    networks: tuple[str, ...]
    on: Literal["units", "weights", "update"] = "units"
    check: Callable[[float], float] = check_rate


METHODS: Mapping[str, Method] = {
    "dropout": Method(InvertedDropout, ("mlp", "cnn", "gru", "wrn", "vit")),
    "vanilla": Method(VanillaDropout, ("mlp", "cnn", "wrn", "vit")),
    "spatial": Method(SpatialDropout, ("wrn",)),
    "gaussian": Method(GaussianDropout, ("mlp", "cnn", "gru", "wrn", "vit")),
    "noise": Method(GaussianNoise, ("mlp", "cnn", "wrn", "vit"), check=check_std),
    "dropconnect": Method(DropConnect, ("mlp", "cnn", "gru"), on="weights"),
    "variational": Method(VariationalDropout, ("gru",)),
    "zoneout": Method(Zoneout, ("gru",), on="update"),
}
"""By the name that `--regularizer` gives; a layer draws its noise by `Stochastic.noise`."""

__all__ = [
    "METHODS", "SCOPES", "Bernoulli", "DropConnect", "Elementwise", "Gaussian", "GaussianDropout",
    "GaussianNoise", "InvertedDropout", "Law", "Method", "RecurrentDropConnect", "Scope",
    "SpatialDropout", "Stochastic", "StochasticDepth", "VanillaDropout", "VariationalDropout",
    "Zoneout", "begin_epoch", "check_rate", "noise", "with_moment_matching",
]  # fmt: skip
