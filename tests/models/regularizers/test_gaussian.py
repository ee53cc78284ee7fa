"""Gaussian noise against the closed form: a linear map of normal numbers is normal."""

from math import nan, sqrt

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from dropserve.models.errors import ConfigError
from dropserve.models.montecarlo import Sampler
from dropserve.models.regularizers import GaussianDropout, GaussianNoise

DRAWS = 40_000
LAYERS = {  # a layer, and the mean and standard deviation of what it makes of x
    "dropout at .2": (GaussianDropout(0.2), lambda x: (x, x.abs() * sqrt(0.2 / 0.8))),
    "dropout at .9": (GaussianDropout(0.9), lambda x: (x, x.abs() * sqrt(0.9 / 0.1))),
    "noise": (GaussianNoise(0.7), lambda x: (x, torch.full_like(x, 0.7))),
    "noise about 2": (GaussianNoise(0.7, 2.0), lambda x: (x + 2, torch.full_like(x, 0.7))),
}
any_layer = pytest.mark.parametrize("case", LAYERS)


def assert_normal(drawn, mean, std):
    """Hold draws [N] against a normal distribution."""
    error = std / sqrt(len(drawn))
    assert abs(float(drawn.mean()) - mean) <= 5 * error
    assert float(drawn.var()) == pytest.approx(std**2, rel=5 * sqrt(2 / len(drawn)))
    assert kstest((drawn - mean) / std, "norm").pvalue > 1e-3


@any_layer
def test_train_mode_draws_independent_normal_numbers_and_eval_mode_is_their_mean(case):
    layer, law = LAYERS[case]
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    drawn = layer.train()(x.expand(DRAWS, 3))
    mean, std = law(x)
    for unit in range(3):
        assert_normal(drawn[:, unit], float(mean[unit]), float(std[unit]))
    assert (torch.corrcoef(drawn.T) - torch.eye(3)).abs().max() <= 5 / sqrt(DRAWS)
    torch.testing.assert_close(layer.eval()(x), mean)


@any_layer
@pytest.mark.parametrize("path", ["folded", "vmap"])
def test_sampled_logits_of_a_linear_layer_have_the_closed_form(case, path):
    """The log of two probabilities' ratio is a difference of logits."""
    layer, law = LAYERS[case]
    module, x, samples = nn.Sequential(layer, nn.Linear(4, 2)).eval(), torch.randn(2, 4), 4000
    sampler = Sampler(module, x)
    assert sampler.path == "folded"
    sampler.path = path
    log = sampler.sample(x, samples, 5, "independent").double().log()
    weight, bias = (p.detach().double().diff(dim=0)[0] for p in module[1].parameters())
    mean, std = law(x.double())
    for image in range(2):
        centre = float(mean[image] @ weight + bias)
        spread = float((std[image] * weight).norm())
        assert_normal(log[:, image, 1] - log[:, image, 0], centre, spread)


def test_gaussian_dropout_has_the_variance_of_inverted_dropout_at_any_rate():
    for p in (0.05, 0.5, 0.95):
        layer = GaussianDropout(p)
        assert (layer.law.mean, layer.p) == (1, p)
        assert layer.law.std**2 == pytest.approx(p / (1 - p))
        assert layer.law.at(0.75).std == pytest.approx(sqrt(3))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((-0.1,), r"standard deviation of noise must be in \[0, 100\); got -0.1"),
        ((nan,), "standard deviation .* got nan"),
        ((0.1, -100), r"mean of noise must be in \(-100, 100\); got -100"),
        ((0.1, nan), "mean of noise .* got nan"),
    ],
)
def test_a_standard_deviation_or_a_mean_out_of_range_is_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        GaussianNoise(*values)
