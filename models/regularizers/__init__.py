"""Stochastic regularizers: a file a method, and what networks and the command line know of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dropserve.models.regularizers.depth import StochasticDepth
from dropserve.models.regularizers.dropconnect import (
    DropConnect,
    RecurrentDropConnect,
    with_moment_matching,
)
from dropserve.models.regularizers.dropout import InvertedDropout, SpatialDropout, VanillaDropout
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
        text: what it does, in a sentence.
        networks: those that can have it.
        on: what its noise is put on.
        check: returns a rate, or raises ConfigError.
    """

    layer: Callable[..., Stochastic]
    text: str
    networks: tuple[str, ...]
    on: Literal["units", "weights", "update"] = "units"
    check: Callable[[float], float] = check_rate


METHODS: Mapping[str, Method] = {
    "dropout": Method(
        InvertedDropout,
        "drops units and divides the others by 1-p",
        ("mlp", "cnn", "gru", "wrn", "vit"),
    ),
    "vanilla": Method(
        VanillaDropout,
        "drops units, and multiplies by 1-p in eval mode instead",
        ("mlp", "cnn", "wrn", "vit"),
    ),
    "spatial": Method(SpatialDropout, "drops whole channels", ("wrn",)),
    "gaussian": Method(
        GaussianDropout,
        "multiplies units by normal numbers of mean 1 and variance p/(1-p)",
        ("mlp", "cnn", "gru", "wrn", "vit"),
    ),
    "noise": Method(
        GaussianNoise,
        "adds normal numbers to units; --dropout is their standard deviation",
        ("mlp", "cnn", "wrn", "vit"),
        check=check_std,
    ),
    "dropconnect": Method(
        DropConnect,
        "drops weights and biases of the hidden layers",
        ("mlp", "cnn", "gru"),
        on="weights",
    ),
    "variational": Method(
        VariationalDropout, "drops the same inputs and state units at all steps", ("gru",)
    ),
    "zoneout": Method(
        Zoneout, "keeps units of the state at their previous value", ("gru",), on="update"
    ),
}
"""By the name that `--regularizer` and `NetworkConfig.regularizer` give. A new one needs a layer
whose noise is drawn by `Stochastic.noise`, and an entry here."""

__all__ = [
    "METHODS",
    "SCOPES",
    "Bernoulli",
    "DropConnect",
    "Elementwise",
    "Gaussian",
    "GaussianDropout",
    "GaussianNoise",
    "InvertedDropout",
    "Law",
    "Method",
    "RecurrentDropConnect",
    "Scope",
    "SpatialDropout",
    "Stochastic",
    "StochasticDepth",
    "VanillaDropout",
    "VariationalDropout",
    "Zoneout",
    "begin_epoch",
    "noise",
    "with_moment_matching",
]
