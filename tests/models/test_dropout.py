"""Dropout against the closed form: y = x b / (1-p), with b Bernoulli(1-p)."""

from math import nan, sqrt

import pytest
import torch

from dropserve.models.dropout import (
    InvertedDropout,
    SpatialDropout,
    VanillaDropout,
    inverted_dropout,
    spatial_dropout,
    vanilla_dropout,
)
from dropserve.models.errors import ConfigError
from dropserve.models.regularizers.noise import random_mask

CPU = torch.device("cpu")
DRAWS = 200_000
SIGMAS = 5
RATES = (0.01, 0.25, 0.37, 0.5, 0.9)


@pytest.mark.parametrize("p", RATES)
def test_inverted_dropout_has_the_mean_and_variance_of_the_closed_form(p):
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    y = inverted_dropout(x.expand(DRAWS, 3), p)
    variance = x.square() * p / (1 - p)
    assert ((y.mean(0) - x).abs() <= SIGMAS * (variance / DRAWS).sqrt()).all()
    # The sample variance of a Bernoulli has variance pq(1-4pq)/n, which is 0 at p = 1/2.
    pq, unit = p * (1 - p), x.square() / (1 - p) ** 2
    tolerance = unit * (SIGMAS * sqrt(pq * (1 - 4 * pq) / DRAWS) + SIGMAS**2 / DRAWS)
    assert ((y.var(0) - variance).abs() <= tolerance).all()


@pytest.mark.parametrize("p", RATES)
def test_survivors_are_exactly_the_input_over_the_keep_probability(p):
    x = torch.randn(1000)
    y = inverted_dropout(x, p)
    kept = y != 0
    assert 0 < kept.sum() < 1000
    torch.testing.assert_close(y[kept], (x / (1 - p))[kept], rtol=1e-6, atol=0)


def test_vanilla_dropout_agrees_with_its_evaluation_in_expectation():
    p, x = 0.3, torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    trained = vanilla_dropout(x.expand(DRAWS, 3), p)
    assert torch.equal(vanilla_dropout(x, p, training=False), x * (1 - p))
    assert (trained == 0).logical_or(trained == x).all()
    error = (trained.mean(0) - x * (1 - p)).abs()
    assert (error <= SIGMAS * x.abs() * sqrt(p * (1 - p) / DRAWS)).all()


@pytest.mark.parametrize("dropout", [inverted_dropout, spatial_dropout])
def test_evaluation_and_zero_rate_are_the_identity(dropout):
    x = torch.randn(4, 5, 6)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("kind", [InvertedDropout, VanillaDropout, SpatialDropout])
def test_a_module_follows_its_training_flag(kind):
    x, module = torch.ones(8, 64, 2), kind(0.5)
    assert 0 < (module.train()(x) == 0).float().mean() < 1
    assert torch.equal(module.eval()(x), x * 0.5 if kind is VanillaDropout else x)


@pytest.mark.parametrize("dropout", [inverted_dropout, vanilla_dropout, spatial_dropout])
def test_the_gradient_passes_through_survivors_only(dropout):
    x = torch.randn(6, 8, 3, requires_grad=True)
    y = dropout(x, 0.4)
    y.backward(torch.ones_like(y))
    factor = 1.0 if dropout is vanilla_dropout else 1 / 0.6
    torch.testing.assert_close(x.grad, torch.where(y != 0, factor, 0.0))


def test_spatial_dropout_drops_whole_channels_each_on_its_own():
    y = spatial_dropout(torch.ones(50, 40, 3, 2), 0.25)
    channels = y.flatten(2)
    assert torch.equal(channels, channels[:, :, :1].expand_as(channels))
    dropped = (channels[:, :, 0] == 0).double()
    assert abs(dropped.mean() - 0.25) <= SIGMAS * sqrt(0.25 * 0.75 / 2000)
    assert len(dropped.unique(dim=0)) == 50  # another mask for each image


@pytest.mark.parametrize("p", RATES)
def test_each_lane_of_the_random_words_drops_at_rate_p(p):
    kept = random_mask(torch.Size((DRAWS, 4)), p, CPU).double()
    error = (kept.mean(0) - (1 - p)).abs()
    assert (error <= SIGMAS * sqrt(p * (1 - p) / DRAWS)).all()
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() <= SIGMAS / sqrt(DRAWS)


def test_neighbouring_words_are_uncorrelated():
    kept = random_mask(torch.Size((DRAWS,)), 0.5, CPU).double() - 0.5
    for lag in range(1, 9):
        assert abs((kept[lag:] * kept[:-lag]).mean() * 4) <= SIGMAS / sqrt(DRAWS)


@pytest.mark.parametrize("p", [0.9999, 0.999999, 1 - 2**-53])
def test_a_rate_close_to_one_drops_almost_everything(p):
    dropped = (~random_mask(torch.Size((DRAWS,)), p, CPU)).double().mean()
    assert dropped >= p - 2**-16 - SIGMAS * sqrt(1e-4 / DRAWS)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 7), (2, 3, 5)])
def test_a_mask_has_any_shape_and_a_generator_decides_it(shape):
    first, again = (
        random_mask(torch.Size(shape), 0.5, CPU, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first.shape == shape
    assert first.dtype == torch.bool
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", [InvertedDropout, VanillaDropout, SpatialDropout])
@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, nan])
def test_a_rate_outside_zero_to_one_is_refused(kind, p):
    with pytest.raises(ConfigError, match=r"\[0, 1\).*dropping; got"):
        kind(p)
