"""What T thinned networks say together: mean, spread, and where the doubt comes from.

p_tc is the probability of class c under thinned network t. Natural logarithms; sums in float64.
Predictive entropy = expected entropy (the data's own ambiguity) + mutual information (the model's
ignorance): Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning"
(2011), equation 2; for dropout, Gal, "Uncertainty in Deep Learning" (2016), section 3.3.

The entropies are plug-in estimates: predictive entropy and mutual information come out low by
about (1/2T) sum_c variance_c / mean_c, so never compare mutual information across different T.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import SamplingError
from models.montecarlo.masks import BLOCK, MaskKind


@dataclass(frozen=True)
class Summary:
    """Statistics of T thinned networks over B images; float64 tensors.

    Attributes:
        mean: [B, C], the average of probabilities, never of logits.
        variance: [B, C], with T-1; None for a single sample.
        standard_error: [B, C], of the mean; None where it cannot be estimated.
        predictive_entropy: [B], H[mean]: total uncertainty, in nats.
        expected_entropy: [B], mean of H[p_t]: aleatoric.
        mutual_information: [B], their difference, at least 0: epistemic (BALD).
        variation_ratio: [B], share of samples that do not vote for the modal class.
        lower: [B, C], sample quantile at (1-level)/2.
        upper: [B, C], sample quantile at (1+level)/2. The interval covers the randomness of the
            masks, not the label.
    """

    mean: Tensor
    variance: Tensor | None
    standard_error: Tensor | None
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor
    lower: Tensor
    upper: Tensor


def summarize(probabilities: Tensor, masks: MaskKind, level: float = 0.9) -> Summary:
    """Summarise the answers of T thinned networks.

    Args:
        probabilities: [T, B, C], rows sum to one.
        masks: the kind of masks that made them; decides how the standard error is estimated.
        level: of the interval, in (0, 1).
    """
    statistics = Statistics(len(probabilities), masks, level)
    statistics.add(probabilities.permute(2, 1, 0).contiguous())
    return statistics.summary()


class Statistics:
    """Takes in samples a chunk at a time and keeps sums, not samples.

    Of the samples themselves it keeps what the interval is read from: the (1-level)/2 T smallest
    and largest of each class and image.

    Args:
        samples: T, all that will come.
        masks: their kind.
        level: of the interval, in (0, 1).
    """

    def __init__(self, samples: int, masks: MaskKind, level: float = 0.9) -> None:
        self._total = samples
        self._masks = masks
        self._level = level
        self._tail = int((1 - level) / 2 * (samples - 1)) + 2
        self._samples = _Moments()
        self._blocks = _Moments()
        self._entropy: Tensor | None = None
        self._votes: Tensor | None = None
        self._ordered: Tensor | None = None

    def add(self, p: Tensor) -> None:
        """Take in probabilities [C, B, t]: the next samples, whole blocks until the last.

        The samples of a class and image lie together, so that sums and sorting run along them.
        """
        blocks = p.shape[2] // BLOCK
        self._samples.add(p)
        if blocks and self._masks == "stratified":
            whole = p[..., : blocks * BLOCK].reshape(*p.shape[:2], blocks, BLOCK)
            self._blocks.add(whole.mean(3, dtype=torch.float64))
        smallest = torch.finfo(p.dtype).tiny
        entropy = -(p * p.clamp_min(smallest).log()).sum(0).sum(1, dtype=torch.float64)
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        votes = _votes(p)
        self._votes = votes if self._votes is None else self._votes + votes
        self._order(p)

    def summary(self) -> Summary:
        """Say what the samples so far say together; all T of them must have come.

        Raises:
            SamplingError: they have not.
        """
        if self._samples.count != self._total or self._entropy is None or self._votes is None:
            raise SamplingError(f"{self._samples.count} samples of {self._total} came")
        mean, variance = self._samples.mean, self._samples.variance
        predictive = torch.special.entr(mean).sum(0)
        expected = self._entropy / self._total
        error = self._standard_error()
        return Summary(
            mean=mean.T,
            variance=None if variance is None else variance.T,
            standard_error=None if error is None else error.T,
            predictive_entropy=predictive,
            expected_entropy=expected,
            mutual_information=(predictive - expected).clamp_min(0),
            variation_ratio=1 - self._votes.amax(1).double() / self._total,
            lower=self._quantile((1 - self._level) / 2).T,
            upper=self._quantile((1 + self._level) / 2).T,
        )

    def _standard_error(self) -> Tensor | None:
        """Estimate the standard error of the mean over T samples: [C, B].

        Independent masks: sqrt(variance / T). Stratified masks: samples of one block depend on each
        other and blocks do not, so the spread of the K block means says how far off their average
        is; that needs two blocks. A last, partial block counts with its own share of the mean and
        is taken for independent samples, which is usually too much and for some functions a little
        too little (Owen, 1997: a Latin hypercube of n points has at most n/(n-1) times their
        variance).
        """
        variance, between = self._samples.variance, self._blocks.variance
        if variance is None:
            return None
        if self._masks == "independent":
            return (variance / self._total).sqrt()
        if between is None:
            return None
        rest = self._total - BLOCK * self._blocks.count
        whole = (1 - rest / self._total) ** 2 * between / self._blocks.count
        return (whole + rest * variance / self._total**2).sqrt()

    def _order(self, p: Tensor) -> None:
        """Sort the new samples into the smallest and largest so far."""
        found = p if self._ordered is None else torch.cat([self._ordered, p], 2)
        if found.is_cuda:
            found = found.sort(2).values
        else:  # NumPy's sort is vectorised and takes a twentieth of torch's time
            found = torch.from_numpy(np.sort(found.numpy(), axis=2))
        if found.shape[2] > 2 * self._tail:
            found = torch.cat([found[..., : self._tail], found[..., -self._tail :]], 2)
        self._ordered = found

    def _quantile(self, level: float) -> Tensor:
        """Interpolate linearly between order statistics [C, B, T], as `numpy.quantile` does."""
        ordered = self._ordered
        if ordered is None:
            raise SamplingError("no samples came")
        position = level * (self._total - 1)
        below = int(position)
        above = min(below + 1, self._total - 1)
        skipped = self._total - ordered.shape[2]  # from the middle
        low, high = (
            ordered[..., i if i < self._tail else i - skipped].double() for i in (below, above)
        )
        return torch.lerp(low, high, position - below)


def _votes(p: Tensor) -> Tensor:
    """Count how many samples find each class the most probable: [C, B, t] to [B, C]."""
    votes = (p == p.amax(0)).sum(2)
    if int(votes.sum()) != p[0].numel():  # a tie: the first of the classes has the vote
        return F.one_hot(p.argmax(0), len(p)).sum(1)
    return votes.T


class _Moments:
    """Running mean and variance along the last dimension, in float64.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979), equation 2.1.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in values [..., n]."""
        count = values.shape[-1]
        values = values.double()
        mean = values.mean(-1)
        squares = values.sub(mean.unsqueeze(-1)).square_().sum(-1)  # a tenth of var_mean's time
        total = self.count + count
        gap = mean - self.mean
        self._squares = self._squares + squares + gap**2 * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor | None:
        """With n-1; None for a single value."""
        return self._squares / (self.count - 1) if self.count > 1 else None
