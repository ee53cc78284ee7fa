"""Inverted dropout, vanilla dropout, and inverted dropout of whole channels and branches.

Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: A Simple Way to Prevent
Neural Networks from Overfitting", JMLR 15 (2014). There `p` is the probability of *keeping* a
unit; here, as in PyTorch, `p` is the probability of dropping it, everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dropserve.models.regularizers.noise import Bernoulli, Elementwise, Scope, check_rate, noise


class InvertedDropout(Elementwise):
    """Drops units and divides the others by 1-p; in eval mode the identity.

    Section 10 of Srivastava et al. (2014). E[output] = x and Var[output] = x^2 p/(1-p).
    """

    def __init__(self, p: float = 0.5, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("dropout", check_rate(p)), scope)


class VanillaDropout(Elementwise):
    """Drops units; in eval mode multiplies by 1-p, the weight scaling rule.

    Section 4 and figure 2 of Srivastava et al. (2014): scaling a unit's output by the probability
    of its presence is the same as scaling its outgoing weights.
    """

    def __init__(self, p: float = 0.5, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("vanilla", check_rate(p), rescaled=False), scope)


class SpatialDropout(Elementwise):
    """Drops whole channels, of x [B, C, ...], and divides the others by 1-p.

    Tompson et al., "Efficient Object Localization Using Convolutional Networks" (CVPR 2015),
    section 3.2: neighbouring pixels are so alike that dropping single ones removes little.
    """

    def __init__(self, p: float = 0.5, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("spatial", check_rate(p)), scope)

    def units(self, x: Tensor) -> Sequence[int]:
        """Return [B, C, 1, ...]."""
        return _channels(x)


class StochasticDepth(Elementwise):
    """Drops what a residual branch gives, of an example as a whole, else divides it by 1-p.

    Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016), which scales in eval mode
    instead: the same, but for a factor that the branch's last layer can hold.
    """

    def __init__(self, p: float = 0.1, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("depth", check_rate(p)), scope)

    def units(self, x: Tensor) -> Sequence[int]:
        """Return [B, 1, ...]."""
        return len(x), *(1 for _ in x.shape[1:])


def inverted_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`InvertedDropout` as a function of x, of any shape."""
    return x * noise(x, Bernoulli("dropout", p), x.shape) if training and p else x


def vanilla_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`VanillaDropout` as a function of x, of any shape."""
    law = Bernoulli("vanilla", p, rescaled=False)
    return x * (noise(x, law, x.shape) if training and p else law.mean)


def spatial_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`SpatialDropout` as a function of x [B, C, ...]."""
    return x * noise(x, Bernoulli("spatial", p), _channels(x)) if training and p else x


def _channels(x: Tensor) -> torch.Size:
    return torch.Size((*x.shape[:2], *(1 for _ in x.shape[2:])))
