"""Monte Carlo dropout: many thinned networks at once, and what they say together.

Gal and Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep
Learning" (ICML 2016).
"""

from dropserve.models.montecarlo.masks import MASK_KINDS, MaskKind
from dropserve.models.montecarlo.precision import PRECISIONS, Precision
from dropserve.models.montecarlo.sampler import Sampler
from dropserve.models.montecarlo.sites import Site
from dropserve.models.montecarlo.statistics import Statistics, Summary, summarize
from dropserve.models.montecarlo.watching import Sample, watch

__all__ = [
    "MASK_KINDS",
    "PRECISIONS",
    "MaskKind",
    "Precision",
    "Sample",
    "Sampler",
    "Site",
    "Statistics",
    "Summary",
    "summarize",
    "watch",
]
