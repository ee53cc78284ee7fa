"""How good a classifier's probabilities are: accuracy, NLL, Brier score and calibration."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from dropserve.models.data import Split
from dropserve.models.defaults import DEFAULT_SAMPLES
from dropserve.models.errors import NoDropout
from dropserve.models.montecarlo import Sampler
from dropserve.models.regularizers import with_moment_matching


def score(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Score probabilities [N, C] against labels [N]; lower is better but for the accuracy.

    `nll`: mean negative log-likelihood in nats. `brier`: mean squared distance to the one-hot
    label, 0 to 2 (Brier, 1950). `ece`: expected calibration error over 15 bins (Guo et al., ICML
    2017, equation 3).
    """
    p = probabilities.double().clamp_min(torch.finfo(torch.float32).tiny)
    one_hot = F.one_hot(labels, p.shape[1])
    return {
        "accuracy": float((p.argmax(1) == labels).double().mean()),
        "nll": float(F.nll_loss(p.log(), labels)),
        "brier": float((p - one_hot).square().sum(1).mean()),
        "ece": float(multiclass_calibration_error(p, labels, p.shape[1], n_bins=15)),
    }


def evaluate(
    module: nn.Module,
    data: Split,
    normalize: Callable[[Tensor], Tensor],
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    *,
    method: Literal["dropout", "moment-matching"] = "dropout",
    confusion: bool = False,
) -> dict[str, Any]:
    """Score a module in eval mode, and the mean of its Monte Carlo samples where it has dropout.

    `samples` is T; 0 leaves Monte Carlo dropout out. Moment matching draws what DropConnect layers
    give instead of their weights (`with_moment_matching`; ConfigError if there are none).
    `progress` is called with (images done, images in all). Returns `{"images": N, "eval": {...},
    "dropout": {..., "samples": T}}`, ready for JSON, and where asked for `"confusion"`, of eval
    mode: a row a label, a column a predicted class.
    """
    module.eval()
    sampler = None
    if samples:
        with suppress(NoDropout):
            sampled = with_moment_matching(module) if method == "moment-matching" else module
            sampler = Sampler(sampled, normalize(data.take(torch.arange(1)).images))
    plain, dropout = [], []
    done = 0
    for batch in data.batches(500):
        x = normalize(batch.images)
        with torch.inference_mode():
            plain.append(module(x).softmax(-1))
        if sampler is not None:
            dropout.append(sampler.sample(x, samples, seed).double().mean(0))
        done += len(batch)
        progress(done, len(data))
    p = torch.cat(plain)
    figures: dict[str, Any] = {"images": len(data), "eval": score(p, data.labels)}
    if dropout:
        mean = score(torch.cat(dropout), data.labels)
        figures["dropout"] = {**mean, "samples": samples, "seed": seed}
        if method != "dropout":
            figures["dropout"]["method"] = method
    if confusion:
        figures["confusion"] = multiclass_confusion_matrix(p, data.labels, p.shape[1]).tolist()
    return figures
