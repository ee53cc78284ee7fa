"""Monte Carlo dropout: many thinned networks at once, and what they say together.

Gal and Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep
Learning" (ICML 2016).
"""

from models.montecarlo.masks import MASK_KINDS, MaskKind
from models.montecarlo.precision import PRECISIONS, Precision
from models.montecarlo.sampler import Sampler
from models.montecarlo.sites import Site
from models.montecarlo.statistics import Statistics, Summary, summarize
from models.montecarlo.watching import Sample, watch

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
