"""Statistics of T thinned networks: mean, spread, and the sources of uncertainty.

p_tc is the probability of class c under thinned network t. Natural logarithms; sums in float64.
Predictive entropy = expected entropy (the data's own ambiguity) + mutual information (the model's
ignorance): Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning"
(2011), equation 2; for dropout, Gal, "Uncertainty in Deep Learning" (2016), section 3.3.

The entropies are plug-in estimates: predictive entropy and mutual information come out low by
about sum_c standard_error_c^2 / (2 mean_c), which for independent masks is
(1/2T) sum_c variance_c / mean_c. So never compare mutual information across different T.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dropserve.models.defaults import MaskKind
from dropserve.models.device import is_gpu, to_cpu
from dropserve.models.errors import SamplingError
from dropserve.models.montecarlo.masks import BLOCK

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Summary:
    """Statistics of T thinned networks over B images; float64 tensors.

    The service answers every field: it needs one in `UncertainPrediction` of `service/schemas.py`.

    Attributes:
        mean: [B, C], the average of probabilities, never of logits.
        variance: [B, C], with T-1; None for a single sample. Samples of stratified masks depend on
            each other: variance (T-1)/T + standard_error^2 is without bias for both kinds.
        standard_error: [B, C], of the mean; None where it cannot be estimated (`_mean_variance`).
        degrees_of_freedom: of the standard error (`degrees_of_freedom`); None likewise.
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
    degrees_of_freedom: int | None
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor
    lower: Tensor
    upper: Tensor


def summarize(probabilities: Tensor, masks: MaskKind, level: float = 0.9) -> Summary:
    """Summarise probabilities [T, B, C] of T thinned networks, made by masks of that kind."""
    statistics = Statistics(len(probabilities), masks, level)
    statistics.add(probabilities.permute(2, 1, 0).contiguous())
    return statistics.summary()


def degrees_of_freedom(masks: MaskKind, samples: int) -> int | None:
    """Count the independent differences that a standard error rests on; None: there is no estimate.

    With quantile t of Student's distribution of so many, mean +- t standard_error is a confidence
    interval of the mean over all masks: at nineteen degrees 95% lie within 2.09 standard errors, at
    one within 12.7. Independent samples are T-1 differences; of stratified ones only whole blocks
    are independent, and the samples after the last of them are not counted.
    """
    found = samples if masks == "independent" else samples // BLOCK
    return found - 1 if found > 1 else None


class Statistics:
    """Takes in T samples a chunk at a time and keeps sums, not samples.

    Of the samples themselves it keeps what the interval is read from: the (1-level)/2 T smallest
    and largest of each class and image. On a CPU NumPy does the work: on arrays as small as one
    answer's its calls cost a third of torch's, and its sort a twentieth. On a GPU both stay there
    until the summary.
    """

    def __init__(self, samples: int, masks: MaskKind, level: float = 0.9) -> None:
        self._total = samples
        self._masks = masks
        self._level = level
        self._tail = int((1 - level) / 2 * (samples - 1)) + 2
        self._count = 0
        self._sums: dict[str, Any] = {}  # arrays, or tensors of a GPU
        self._ordered: Any = None  # likewise

    def add(self, probabilities: Tensor) -> None:
        """Take in probabilities [C, B, t]: the next samples, whole blocks until the last.

        The samples of a class and image lie together, so that sums and sorting run along them.
        Variances come from sums of distances to the first sample, which lies among the others: no
        digits are lost (Chan, Golub and LeVeque, 1983, section 3).
        """
        on_gpu = is_gpu(probabilities.device)
        p: Any = probabilities if on_gpu else probabilities.numpy()
        sums, order = (_sums_on_gpu, _order_on_gpu) if on_gpu else (_sums, _order)
        found = sums(p, self._sums.get("first"))
        before = {name: values for name, values in self._sums.items() if name != "first"}
        self._sums = found | {name: values + found[name] for name, values in before.items()}
        self._ordered = order(self._ordered, p, self._tail)
        self._count += p.shape[2]

    @property
    def complete(self) -> bool:
        """Whether all samples have come."""
        return self._count >= self._total

    def summary(self) -> Summary:
        """Return the statistics; SamplingError unless all T samples were added."""
        if self._count != self._total:
            raise SamplingError(f"{self._count} samples of {self._total} came")
        total = self._total
        if isinstance(self._ordered, Tensor):
            copied = to_cpu([self._ordered, *self._sums.values()])
            self._ordered, *sums = (tensor.numpy() for tensor in copied)
            self._sums = dict(zip(self._sums, sums, strict=True))
        found = figures(self._masks, self._sums, total, total // BLOCK)
        found["variation_ratio"] = 1 - self._sums["votes"].max(0) / total
        found["lower"] = self._quantile((1 - self._level) / 2)
        found["upper"] = self._quantile((1 + self._level) / 2)
        tensors: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(values.T)) for name, values in found.items()
        }
        degrees = degrees_of_freedom(self._masks, total)
        if total == 1:
            tensors["variance"] = None
        if degrees is None:
            tensors["standard_error"] = None
        return Summary(degrees_of_freedom=degrees, **tensors)

    def _quantile(self, level: float) -> Array:
        """Interpolate linearly between order statistics, as `numpy.quantile` does: [C, B]."""
        position = level * (self._total - 1)
        below = int(position)
        skipped = self._total - self._ordered.shape[2]  # from the middle
        low, high = (
            self._ordered[..., i if i < self._tail else i - skipped].astype(np.float64)
            for i in (below, min(below + 1, self._total - 1))
        )
        quantile: Array = low + (high - low) * (position - below)
        return quantile


def _sums(p: Array, first: Array | None) -> dict[str, Array]:
    """Sum over samples [C, B, t], by distances to the `first` of all: [C, B], the entropy [B]."""
    classes, images, count = p.shape
    first = p[..., 0].astype(np.float64) if first is None else first
    whole = count // BLOCK * BLOCK
    distance = p - first[..., None]
    blocks = distance[..., :whole].reshape(classes, images, whole // BLOCK, BLOCK)
    by_block = blocks @ np.ones(BLOCK)  # twice as fast as .sum(3)
    in_blocks = by_block.sum(2)
    return {
        "first": first,
        "sum": in_blocks + distance[..., whole:].sum(2),
        "squares": np.einsum("cbt,cbt->cb", distance, distance),
        "blocks": in_blocks,
        "block_squares": np.einsum("cbk,cbk->cb", by_block, by_block),
        "entropy": entropy(p).sum(1, dtype=np.float64),
        "votes": _votes(p),
    }


def _sums_on_gpu(p: Tensor, first: Tensor | None) -> dict[str, Tensor]:
    """Do as `_sums`."""
    first = p[..., 0].double() if first is None else first
    whole = p.shape[2] // BLOCK * BLOCK
    distance = p - first.unsqueeze(2)
    by_block = distance[..., :whole].reshape(*first.shape, -1, BLOCK).sum(3)
    classes = torch.arange(len(p), device=p.device).view(-1, 1, 1)
    return {
        "first": first,
        "sum": distance.sum(2),
        "squares": distance.square().sum(2),
        "blocks": by_block.sum(2),
        "block_squares": by_block.square().sum(2),
        "entropy": torch.special.entr(p).sum(0).sum(1, dtype=torch.float64),
        "votes": (p.argmax(0) == classes).sum(2, dtype=torch.float64),  # a tie: the first class
    }


def _order(before: Array | None, p: Array, tail: int) -> Array:
    """Sort samples [C, B, t] with those kept `before`, and keep the smallest and largest."""
    ordered = np.sort(p if before is None else np.concatenate([before, p], 2), axis=2)
    if ordered.shape[2] <= 2 * tail:
        return ordered
    return np.concatenate([ordered[..., :tail], ordered[..., -tail:]], 2)


def _order_on_gpu(before: Tensor | None, p: Tensor, tail: int) -> Tensor:
    """Do as `_order`."""
    ordered = (p if before is None else torch.cat([before, p], 2)).sort(2).values
    if ordered.shape[2] <= 2 * tail:
        return ordered
    return torch.cat([ordered[..., :tail], ordered[..., -tail:]], 2)


def figures(
    masks: MaskKind,
    sums: Mapping[str, Array],
    samples: Any,  # noqa: ANN401  numbers, or arrays of them
    blocks: Any,  # noqa: ANN401  likewise
) -> dict[str, Array]:
    """Turn sums [C, ...] over so many samples and whole blocks into figures of `Summary`.

    A stream sends all but the variance: what is added here, `streaming.Sample` needs, too.

    The numbers of samples and blocks may be arrays [...], as for the first sample, the first two
    and so on. The variance is NaN where there are too few, and the standard error NaN or infinite.
    """
    mean = sums["first"] + sums["sum"] / samples
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = _variance(sums["squares"], sums["sum"], samples)
        between = _variance(sums["block_squares"], sums["blocks"], blocks)
        error = np.sqrt(_mean_variance(masks, samples, variance, between))
    predictive, expected = entropy(mean), sums["entropy"] / samples
    return {
        "mean": mean,
        "variance": variance,
        "standard_error": error,
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": np.maximum(predictive - expected, 0),
    }


def _variance(squares: Array, total: Array, count: Any) -> Array:  # noqa: ANN401  as of `figures`
    """Variance with n-1 from sums of n numbers and of their squares."""
    variance: Array = np.maximum(squares - total * total / count, 0) / (count - np.int64(1))
    return variance


def _mean_variance(masks: MaskKind, samples: Any, variance: Array, between: Array) -> Array:  # noqa: ANN401
    """Estimate the variance of the mean over T samples, without bias for any function of the masks.

    Independent masks: variance / T. Stratified masks: whole blocks are independent of each other,
    and the samples within a block are exchangeable. With V the variance of a sample and W that of
    the sum of a block of n = 10 (`between`), any two samples of a block have covariance
    (W - nV) / (n(n-1)), so the sum of the last m samples, a part of a block, has the variance
    (m(n-m) V + m(m-1) W / n) / (n-1). V is estimated by variance (T-1)/T plus what is asked for,
    because the samples' distances are taken from their own mean.
    """
    estimate: Array
    if masks == "independent":
        estimate = variance / samples
        return estimate
    blocks, rest = samples // BLOCK, samples % BLOCK
    of_blocks = blocks + rest * (rest - 1) / (BLOCK * (BLOCK - 1))
    of_rest = rest * (BLOCK - rest) / (BLOCK - 1)
    known = of_blocks * between + of_rest * variance * (samples - 1) / samples
    estimate = known / (samples**2 - of_rest)
    return estimate


def entropy(p: Array) -> Array:
    """Compute the entropy of probabilities [C, ...], in nats."""
    found: Array = -(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))).sum(0)
    return found


def _votes(p: Array) -> Array:
    """Count how many samples find each class the most probable: [C, B, t] to [C, B]."""
    first = (p == p.max(0)).astype(np.float32)
    votes: Array = (first @ np.ones(p.shape[2], np.float32)).astype(np.float64)
    if votes.sum() != p[0].size:  # a tie: the first of the classes has the vote
        votes = (p.argmax(0) == np.arange(len(p))[:, None, None]).sum(2)
    return votes
