"""Noise of recurrent networks that differs from that of others: over time, and on the state."""

from collections.abc import Sequence

from torch import Tensor

from dropserve.models.regularizers.noise import Bernoulli, Elementwise, Scope, check_rate


class VariationalDropout(Elementwise):
    """Inverted dropout with one mask for all steps of x [B, T, units].

    Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
    Networks" (NIPS 2016), section 4.
    """

    def __init__(self, p: float = 0.5, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("variational", check_rate(p)), scope)

    def units(self, x: Tensor) -> Sequence[int]:
        """Return [B, 1, units]."""
        return len(x), 1, *x.shape[2:]


class Zoneout(Elementwise):
    """Says by what share each unit of a state [B, T, units] is updated: 0 with probability p.

    Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations" (ICLR
    2017): given ones, it gives the masks of the new values. Eval mode takes the expected update.
    """

    def __init__(self, p: float = 0.1, scope: Scope = "example") -> None:
        super().__init__(Bernoulli("zoneout", check_rate(p), rescaled=False), scope)
