"""Noise of recurrent networks that differs from that of others: over time, and on the state."""

from collections.abc import Sequence

from torch import Tensor

from dropserve.models.regularizers.noise import Bernoulli, Elementwise, Scope, check_rate


class VariationalDropout(Elementwise):
    """Drops the same inputs and state units at all steps; else it is inverted dropout.

    Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
    Networks" (NIPS 2016), section 4.
    """

    def __init__(self, p: float = 0.5, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("variational", check_rate(p)), scope)

    def units(self, x: Tensor) -> Sequence[int]:
        """Return [B, 1, units]."""
        return len(x), 1, *x.shape[2:]


class Zoneout(Elementwise):
    """Keeps units of a state at their previous value; eval mode takes the expected update.

    Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations" (ICLR
    2017): given ones [B, T, units], it gives the share of the new value that each unit takes.
    """

    def __init__(self, p: float = 0.1, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("zoneout", check_rate(p), rescaled=False), scope)
