"""What T thinned networks say together: mean, spread, and where the doubt comes from.

p_tc is the probability of class c under thinned network t. Natural logarithms; float64 throughout.
Predictive entropy = expected entropy (the data's own ambiguity) + mutual information (the model's
ignorance): Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning"
(2011), equation 2; for dropout, Gal, "Uncertainty in Deep Learning" (2016), section 3.3.

The entropies are plug-in estimates: predictive entropy and mutual information come out low by
about (1/2T) sum_c variance_c / mean_c, so never compare mutual information across different T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    p = probabilities.double()
    mean = p.mean(0)
    variance = p.var(0) if len(p) > 1 else None
    predictive = torch.special.entr(mean).sum(-1)
    expected = torch.special.entr(p).sum(-1).mean(0)
    votes = torch.zeros_like(mean).scatter_add_(1, p.argmax(-1).T, torch.ones_like(p[..., 0].T))
    ordered = p.sort(0).values
    return Summary(
        mean=mean,
        variance=variance,
        standard_error=_standard_error(p, variance, masks),
        predictive_entropy=predictive,
        expected_entropy=expected,
        mutual_information=(predictive - expected).clamp_min(0),
        variation_ratio=1 - votes.amax(-1) / len(p),
        lower=_quantile(ordered, (1 - level) / 2),
        upper=_quantile(ordered, (1 + level) / 2),
    )


def _standard_error(p: Tensor, variance: Tensor | None, masks: MaskKind) -> Tensor | None:
    """Estimate the standard error of the mean over T samples: [B, C].

    Independent masks: sqrt(variance / T). Stratified masks: samples of one block depend on each
    other and blocks do not, so the spread of the K block means says how far off their average is;
    that needs two blocks. A last, partial block counts with its own share of the mean and is taken
    for independent samples, which is usually too much and for some functions a little too little
    (Owen, 1997: a Latin hypercube of n points has at most n/(n-1) times their variance).
    """
    total = len(p)
    if variance is None:
        return None
    if masks == "independent":
        return (variance / total).sqrt()
    blocks, rest = divmod(total, BLOCK)
    if blocks < 2:
        return None
    means = p[: blocks * BLOCK].view(blocks, BLOCK, *p.shape[1:]).mean(1)
    whole = (1 - rest / total) ** 2 * means.var(0) / blocks
    return (whole + rest * variance / total**2).sqrt()


def _quantile(ordered: Tensor, level: float) -> Tensor:
    """Interpolate linearly between order statistics [T, ...], as `numpy.quantile` does."""
    position = level * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
