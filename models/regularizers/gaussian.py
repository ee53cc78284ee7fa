"""Gaussian dropout, and additive Gaussian noise."""

import torch

from dropserve.models.errors import ConfigError
from dropserve.models.regularizers.noise import Elementwise, Gaussian, Scope, check_rate


class GaussianDropout(Elementwise):
    """Multiplies units by normal numbers of mean 1 and variance p/(1-p); in eval mode the identity.

    Section 10 of Srivastava et al. (2014): mean and variance are those of inverted dropout.
    """

    def __init__(self, p: float = 0.5, scope: Scope = "example") -> None:
        super().__init__(Gaussian("gaussian", 1.0, 0.0, 0.0).at(check_rate(p)), scope)


class GaussianNoise(Elementwise):
    """Adds normal numbers, of which the rate is the standard deviation; in eval mode their mean.

    Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", Neural Computation 7
    (1995), for noise on inputs.
    """

    combine = staticmethod(torch.add)

    def __init__(self, std: float = 0.1, mean: float = 0.0, scope: Scope = "example") -> None:
        if not -100 < mean < 100:
            raise ConfigError(f"the mean of noise must be in (-100, 100); got {mean!r}")
        super().__init__(Gaussian("noise", float(mean), check_std(std)), scope)


def check_std(std: float) -> float:
    """Return `std`; ConfigError if it is no standard deviation in [0, 100)."""
    if not 0 <= std < 100:
        raise ConfigError(f"the standard deviation of noise must be in [0, 100); got {std!r}")
    return float(std)
