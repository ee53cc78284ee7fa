"""DropConnect: noise on weights instead of units.

Wan, Zeiler, Zhang, LeCun and Fergus, "Regularization of Neural Networks using DropConnect" (ICML
2013). Kept weights are divided by 1-p here, so eval mode uses the weights as they are: the
mean-weight rule.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropserve.models.errors import ConfigError
from dropserve.models.regularizers.noise import (
    Bernoulli,
    Gaussian,
    Scope,
    Stochastic,
    check_rate,
    noise,
)


class DropConnect(Stochastic):
    """Drops weights and biases of a linear layer; eval mode has the mean weights.

    One draw covers [out, in + 1] a mask, the biases last. Masks per example take `B` times the
    memory of the weights.

    Attributes:
        matches_moments: draw what the layer gives, in place of its weights: normal, with the mean
            and variance that dropped weights would give it (section 3.2 and algorithm 2 there).
    """

    def __init__(self, inputs: int, outputs: int, p: float = 0.5, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("dropconnect", check_rate(p)), scope)
        linear = nn.Linear(inputs, outputs)
        self.weight, self.bias = linear.weight, linear.bias
        self.matches_moments = False

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401  a tensor, but of `RecurrentDropConnect`
        """Map x [B, ..., in] to [B, ..., out]."""
        if self.training and self.is_noisy and self.matches_moments:
            return self._normal(x)
        return self.drawn(x)(x)

    def drawn(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the layer with one draw for the examples of x [B, ...]."""
        if not self.training or not self.is_noisy:
            return partial(F.linear, weight=self.weight, bias=self.bias)
        outputs, inputs = self.weight.shape
        mask = self.noise(x, (len(x), outputs, inputs + 1))
        weight, bias = self.weight * mask[..., :-1], self.bias * mask[..., -1]
        if len(mask) == 1:
            return partial(F.linear, weight=weight[0], bias=bias[0])
        return partial(_products, weight=weight, bias=bias)

    def _normal(self, x: Tensor) -> Tensor:
        mean = F.linear(x, self.weight, self.bias)
        variance = F.linear(x.square(), self.weight.square(), self.bias.square())
        drawn = noise(x, Gaussian("moment-matching", 0.0, 1.0), mean.shape)
        return mean + self.law.std * variance.sqrt() * drawn


class RecurrentDropConnect(DropConnect):
    """DropConnect on hidden-to-hidden weights: one draw for all steps of a sequence.

    Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models" (ICLR 2018).
    """

    def forward(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what maps the states [B, in] of all steps to [B, out], for x [B, ...]."""
        return self.drawn(x)


def with_moment_matching(module: nn.Module) -> nn.Module:
    """Copy a network, whose DropConnect layers then draw what they give; weights are shared.

    Raises ConfigError if it has none.
    """
    memo = {id(p): p for p in module.parameters()}
    copied = copy.deepcopy(module, memo)
    layers = [layer for layer in copied.modules() if isinstance(layer, DropConnect)]
    if not layers or any(isinstance(layer, RecurrentDropConnect) for layer in layers):
        raise ConfigError("moment matching is for networks with DropConnect on feed-forward layers")
    for layer in layers:
        layer.matches_moments = True
    return copied


def _products(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map x [B, ..., in] by weights [B, out, in] and biases [B, out], each example by its own."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT).view(*x.shape[:-1], -1)
