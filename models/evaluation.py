"""How good a classifier's probabilities are: accuracy, NLL, Brier score and calibration."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from dropserve.models.data import Split
from dropserve.models.errors import NoDropout
from dropserve.models.montecarlo import Sampler
from dropserve.models.training import Normalize

ECE_BINS = 15
_BATCH = 500


@dataclass(frozen=True)
class Scores:
    """Scores over N images; lower is better but for the accuracy.

    Attributes:
        accuracy: share of images whose most probable class is their label.
        nll: mean negative log-likelihood of the label, in nats.
        brier: mean squared distance to the one-hot label, 0 to 2 (Brier, 1950).
        ece: expected calibration error over 15 bins (Guo et al., ICML 2017, equation 3).
    """

    accuracy: float
    nll: float
    brier: float
    ece: float


def score(probabilities: Tensor, labels: Tensor) -> Scores:
    """Score probabilities [N, C] against labels [N]."""
    p = probabilities.double().clamp_min(torch.finfo(torch.float32).tiny)
    classes = p.shape[1]
    true = p.gather(1, labels.view(-1, 1)).squeeze(1)
    distance = (p - torch.nn.functional.one_hot(labels, classes)).square().sum(1)
    return Scores(
        accuracy=float(multiclass_accuracy(p, labels, classes, average="micro")),
        nll=float(-true.log().mean()),
        brier=float(distance.mean()),
        ece=float(multiclass_calibration_error(p, labels, classes, n_bins=ECE_BINS)),
    )


def _sampler(module: nn.Module, example: Tensor) -> Sampler | None:
    try:
        return Sampler(module, example)
    except NoDropout:
        return None


def evaluate(
    module: nn.Module,
    data: Split,
    normalize: Normalize,
    samples: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    *,
    confusion: bool = False,
) -> Mapping[str, Any]:
    """Score a module in eval mode, and its Monte Carlo mean where it has dropout.

    Args:
        module: maps normalised images to logits.
        data: images and labels.
        normalize: maps uint8 [B, C, H, W] to the module's input.
        samples: T; 0 leaves Monte Carlo dropout out.
        seed: of the masks.
        progress: called with (images done, images in all).
        confusion: count which classes are taken for which in eval mode.

    Returns:
        `{"images": N, "eval": {...}, "dropout": {..., "samples": T}}`, ready for JSON; and where it
        was asked for `"confusion"`: a row a class of the labels, a column a class of the answers.
    """
    module.eval()
    sampler = _sampler(module, normalize(data.images[:1])) if samples else None
    plain, dropout = [], []
    done = 0
    for batch in data.batches(_BATCH):
        x = normalize(batch.images)
        with torch.inference_mode():
            plain.append(module(x).softmax(-1))
        if sampler is not None:
            dropout.append(sampler.sample(x, samples, seed).double().mean(0))
        done += len(batch)
        progress(done, len(data))
    figures: dict[str, Any] = {
        "images": len(data),
        "eval": asdict(score(torch.cat(plain), data.labels)),
    }
    if sampler is not None:
        figures["dropout"] = {
            **asdict(score(torch.cat(dropout), data.labels)),
            "samples": samples,
            "seed": seed,
        }
    if confusion:
        p = torch.cat(plain)
        figures["confusion"] = multiclass_confusion_matrix(p, data.labels, p.shape[1]).tolist()
    return figures
