"""Which masks does Monte Carlo dropout need, and does its standard error say how far off it is?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.run import Run
from dropserve.models.defaults import MaskKind
from dropserve.models.montecarlo import Sampler, summarize

SIZES = (10, 20, 50, 100, 200, 500)
AT = 100
"""The T of tables."""
VALUES: dict[str, Any] = {
    "images_sampled": 200, "repeats": 100, "reference": 10_000, "T": AT, "level": 0.95,
    "least": 0.1, "most": 0.9,
}  # fmt: skip


def measure(run: Run) -> Figures:
    """Compare the means of T samples of many seeds with that of a reference's, T by T."""
    values = run.setting.values
    kind, alone = values["masks"], values["seeds"] == "an image"
    sizes = [10, 20, 100] if run.quick else list(values["samples"])
    repeats, reference_size, images = (
        (4, 200, 20)
        if run.quick
        else (VALUES[n] for n in ("repeats", "reference", "images_sampled"))
    )
    module = run.train()
    x, labels = run.normalize(run.test.images[:images]), run.test.labels[:images]
    sampler = Sampler(module, x[:1])
    reference = sampler.summarize(x, reference_size, 2**40 + run.seed)
    known = _given(reference.standard_error).square()  # variance of the reference's mean
    # Samples of stratified masks depend on each other: see `Summary.variance`.
    single = _given(reference.variance) * (reference_size - 1) / reference_size + known
    first = 10**6 * (run.seed + 1)
    errors: dict[int, list[Tensor]] = {size: [] for size in sizes}
    covered: dict[int, list[Tensor]] = {size: [] for size in sizes}
    for repeat in range(repeats):
        start = first + repeat * images
        seeds: int | Sequence[int] = range(start, start + images) if alone else start
        drawn = sampler.sample(x, sizes[-1], seeds, kind)
        for size in sizes:
            error, inside = _one(drawn[:size], kind, reference.mean, known)
            errors[size].append(error)
            covered[size] += [] if inside is None else [inside]
    row, top = torch.arange(images), reference.mean.argmax(1)
    found = {size: torch.stack(rows) for size, rows in errors.items()}  # [repeats, B, C]
    squares = [float((e.square() - known).mean().clamp_min(1e-12)) for e in found.values()]
    # The mean over images of the probability of the label: what one batch says of the accuracy.
    # It has no bias, and a deviation over seeds needs no reference.
    batches = [float(e[:, row, labels].mean(1).std()) for e in found.values()]
    middle = (reference.mean > VALUES["least"]) & (reference.mean < VALUES["most"])
    insides = [torch.stack(rows).double() if rows else None for rows in covered.values()]
    at = sizes.index(AT)
    lists: dict[str, list[float | None]] = {
        "rmses": [square**0.5 for square in squares],
        "worths": [float(single.mean()) / square for square in squares],
        "batch_errors": [*batches],
        "coverages": [None if i is None else float(i[:, row, top].mean()) for i in insides],
        "middle_coverages": [
            None if i is None or not middle.any() else float(i[:, middle].mean()) for i in insides
        ],
        "all_coverages": [None if i is None else float(i.mean()) for i in insides],
    }
    scalars = {"rmses": "rmse", "worths": "worth", "batch_errors": "batch_error",
               "coverages": "coverage", "middle_coverages": "middle_coverage",
               "all_coverages": "all_coverage"}  # fmt: skip
    return {
        "sizes": [float(size) for size in sizes],
        **lists,
        **{scalar: lists[name][at] for name, scalar in scalars.items()},
    }


def _one(
    drawn: Tensor, kind: MaskKind, mean: Tensor, known: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the error [B, C] of one mean, and whether the interval around it has the reference.

    The reference is off too, by a variance that is known: the interval is as much wider.
    """
    from scipy.stats import t as student

    found = summarize(drawn, kind)
    error = found.mean - mean
    if found.degrees_of_freedom is None or found.standard_error is None:
        return error, None
    width = float(student.ppf((1 + VALUES["level"]) / 2, found.degrees_of_freedom))
    return error, error.abs() <= width * (found.standard_error.square() + known).sqrt()


def _given(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("too few samples")
    return value


def _setting(
    label: str, masks: MaskKind, seeds: str = "a batch", rates: Sequence[float] = (0.2, 0.5)
) -> Setting:
    sizes = SIZES if seeds == "a batch" else SIZES[: SIZES.index(AT) + 1]
    values = {**VALUES, "masks": masks, "seeds": seeds, "samples": sizes}
    return Setting(label, {"dropout": tuple(rates)}, {}, values)


SHARED = ["independent", "stratified"]

EXPERIMENT = Experiment(
    question="Which masks does Monte Carlo dropout need, and is its standard error right?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units, rates .2 and .5; the means of T thinned "
            "networks over 200 test images, 100 times with other seeds, against the mean of 10,000 "
            "stratified masks, whose own variance is taken off. Masks are shared by all images, or "
            "each image has a seed of its own. The "
            "mean over the images is of the probability of the label. Tables are of T = 100."
        ),
        "10,000 images of Fashion-MNIST, a tenth of them for validation.",
        "AdamW for 30 epochs, learning rate .001 with a half cosine.",
    ),
    settings=[
        _setting("independent", "independent"),
        _setting("stratified", "stratified"),
        _setting("independent, a seed an image", "independent", "an image"),
        _setting("stratified, a seed an image", "stratified", "an image"),
        _setting("stratified, .5 and .5", "stratified", rates=(0.5, 0.5)),
    ],
    measure=measure,
    measures={
        "sizes": Measure("T", 0),
        "rmse": Measure("error of the mean, points (root mean square)", 3, percent=True),
        "rmses": Measure("root mean square error, points", 3, percent=True),
        "worth": Measure("independent samples of the same error", 0),
        "worths": Measure("independent samples of the same error", 0),
        "batch_error": Measure("deviation of the mean over 200 images, points", 3, percent=True),
        "batch_errors": Measure("standard deviation, points", 3, percent=True),
        "coverage": Measure("coverage of 95% intervals: most probable class, %", 1, percent=True),
        "coverages": Measure("coverage, most probable class, %", 1, percent=True),
        "middle_coverage": Measure("coverage, means of .1 to .9, %", 1, percent=True),
        "middle_coverages": Measure("coverage, means of .1 to .9, %", 1, percent=True),
        "all_coverage": Measure("coverage, all classes, %", 1, percent=True),
        "all_coverages": Measure("coverage, all classes, %", 1, percent=True),
    },
    tables=[
        Table(["rmse", "worth", "batch_error", "coverage", "middle_coverage", "all_coverage"]),
        Table(
            ["rmse", "batch_error", "middle_coverage"],
            {
                "stratified - independent": "stratified - independent",
                "independent: an image - shared": "independent, a seed an image - independent",
                "stratified: an image - shared": "stratified, a seed an image - stratified",
            },
        ),
    ],
    panels=[
        Panel("Error of one image's mean", "rmses", "sizes", x_title="T", log="xy"),
        Panel("Deviation of the mean over 200 images", "batch_errors", "sizes",
              x_title="T", log="xy"),
        Panel("What T samples are worth", "worths", "sizes", x_title="T", log="xy"),
        Panel("Coverage of 95% intervals", ["coverages", "middle_coverages", "all_coverages"],
              "sizes", rows=SHARED, x_title="T", log="x"),
    ],
    answer=(
        "Stratified ones: the error of the mean over 100 of them is that of {worth[stratified]} "
        "independent masks at rates .2 and .5 and of {worth[stratified, .5 and .5]} at .5 and "
        ".5; a seed for each image changes nothing for one image ({rmse[stratified, a seed an "
        "image - stratified]} points), but halves the error of a mean over 200 images "
        "({batch_error[stratified]} to {batch_error[stratified, a seed an image]} points), "
        "because shared masks err alike on all of them. The standard error is right for means "
        "from .1 to .9, whose 95% intervals cover {middle_coverage[stratified]}% (independent "
        "masks: {middle_coverage[independent]}%), and too small near 0 and 1, where samples are "
        "skewed: the intervals of the most probable class cover {coverage[stratified]}%, those "
        "of all classes {all_coverage[stratified]}%, with either kind of mask."
    ),
    answered="e11b2715cd6c",
)  # fmt: skip
