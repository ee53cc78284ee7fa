"""The standard error that is reported, and the true one, of a tiny network.

Two layers of six units drop: 4,096 thinned networks, whose answers are listed once. So the mean
over all masks is known exactly, and samples of thousands of seeds are looked up in the list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import t as student

from dropserve.models.defaults import MaskKind
from dropserve.models.montecarlo import summarize
from dropserve.models.montecarlo.masks import draw
from dropserve.models.montecarlo.statistics import degrees_of_freedom

RATES = (0.1, 0.2, 0.25, 0.33, 0.5, 0.7)
SIZES = (20, 25, 37, 50, 99, 100, 500)
SEEDS = 2000
_UNITS = 6
_IMAGES, _CLASSES = 3, 3

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Exact:
    """What all thinned networks say.

    Attributes:
        answers: probabilities [networks, B, C]; bit i of a network's number keeps unit i.
        mean: [B, C], weighted by how probable each network is.
        variance: [B, C], likewise.
        mutual_information: [B].
    """

    answers: Array
    mean: Array
    variance: Array
    mutual_information: Array


def enumerate_networks(p: float) -> Exact:
    """List the answers of all thinned networks at a rate p, in float64."""
    rng = np.random.default_rng(1)
    width = _UNITS
    first, second, last = (
        rng.normal(size=shape) for shape in ((width, 4), (width, width), (_CLASSES, width))
    )
    x = rng.normal(size=(_IMAGES, 4))
    bits = np.arange(2 ** (2 * width))[:, None] >> np.arange(2 * width) & 1  # [networks, units]
    keep = bits.reshape(-1, 2, 1, width) / (1 - p)
    h = np.maximum(x @ first.T, 0) * keep[:, 0]  # [networks, B, units]
    h = np.maximum(h @ second.T, 0) * keep[:, 1]
    logits = np.exp(h @ last.T)
    answers = logits / logits.sum(-1, keepdims=True)
    weights = np.where(bits, 1 - p, p).prod(1)
    mean = np.tensordot(weights, answers, 1)
    variance = np.tensordot(weights, (answers - mean) ** 2, 1)
    expected = np.tensordot(weights, _entropy(answers), 1)
    return Exact(answers, mean, variance, _entropy(mean) - expected)


def sample(exact: Exact, p: float, masks: MaskKind, seeds: int, samples: int) -> Array:
    """Look up the first samples of many seeds: [T, seeds, B, C]."""
    place = 1 << np.arange(2 * _UNITS)
    found = np.empty((samples, seeds), np.int64)
    for seed in range(seeds):
        sites = [draw(masks, seed, site, _UNITS, p, range(samples)) for site in (0, 1)]
        found[:, seed] = np.concatenate(sites, 1) @ place
    return exact.answers[found]


def study(
    masks: MaskKind = "stratified",
    rates: Sequence[float] = RATES,
    sizes: Sequence[int] = SIZES,
    seeds: int = SEEDS,
) -> Iterator[dict[str, Any]]:
    """Measure each rate at each T; yields a row each.

    `true` is the root mean square, over seeds, images and classes, of the mean's error, `reported`
    that of the standard error; `covered` is the share of means within the 95% interval of Student's
    distribution, `covered_normal` within 1.96 standard errors. `variance/true` and `unbiased/true`
    are the variance, and what the documentation makes of it, over the exact one;
    `information_bias` is the mean error of the mutual information, in nats, and `predicted_bias`
    what the documentation says of it.
    """
    for p in rates:
        exact = enumerate_networks(p)
        drawn = sample(exact, p, masks, seeds, max(sizes))
        for size in sizes:
            rows = torch.from_numpy(drawn[:size].reshape(size, -1, _CLASSES))
            yield {"masks": masks, "p": p, "samples": size, **_row(rows, masks, exact)}


def _row(rows: torch.Tensor, masks: MaskKind, exact: Exact) -> dict[str, Any]:
    """Measure one T from the samples [T, seeds * B, C] of many seeds."""
    samples, found = len(rows), summarize(rows, masks)
    degrees = degrees_of_freedom(masks, samples)
    if found.variance is None or found.standard_error is None or degrees is None:
        raise ValueError("T must be at least 20")
    mean, variance, reported = (
        tensor.view(-1, _IMAGES, _CLASSES).numpy()
        for tensor in (found.mean, found.variance, found.standard_error)
    )
    error = mean - exact.mean
    true, estimate = (float(np.sqrt((x**2).mean())) for x in (error, reported))
    unbiased = variance * (samples - 1) / samples + reported**2
    information = found.mutual_information.view(-1, _IMAGES).numpy() - exact.mutual_information
    predicted = -(reported**2 / (2 * mean)).sum(-1)
    return {
        "true": true,
        "reported": estimate,
        "reported/true": estimate / true,
        "degrees_of_freedom": degrees,
        "covered": _covered(error, reported, float(student.ppf(0.975, degrees))),
        "covered_normal": _covered(error, reported, 1.96),
        "variance/true": float(variance.mean() / exact.variance.mean()),
        "unbiased/true": float(unbiased.mean() / exact.variance.mean()),
        "information_bias": float(information.mean()),
        "predicted_bias": float(predicted.mean()),
    }


def _covered(error: Array, reported: Array, width: float) -> float:
    return float((np.abs(error) <= width * reported).mean())


def _entropy(p: Array) -> Array:
    """Entropy of probabilities [..., C], in nats: [...]."""
    entropy: Array = -(p * np.log(p)).sum(-1)
    return entropy
