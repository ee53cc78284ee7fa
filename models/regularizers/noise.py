"""Noise: its law, and `noise()`, by which every stochastic layer draws it.

A layer's output in train mode is an affine function of its noise, and in eval mode what it is with
the noise at its mean. So whoever calls `noise()`, as Monte Carlo sampling does by PyTorch's
`__torch_function__` protocol, can sample any of them, and knows eval mode without the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from dropserve.models.errors import ConfigError

Scope = Literal["example", "batch", "epoch"]
"""What shares a draw in training: nothing, the examples of a batch, or all of an epoch."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Bernoulli:
    """A mask: 0 with probability `p`, else `kept`.

    Attributes:
        kind: the method, as the API names it.
        p: probability of dropping.
        rescaled: whether what is kept is divided by 1-p.
        adjustable: whether another p may be put in place of the layer's: not where what follows is
            worked out from that, as with alpha dropout.
    """

    kind: str
    p: float
    rescaled: bool = True
    adjustable: bool = True

    @property
    def kept(self) -> float:
        """What a kept unit is multiplied by."""
        return 1 / (1 - self.p) if self.rescaled else 1.0

    @property
    def mean(self) -> float:
        """The expected value."""
        return 1.0 if self.rescaled else 1 - self.p

    @property
    def std(self) -> float:
        """The standard deviation."""
        return self.kept * sqrt(self.p * (1 - self.p))

    def at(self, p: float) -> Self:
        """Return the law with another rate, what is kept scaled to match, where it may have one."""
        return replace(self, p=p) if self.adjustable else self


@dataclass(frozen=True)
class Gaussian:
    """Normal numbers; `p` is the rate of the Bernoulli mask of the same variance, None for none."""

    kind: str
    mean: float
    std: float
    p: float | None = None
    kept: ClassVar[float] = 1.0  # nothing is dropped, and nothing scaled to make up for it

    def at(self, p: float) -> "Gaussian":
        """Return the law with another rate, where it has one."""
        return self if self.p is None else replace(self, p=p, std=sqrt(p / (1 - p)))


Law = Bernoulli | Gaussian


def draw(law: Law, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw elements, each on its own, by PyTorch's global generator."""
    if isinstance(law, Bernoulli):
        return random_mask(shape, law.p, device).to(dtype).mul_(law.kept)
    return torch.randn(shape, device=device, dtype=dtype).mul_(law.std).add_(law.mean)


def noise(x: Tensor, law: Law, shape: torch.Size, source: Any = draw) -> Tensor:  # noqa: ANN401
    """Return noise of a shape, from a `source` like `draw`, for a layer in train mode given `x`.

    All randomness of our layers is drawn here, and Monte Carlo sampling puts its own in its place.
    """
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(noise, (x,), x, law, shape, source)
        return result
    drawn: Tensor = source(law, shape, x.device, x.dtype)
    return drawn


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


def check_rate(p: float) -> float:
    """Return `p`; ConfigError if it is no probability of dropping, in [0, 1)."""
    if not 0 <= p < 1:
        raise ConfigError(f"dropout p must be in [0, 1), the probability of dropping; got {p!r}")
    return float(p)


class Stochastic(nn.Module):
    """Base of stochastic layers: a law, and the scope of a draw in training."""

    def __init__(self, law: Law, scope: Scope = "example") -> None:
        super().__init__()
        self.law = law
        self.scope = scope
        self.of_epoch: Tensor | None = None

    @property
    def p(self) -> float | None:
        """The rate; None where the law has none."""
        return self.law.p

    @p.setter
    def p(self, p: float) -> None:
        self.law = self.law.at(check_rate(p))

    @property
    def is_noisy(self) -> bool:
        """Say if train mode differs from eval mode."""
        return self.law.std > 0

    def noise(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Draw noise [B, ...] for an input x [B, ...]; [1, ...] where examples share it."""
        size = torch.Size(shape if self.scope == "example" else (1, *shape[1:]))
        return noise(x, self.law, size, self._hold if self.scope == "epoch" else draw)

    def _hold(self, law: Law, shape: torch.Size, *like: Any) -> Tensor:  # noqa: ANN401  device, dtype
        if self.of_epoch is None or self.of_epoch.shape != shape:
            self.of_epoch = draw(law, shape, *like)
        return self.of_epoch

    def extra_repr(self) -> str:
        """Show the law and the scope."""
        law = self.law
        shown = f"p={law.p}" if law.p is not None else f"mean={law.mean}, std={law.std}"
        return shown if self.scope == "example" else f"{shown}, scope={self.scope}"


def begin_epoch(module: nn.Module) -> None:
    """Have a network draw anew what its layers draw once an epoch."""
    for layer in module.modules():
        if isinstance(layer, Stochastic):
            layer.of_epoch = None


class Elementwise(Stochastic):
    """Base of layers that multiply each unit by noise, or add it: `combine`."""

    combine: Callable[[Tensor, Tensor | float], Tensor] = staticmethod(torch.mul)

    @property
    def is_identity(self) -> bool:
        """Say if eval mode changes nothing."""
        return self.law.mean == (1 if self.combine is torch.mul else 0)

    def units(self, x: Tensor) -> Sequence[int]:
        """Return the noise's shape for an input, which it is spread over."""
        return x.shape

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, ...] to the same shape."""
        if self.training and self.is_noisy:
            return self.combine(x, self.noise(x, self.units(x)))
        return x if self.is_identity else self.combine(x, self.law.mean)
