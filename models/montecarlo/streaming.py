"""Streams Monte Carlo dropout over one image: each sample, its masks, statistics so far."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dropserve.models.defaults import MaskKind
from dropserve.models.device import to_cpu
from dropserve.models.montecarlo.masks import BLOCK
from dropserve.models.montecarlo.sampler import Sampler
from dropserve.models.montecarlo.statistics import (
    Array,
    Statistics,
    degrees_of_freedom,
    entropy,
    figures,
)
from dropserve.models.regularizers import Bernoulli, Law


@dataclass(frozen=True)
class Sample:
    """Thinned network number t on one image, and statistics of the first t.

    All float32. Figures of the first t samples are those of `Summary`.

    Attributes:
        t: its number, from 1.
        probabilities: [C], of this network alone.
        mean: [C], of the first t, like all that follow.
        standard_error: [C]; None where it cannot be estimated, like its degrees of freedom.
        kept: this network's noise at each site, in the order of the site's template. Of a mask a
            bit a unit, the most significant of a byte first: 1 where the unit is kept. Of Gaussian
            noise a byte a unit: which 256th of the distribution it is from.
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


def stream_samples(
    sampler: Sampler, x: Tensor, samples: int, seed: int, masks: MaskKind, statistics: Statistics
) -> Iterator[list[Sample]]:
    """Sample one image [1, ...] as `Sampler.summarize` does, to the bit; yield ten at a time.

    Samples are run in the same chunks, and other work can run in between. `statistics`, made for
    these samples, takes them in. On a GPU it is to rounding: each chunk is copied to the CPU once.
    """
    done, sums = 0, dict[str, Array]()
    for chunk in sampler.chunks(x, samples, seed, masks):
        count = chunk.shape[2]
        scaled = sampler.scaled_masks(masks, seed, range(done, done + count), x.device)
        pairs = zip(sampler.sites, scaled.factors, strict=True)
        levels = [_levels(site.law, factor.flatten(1)) for site, factor in pairs]
        del scaled, pairs  # 32 times as large, and it may be long before the next is asked for
        chunk, *levels = to_cpu([chunk, *levels])
        statistics.add(chunk)
        kept = [_as_bytes(each.numpy()) for each in levels]
        p = chunk[:, 0].numpy()
        for start in range(0, count, BLOCK):
            some = slice(start, start + BLOCK)
            t = np.arange(done + start, done + min(start + BLOCK, count)) + 1
            sums = _running_sums(p[:, some].astype(np.float64), t, sums)
            found = {"probabilities": p[:, some], **figures(masks, sums, t, t // BLOCK)}
            del found["variance"]  # `Sample` has all others
            yield _samples(masks, t, found, [bits[some] for bits in kept])
        done += count


def _levels(law: Law, noise: Tensor) -> Tensor:
    """Turn the noise [t, units] of a site into bools, or bytes if it is Gaussian."""
    if isinstance(law, Bernoulli):
        return noise != 0
    share: Tensor = torch.special.ndtr((noise - law.mean) / law.std)
    return (share * 256).clamp_max(255).to(torch.uint8)


def _as_bytes(levels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Write what `_levels` gave as `Sample.kept` has it: [t, bytes]."""
    return np.packbits(levels, 1) if levels.dtype == np.bool_ else levels


def _running_sums(p: Array, t: Array, before: dict[str, Array]) -> dict[str, Array]:
    """Sum over the samples up to each of some, numbers `t`, the next block: [C, t]."""
    first = before.get("first", p[:, :1])
    distance = p - first
    by_block = np.where(t % BLOCK == 0, distance.sum(1, keepdims=True), 0)
    new = {
        "sum": distance.cumsum(1),
        "squares": (distance**2).cumsum(1),
        "blocks": by_block,
        "block_squares": by_block**2,
        "entropy": entropy(p).cumsum(),
    }
    sums = {name: before[name][..., -1:] + new[name] if before else new[name] for name in new}
    return {"first": first, **sums}


def _samples(
    masks: MaskKind, t: Array, found: dict[str, Array], kept: list[npt.NDArray[np.uint8]]
) -> list[Sample]:
    rows = {name: np.ascontiguousarray(v.T, np.float32) for name, v in found.items()}
    samples = []
    for i, number in enumerate(t.tolist()):
        row: dict[str, Any] = {name: values[i] for name, values in rows.items()}
        degrees = degrees_of_freedom(masks, number)
        if degrees is None:
            row["standard_error"] = None
        bits = tuple(each[i] for each in kept)
        samples.append(Sample(number, degrees_of_freedom=degrees, kept=bits, **row))
    return samples
