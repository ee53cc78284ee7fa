"""Monte Carlo dropout watched: one image, what is known after each sample, and its masks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dropserve.models.montecarlo.masks import BLOCK, MaskKind
from dropserve.models.montecarlo.sampler import Sampler
from dropserve.models.montecarlo.statistics import (
    Statistics,
    degrees_of_freedom,
    mean_variance,
    variance_of_sums,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """Thinned network number t, and what it and those before it say together of one image.

    All float32. Figures of the first t samples are those of `Summary`.

    Attributes:
        t: its number, from 1.
        probabilities: [C], of this network alone.
        mean: [C], of the first t.
        standard_error: [C], of the first t; None where it cannot be estimated.
        degrees_of_freedom: of the standard error; None likewise.
        predictive_entropy: of the first t, in nats.
        expected_entropy: of the first t, in nats.
        mutual_information: of the first t, in nats.
        kept: this network's mask at each site: a bit a unit, in the order of the site's template,
            the most significant bit of a byte first; 1 where the unit is kept.
    """

    t: int
    probabilities: Array
    mean: Array
    standard_error: Array | None
    degrees_of_freedom: int | None
    predictive_entropy: np.float32
    expected_entropy: np.float32
    mutual_information: np.float32
    kept: tuple[npt.NDArray[np.uint8], ...]


def watch(
    sampler: Sampler, x: Tensor, samples: int, seed: int, masks: MaskKind, statistics: Statistics
) -> Iterator[list[Sample]]:
    """Sample as `Sampler.summarize` does, to the bit, and tell of each sample.

    Samples are run in the same chunks, and told of ten at a time: other work can run in between.

    Args:
        sampler: of the module.
        x: one image [1, ...].
        samples: T.
        seed: of the masks.
        masks: their kind.
        statistics: made for these samples; takes them in.

    Yields:
        The next samples.
    """
    running = _Running(masks)
    done = 0
    for chunk in sampler.chunks(x, samples, seed, masks):
        statistics.add(chunk)
        count = chunk.shape[2]
        scales = sampler.scales(masks, seed, range(done, done + count), x.device)
        kept = [np.packbits((f != 0).flatten(1).cpu().numpy(), 1) for f in scales.factors]
        del scales  # 32 times as large, and it may be long before the next is asked for
        probabilities = np.ascontiguousarray(chunk[:, 0].cpu().numpy().T)
        for start in range(0, count, BLOCK):
            some = slice(start, start + BLOCK)
            yield running.add(probabilities[some], [bits[some] for bits in kept])
        done += count


class _Running:
    """Figures of the first sample, of the first two, the first three ...: those of `Statistics`.

    Args:
        masks: the samples' kind.
    """

    def __init__(self, masks: MaskKind) -> None:
        self._masks = masks
        self._count = 0
        self._sums: dict[str, Array] = {}

    def add(self, probabilities: Array, kept: list[npt.NDArray[np.uint8]]) -> list[Sample]:
        """Take in probabilities [t, C] and masks [t, ...]: a block of samples, or a last part."""
        p = probabilities.astype(np.float64)
        self._sums.setdefault("first", p[0])
        distance = p - self._sums["first"]
        n = np.arange(1, len(p) + 1)[:, None]
        whole = n == BLOCK  # the last of a block
        total = self._add("sum", distance.cumsum(0))
        in_blocks = self._add("blocks", np.where(whole, distance.sum(0), 0))
        block_squares = self._add("block_squares", np.where(whole, distance.sum(0) ** 2, 0))
        blocks = self._count // BLOCK + whole
        n += self._count
        mean = self._sums["first"] + total / n
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN where there are too few
            variance = variance_of_sums(self._add("squares", (distance**2).cumsum(0)), total, n)
            between = variance_of_sums(block_squares, in_blocks, blocks)
            error = mean_variance(self._masks, n, variance, between)
        predictive = _entropy(mean)
        expected = self._add("entropy", _entropy(p).cumsum(0)) / n[:, 0]
        figures = {
            "probabilities": probabilities,
            "mean": mean,
            "standard_error": np.sqrt(error),
            "predictive_entropy": predictive,
            "expected_entropy": expected,
            "mutual_information": np.maximum(predictive - expected, 0),
        }
        self._count += len(p)
        return [
            _sample(
                t,
                {name: values[i].astype(np.float32) for name, values in figures.items()},
                degrees_of_freedom(self._masks, t),
                [bits[i] for bits in kept],
            )
            for i, t in enumerate(n[:, 0].tolist())
        ]

    def _add(self, name: str, values: Array) -> Array:
        """Add running sums [t, ...] to what there was; remember the last."""
        values = self._sums.get(name, 0) + values
        self._sums[name] = values[-1]
        return values


def _sample(
    t: int, figures: dict[str, Any], degrees: int | None, kept: list[npt.NDArray[np.uint8]]
) -> Sample:
    if degrees is None:
        figures = {**figures, "standard_error": None}
    return Sample(t, **figures, degrees_of_freedom=degrees, kept=tuple(kept))


def _entropy(p: Array) -> Array:
    """Of probabilities [t, C], in nats: [t]."""
    entropy: Array = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(1)
    return entropy
