"""Is the uncertainty worth anything? Calibration, unknown images, referral and shifted images."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dropserve.lab.experiment import Experiment, Figures, Measure, Panel, Setting, Table
from dropserve.lab.results import Array
from dropserve.lab.run import Run
from dropserve.models.evaluation import score
from dropserve.models.montecarlo import Sampler

VALUES: dict[str, Any] = {"T": 100, "bins": 10, "accepted": 0.95, "shifted_images": 2000}
COVERAGES = tuple(1 - 0.05 * i for i in range(11))
ANGLES, NOISES = tuple(range(0, 181, 15)), tuple(range(0, 129, 16))
SETS = {"mnist": "MNIST", "noise": "noise"}
PLAIN = {
    "maximum": "maximum probability",
    "entropy": "entropy",
    "energy": "energy",
}
MONTE_CARLO = {
    "mc_maximum": "Monte Carlo, maximum probability",
    "mc_entropy": "Monte Carlo, entropy",
    "mc_information": "Monte Carlo, mutual information",
}
SCORES = PLAIN | MONTE_CARLO
"""Higher where the network is less certain."""
LEAST = 30
"""Images that a bin needs to have an accuracy."""
_BATCH = 500


@dataclass(frozen=True)
class _Answers:
    """Probabilities [N, C] of eval mode, of Monte Carlo if there is dropout, and `SCORES` [N]."""

    plain: Tensor
    mean: Tensor | None
    scores: dict[str, Array]


def measure(run: Run) -> Figures:
    """Train, then ask for the uncertainty of known, unknown and shifted images."""
    module, test = run.train(), run.test
    samples, shifted = (10, 100) if run.quick else (VALUES["T"], VALUES["shifted_images"])
    noisy = any(run.setting.network["dropout"])
    sampler = Sampler(module, run.normalize(test.images[:1])) if noisy else None

    def ask(images: Tensor) -> _Answers:
        return _ask(run, sampler, images, samples)

    known = ask(test.images)
    figures: Figures = _calibration(known.plain, test.labels, "")
    if known.mean is not None:
        figures |= _calibration(known.mean, test.labels, "mc_")
    random = torch.randint(0, 256, test.images.shape, dtype=torch.uint8, generator=run.generator(1))
    for name, images in {"mnist": run.mnist(), "noise": random}.items():
        unknown = ask(images).scores
        for which, inside in known.scores.items():
            found = _separation(inside, unknown[which])
            figures |= {f"{figure}_{name}_{which}": value for figure, value in found.items()}
    figures |= _referral(known, test.labels)
    images, labels = test.images[:shifted], test.labels[:shifted]
    return {
        **figures,
        "angles": [float(angle) for angle in ANGLES],
        "deviations": [float(deviation) for deviation in NOISES],
        **_shifts("rotated", [_rotated(images, angle) for angle in ANGLES], labels, ask),
        **_shifts("noisy", _with_noise(run, images), labels, ask),
    }


def _ask(run: Run, sampler: Sampler | None, images: Tensor, samples: int) -> _Answers:
    module = run.module
    if module is None:
        raise ValueError("train a network first")
    batches = [run.normalize(batch) for batch in torch.split(images, _BATCH)]
    with torch.no_grad():
        logits = torch.cat([module(x) for x in batches]).double()
    plain = logits.softmax(-1)
    scores = {
        "maximum": _others(plain),
        "entropy": torch.special.entr(plain).sum(-1),
        "energy": -logits.logsumexp(-1),
    }
    if sampler is None:
        return _Answers(plain, None, {name: value.numpy() for name, value in scores.items()})
    found = [sampler.summarize(x, samples, run.seed) for x in batches]
    mean = torch.cat([one.mean for one in found])
    scores["mc_maximum"] = _others(mean)
    scores["mc_entropy"] = torch.cat([one.predictive_entropy for one in found])
    scores["mc_information"] = torch.cat([one.mutual_information for one in found])
    return _Answers(plain, mean, {name: value.numpy() for name, value in scores.items()})


def _others(p: Tensor) -> Tensor:
    """Return 1 - the maximum of p [N, C], to all digits where that is nearly 1."""
    return p.sort(-1).values[:, :-1].sum(-1)


def _calibration(p: Tensor, labels: Tensor, prefix: str) -> Figures:
    """Score probabilities, and compare confidence and accuracy in bins of equal width."""
    confidence, right = p.max(-1).values, (p.argmax(-1) == labels).double()
    bins: int = VALUES["bins"]
    places = (confidence * bins).long().clamp_max(bins - 1)
    centres = [(i + 0.5) / bins for i in range(bins)]
    members = [places == i for i in range(bins)]
    confidences = [float(confidence[m].mean()) if m.sum() >= LEAST else None for m in members]
    reliability = [float(right[m].mean()) if m.sum() >= LEAST else None for m in members]
    gaps = [
        None if a is None or c is None else a - c
        for a, c in zip(reliability, confidences, strict=True)
    ]
    found = score(p, labels) | {"confidence": float(confidence.mean())}
    lists = {"confidences": confidences, "reliability": reliability, "calibration": gaps}
    return {"bins": centres} | {f"{prefix}{n}": v for n, v in {**found, **lists}.items()}


def _separation(inside: Array, outside: Array) -> dict[str, float]:
    """Tell unknown images, which are positive, from known ones by a score.

    `fpr95`: share of unknown ones that are accepted by the threshold that accepts 95% of known
    ones, as Liu et al., "Energy-based Out-of-distribution Detection" (NeurIPS 2020) define it.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    unknown = np.repeat([0, 1], [len(inside), len(outside)])
    scores = np.concatenate([inside, outside])
    threshold = np.quantile(inside, VALUES["accepted"])
    return {
        "auroc": float(roc_auc_score(unknown, scores)),
        "aupr": float(average_precision_score(unknown, scores)),
        "fpr95": float((outside <= threshold).mean()),
    }


def _referral(known: _Answers, labels: Tensor) -> Figures:
    """Measure the answers that are kept when the least certain go to a person.

    `aurc`: the mean error over all coverages (Geifman and El-Yaniv, NIPS 2017); `auroc_errors`: how
    well a score tells wrong answers from right ones.
    """
    figures: Figures = {"coverages": list(COVERAGES)}
    for which, scores in known.scores.items():
        p = known.mean if which in MONTE_CARLO and known.mean is not None else known.plain
        right = (p.argmax(-1) == labels).double().numpy()
        kept = np.cumsum(right[np.argsort(scores, kind="stable")]) / np.arange(1, len(right) + 1)
        places = [round(coverage * len(right)) - 1 for coverage in COVERAGES]
        figures |= {
            f"kept_{which}": [float(kept[place]) for place in places],
            f"half_{which}": float(kept[places[-1]]),
            f"aurc_{which}": float(1 - kept.mean()),
            f"auroc_errors_{which}": _separation(scores[right > 0], scores[right == 0])["auroc"],
        }
    return figures


def _shifts(
    name: str, shifted: list[Tensor], labels: Tensor, ask: Callable[[Tensor], _Answers]
) -> Figures:
    """Ask about images that are shifted more and more: lists, an element a strength."""
    figures: Figures = {}
    for images in shifted:
        answers = ask(images)
        found = {n: float(values.mean()) for n, values in answers.scores.items()}
        for prefix, p in (("", answers.plain), ("mc_", answers.mean)):
            if p is not None:
                scored = score(p, labels)
                found |= {f"{prefix}{n}": scored[n] for n in ("accuracy", "ece")}
        for figure, value in found.items():
            figures.setdefault(f"{name}_{figure}", []).append(value)
    return figures


def _rotated(images: Tensor, degrees: int) -> Tensor:
    """Turn images uint8 [N, 1, H, W] about their centres, with black corners."""
    if degrees == 0:
        return images
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    cos, sin = float(angle.cos()), float(angle.sin())
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().clamp(0, 255).byte()


def _with_noise(run: Run, images: Tensor) -> list[Tensor]:
    """Add normal noise to images, at each standard deviation the same but for its scale."""
    noise = torch.randn(images.shape, generator=run.generator(2))
    return [(images + std * noise).round().clamp(0, 255).byte() for std in NOISES]


def _measures() -> dict[str, Measure]:
    found = {
        "confidence": Measure("mean confidence, %", 2, percent=True),
        "mc_accuracy": Measure("Monte Carlo accuracy, %", 2, percent=True),
        "mc_nll": Measure("Monte Carlo NLL, nats", 3),
        "mc_ece": Measure("Monte Carlo ECE, %", 2, percent=True),
        "mc_confidence": Measure("Monte Carlo mean confidence, %", 2, percent=True),
        "calibration": Measure("eval mode, points", 1, percent=True),
        "mc_calibration": Measure("Monte Carlo, points", 1, percent=True),
        "bins": Measure("confidence", 2),
        "coverages": Measure("share of images that are answered", 2),
        "angles": Measure("angle", 0),
        "deviations": Measure("standard deviation of the noise", 0),
    }
    for which, title in SCORES.items():
        for (name, images), figure in product(SETS.items(), ("AUROC", "AUPR", "FPR95")):
            key = f"{figure.lower()}_{name}_{which}"
            found[key] = Measure(f"{figure}, {images}: {title}, %", 1, percent=True)
        found[f"auroc_errors_{which}"] = Measure(f"AUROC, errors: {title}, %", 1, percent=True)
        found[f"aurc_{which}"] = Measure(f"mean error over coverages: {title}, %", 2, percent=True)
        found[f"half_{which}"] = Measure(f"accuracy of the surer half: {title}, %", 2, percent=True)
        found[f"kept_{which}"] = Measure(f"{title}, %", 1, percent=True)
    for shift in ("rotated", "noisy"):
        for prefix, mode in (("", "eval mode"), ("mc_", "Monte Carlo")):
            found[f"{shift}_{prefix}accuracy"] = Measure(f"{mode} accuracy, %", 1, percent=True)
            found[f"{shift}_{prefix}ece"] = Measure(f"{mode}, %", 1, percent=True)
            found[f"{shift}_{prefix}entropy"] = Measure(f"{mode} entropy, nats", 2)
        found[f"{shift}_mc_information"] = Measure("mutual information, nats", 2)
    return found


def _columns(figure: str) -> list[str]:
    return [f"{figure}_{which}" for which in SCORES]


LOW, HIGH = "dropout .2 and .5", "dropout .5 and .5"

EXPERIMENT = Experiment(
    question="Is the uncertainty of Monte Carlo dropout worth anything?",
    setup=(
        (
            "An MLP of two hidden layers of 128 units, without dropout and with rates .2 and .5 or "
            ".5 and .5; eval mode against the means of 100 thinned networks (stratified masks)."
        ),
        (
            "10,000 images of Fashion-MNIST, a tenth of them for validation; all 10,000 test "
            "images, against as many digits of MNIST and images of uniform noise (AUROC, AUPR, and "
            "FPR95: the share of them that passes where 95% of clothes do), with their errors, and "
            "2,000 of them turned or with normal noise added."
        ),
        "AdamW for 30 epochs, learning rate .001 with a half cosine.",
    ),
    settings=[
        Setting("no dropout", {"dropout": (0.0,)}, {}, VALUES),
        Setting(LOW, {"dropout": (0.2, 0.5)}, {}, VALUES),
        Setting(HIGH, {"dropout": (0.5, 0.5)}, {}, VALUES),
    ],
    measure=measure,
    measures=_measures(),
    seeds=10,
    tables=[
        Table(["accuracy", "confidence", "nll", "ece", "mc_accuracy", "mc_confidence", "mc_nll",
               "mc_ece"]),
        Table(_columns("auroc_mnist")),
        Table(_columns("aupr_mnist")),
        Table(_columns("fpr95_mnist")),
        Table(_columns("auroc_noise")),
        Table(_columns("auroc_errors")),
        Table([f"{figure}_{which}" for figure in ("half", "aurc")
               for which in ("maximum", "mc_maximum", "mc_information")]),
        Table(
            ["ece", "nll", "auroc_mnist_entropy", "auroc_mnist_energy", "auroc_noise_entropy",
             "auroc_errors_entropy", "aurc_entropy"],
            {f"{label} - none": f"{label} - no dropout" for label in (LOW, HIGH)},
        ),
    ],
    panels=[
        Panel("Below 0: overconfident", ["calibration", "mc_calibration"],
              "bins", x_title="confidence"),
        Panel("Accuracy of the most certain images",
              ["kept_maximum", "kept_mc_maximum", "kept_mc_information"], "coverages",
              rows=["no dropout", HIGH], x_title="share of images that are answered"),
        Panel("Images turned", ["rotated_entropy", "rotated_mc_entropy", "rotated_mc_information"],
              "angles", rows=["no dropout", HIGH], x_title="degrees"),
        Panel("Calibration under noise", ["noisy_ece", "noisy_mc_ece"], "deviations",
              x_title="standard deviation of the noise"),
    ],
    answer=(
        "For calibration and unknown objects, yes: with rates .2 and .5 the ECE is "
        "{mc_ece[dropout .2 and .5]}% (eval mode {ece[dropout .2 and .5]}%, no dropout {ece[no "
        "dropout]}%), and digits are told from clothes with an AUROC of "
        "{auroc_mnist_mc_information[dropout .2 and .5]}% by mutual information, against "
        "{auroc_mnist_entropy[dropout .2 and .5]}% by entropy and {auroc_mnist_energy[dropout "
        ".2 and .5]}% by energy in eval mode, which need one pass; noise is told at least as "
        "well without dropout (entropy {auroc_noise_entropy[no dropout]}%; mutual information "
        "{auroc_noise_mc_information[dropout .2 and .5]}%). For choosing what a person should "
        "see, no: the surer half is right in {half_mc_maximum[dropout .2 and .5]}% of the "
        "images by Monte Carlo and in {half_maximum[dropout .2 and .5]}% by the maximum "
        "probability of eval mode, and mutual information finds errors worse (AUROC "
        "{auroc_errors_mc_information[dropout .2 and .5]}% in place of "
        "{auroc_errors_maximum[dropout .2 and .5]}%)."
    ),
    answered="e45060a2856f",
)  # fmt: skip
