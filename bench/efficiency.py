"""What a sample is worth: the error of T samples against very many, for both kinds of masks.

The reference has independent masks of a seed of its own. The errors are root mean squares over
images, classes and runs; a run is T samples in a row from whole blocks, which are to another T in a
row what another seed would be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench.networks import Network
from bench.progress import follow
from dropserve.models.montecarlo import MASK_KINDS, Sampler, Summary, summarize
from dropserve.models.montecarlo.scaled_masks import CHUNK

SIZES = (10, 20, 50, 100, 200, 500, 1000)
_REFERENCE_SEED = 2**40
_RUNS = 10
"""Most runs of one T taken from one seed."""


@dataclass(frozen=True)
class Reference:
    """What very many samples say: mean and variance [B, C], mutual information [B]."""

    mean: Tensor
    variance: Tensor
    mutual_information: Tensor


@dataclass
class Errors:
    """Mean squares, one of each run."""

    mean: list[float] = field(default_factory=list)
    variance: list[float] = field(default_factory=list)
    mutual_information: list[float] = field(default_factory=list)
    reported: list[float] = field(default_factory=list)  # standard errors of the mean

    def add(self, got: Summary, reference: Reference) -> None:
        """Take in a run."""
        self.mean.append(_mean_square(got.mean - reference.mean))
        if got.variance is not None:
            self.variance.append(_mean_square(got.variance - reference.variance))
        gap = got.mutual_information - reference.mutual_information
        self.mutual_information.append(_mean_square(gap))
        if got.standard_error is not None:
            self.reported.append(_mean_square(got.standard_error))

    def to_json(self) -> dict[str, Any]:
        """Return root mean squares; the reported standard error as a multiple of the true one."""
        rmse = {name: _root(values) for name, values in vars(self).items() if name != "reported"}
        ratio = _root(self.reported) / rmse["mean"] if self.reported else None
        return {"runs": len(self.mean), "rmse": rmse, "reported/true": ratio}


def study(
    network: Network, module: nn.Module, x: Tensor, passes: int, seeds: int, sizes: Sequence[int]
) -> dict[str, Any]:
    """Measure the errors of one network.

    Args:
        network: which.
        module: it, in eval mode.
        x: images [B, ...].
        passes: of the reference.
        seeds: of each kind of masks.
        sizes: T, multiples of ten.
    """
    sampler = Sampler(module, x)
    reference = refer(sampler, x, passes, network.title)
    found = {(kind, size): Errors() for kind in MASK_KINDS for size in sizes}
    for seed in follow(range(seeds), f"{network.title}, errors"):
        for kind in MASK_KINDS:
            p = sampler.sample(x, max(sizes), seed, kind)
            for size in sizes:
                for start in range(0, min(len(p), _RUNS * size) - size + 1, size):
                    found[kind, size].add(summarize(p[start : start + size], kind), reference)
    return {
        "network": network.name,
        "title": network.title,
        "images": len(x),
        "passes": passes,
        "seeds": seeds,
        "reference_error": sqrt(float(reference.variance.mean()) / passes),
        "rows": [
            {"masks": kind, "samples": size, **errors.to_json()}
            for (kind, size), errors in found.items()
        ],
    }


def refer(sampler: Sampler, x: Tensor, passes: int, title: str) -> Reference:
    """Run very many samples; sums alone are kept."""
    chunks = sampler.chunks(x, passes, _REFERENCE_SEED, "independent")
    total, squares, entropy = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    steps = -(-passes // CHUNK)
    for p in follow(chunks, f"{title}, {passes:,} passes", total=steps):
        total = total + p.sum(2, dtype=torch.float64)  # [C, B]
        squares = squares + p.double().square_().sum(2)
        entropy = entropy + torch.special.entr(p).sum((0, 2), dtype=torch.float64)  # [B]
    mean = total / passes
    variance = (squares / passes - mean**2) * (passes / (passes - 1))
    mutual_information = torch.special.entr(mean).sum(0) - entropy / passes
    return Reference(mean.T, variance.T, mutual_information)


def find(study: Mapping[str, Any], masks: str, samples: int) -> Mapping[str, Any]:
    """Return the row of a study."""
    rows: list[Mapping[str, Any]] = study["rows"]
    return next(r for r in rows if (r["masks"], r["samples"]) == (masks, samples))


def _mean_square(x: Tensor) -> float:
    return float(x.double().square().mean())


def _root(squares: Sequence[float]) -> float:
    return sqrt(sum(squares) / len(squares))


def table(studies: Sequence[Mapping[str, Any]]) -> Table:
    """Show what `study` measured."""
    names = ("mean", "variance", "mutual_information")
    shown = Table("RMSE", "masks", "T", *names, "reported/true")
    for found in studies:
        for r in found["rows"]:
            ratio = "" if r["reported/true"] is None else f"{r['reported/true']:.3f}"
            figures = [f"{r['rmse'][name]:.5f}" for name in names]
            shown.add_row(found["network"], r["masks"], str(r["samples"]), *figures, ratio)
    return shown
