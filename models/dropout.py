"""Inverted dropout, vanilla dropout with the weight scaling rule, and spatial dropout.

Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: A Simple Way to Prevent
Neural Networks from Overfitting", JMLR 15 (2014). There `p` is the probability of *keeping* a
unit; here, as in PyTorch, `p` is the probability of dropping it, everywhere.

Monte Carlo dropout intercepts the functions by PyTorch's `__torch_function__` protocol: a new one
needs an entry in `montecarlo/interception.py`, and its module one in `sequential.py` to be fast, if
it does nothing in eval mode.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from dropserve.models.errors import ConfigError

MaskSource = Callable[[torch.Size, float, torch.device], Tensor]
"""`(shape, p, device) -> bool tensor of that shape`: True where a unit is kept."""


def random_mask(
    shape: torch.Size, p: float, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draw which units are kept, each independently dropped with probability `p`.

    Sixteen random bits an element, so `p` is met to 2^-16: several times cheaper than `bernoulli_`,
    which draws a floating-point number for each.
    """
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15  # as int16
    return (words.view(torch.int16)[:count] >= threshold).view(shape)


def inverted_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, source: MaskSource = random_mask
) -> Tensor:
    """Drop units of `x`, of any shape, and divide the others by 1-p; in eval mode the identity.

    Section 10 of Srivastava et al. (2014). E[output] = x and Var[output] = x^2 p/(1-p).
    """
    if has_torch_function_unary(x):
        return handle_torch_function(inverted_dropout, (x,), x, p, training, source)
    if not training or p == 0:
        return x
    kept = source(x.shape, p, x.device)
    return x * kept.to(x.dtype) / (1 - p)  # forward and backward in half the time of torch.where


def vanilla_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, source: MaskSource = random_mask
) -> Tensor:
    """Drop units of `x`, of any shape; in eval mode multiply by 1-p, the weight scaling rule.

    Section 4 and figure 2 of Srivastava et al. (2014): scaling a unit's output by the probability
    of its presence is the same as scaling its outgoing weights.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(vanilla_dropout, (x,), x, p, training, source)
    if not training:
        return x * (1 - p)
    return x * source(x.shape, p, x.device).to(x.dtype)


def spatial_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, source: MaskSource = random_mask
) -> Tensor:
    """Drop whole channels of `x [B, C, ...]` and divide the others by 1-p.

    Tompson et al., "Efficient Object Localization Using Convolutional Networks" (CVPR 2015),
    section 3.2: neighbouring pixels are so alike that dropping single ones removes little.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(spatial_dropout, (x,), x, p, training, source)
    if not training or p == 0:
        return x
    channels = torch.Size((*x.shape[:2], *(1 for _ in x.shape[2:])))
    return x * source(channels, p, x.device).to(x.dtype) / (1 - p)


def check_rate(p: float) -> float:
    """Return `p`; ConfigError if it is no probability of dropping, in [0, 1)."""
    if not 0 <= p < 1:
        raise ConfigError(f"dropout p must be in [0, 1), the probability of dropping; got {p!r}")
    return float(p)


class Dropout(nn.Module):
    """Base of the modules: a rate `p` in [0, 1), else ConfigError, and a source of masks."""

    function: Callable[[Tensor, float, bool, MaskSource], Tensor]

    def __init__(self, p: float = 0.5, source: MaskSource = random_mask) -> None:
        super().__init__()
        self.p = check_rate(p)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """Map x to the same shape."""
        return self.function(x, self.p, self.training, self.source)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"p={self.p}"


class InvertedDropout(Dropout):
    """`inverted_dropout` as a module."""

    function = staticmethod(inverted_dropout)


class VanillaDropout(Dropout):
    """`vanilla_dropout` as a module."""

    function = staticmethod(vanilla_dropout)


class SpatialDropout(Dropout):
    """`spatial_dropout` as a module."""

    function = staticmethod(spatial_dropout)
