"""Monte Carlo dropout: samples of thinned networks, and their statistics.

Gal and Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep
Learning" (ICML 2016).
"""

from dropserve.models.defaults import Precision
from dropserve.models.montecarlo.masks import MASK_KINDS
from dropserve.models.montecarlo.sampler import PRECISIONS, Sampler
from dropserve.models.montecarlo.sites import Site
from dropserve.models.montecarlo.statistics import Statistics, Summary, summarize
from dropserve.models.montecarlo.streaming import Sample, stream_samples

__all__ = [
    "MASK_KINDS",
    "PRECISIONS",
    "Precision",
    "Sample",
    "Sampler",
    "Site",
    "Statistics",
    "Summary",
    "stream_samples",
    "summarize",
]
