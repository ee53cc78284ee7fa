"""Stochastic depth: whole residual branches are dropped."""

from collections.abc import Sequence

from torch import Tensor

from dropserve.models.regularizers.noise import Bernoulli, Elementwise, Scope, check_rate


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
