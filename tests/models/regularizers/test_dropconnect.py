"""DropConnect: its relation to dropout, who shares a draw, and moment matching."""

from math import sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropserve.models.errors import ConfigError
from dropserve.models.montecarlo import Sampler
from dropserve.models.montecarlo.interception import Interception
from dropserve.models.networks import NetworkConfig
from dropserve.models.regularizers import DropConnect, with_moment_matching

P = 0.4
KEPT = 1 / (1 - P)


def masked(layer, x, mask):
    return Interception(lambda _law, _shape: mask).run(layer.train(), x)


def test_dropped_rows_of_the_weights_are_dropped_inputs_and_columns_dropped_outputs():
    """Weights as the paper has them, [in, out]; with a row goes no bias, with a column its own."""
    layer, x = DropConnect(5, 4, P), torch.randn(7, 5)
    inputs, outputs = ((torch.rand(units) < 0.5) * KEPT for units in (5, 4))
    mask = torch.cat([inputs, torch.ones(1)]).expand(1, 4, 6)
    expected = F.linear(x * inputs, layer.weight, layer.bias)
    torch.testing.assert_close(masked(layer, x, mask), expected)
    mask = outputs[None, :, None].expand(1, 4, 6)
    expected = F.linear(x, layer.weight, layer.bias) * outputs
    torch.testing.assert_close(masked(layer, x, mask), expected)


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)], ids=["units", "steps"])
def test_each_example_has_weights_of_its_own(shape):
    layer, x = DropConnect(5, 4, P), torch.randn(shape)
    mask = (torch.rand(6, 4, 6) < 0.5) * KEPT
    got = masked(layer, x, mask)
    for i in range(6):
        own = layer.weight * mask[i, :, :-1], layer.bias * mask[i, :, -1]
        torch.testing.assert_close(got[i], F.linear(x[i], *own))


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_equal_examples_of_a_batch_get_equal_answers_where_they_share_a_draw(scope):
    layer, x = DropConnect(50, 8, P, scope).train(), torch.randn(1, 50).expand(2, 50)
    (first, second), again = layer(x), layer(x)
    assert torch.allclose(first, second, atol=1e-6) == (scope == "batch")
    assert not torch.allclose(first, again[0], atol=1e-3), "each pass draws anew"


def test_moment_matching_has_the_mean_and_variance_of_sampled_weights():
    """Section 3.2 of Wan et al. (2013), against 100,000 masks."""
    layer, x, draws = DropConnect(5, 4, P), torch.randn(3, 5), 100_000
    matched = with_moment_matching(nn.Sequential(layer))
    mean, above = (masked(matched, x, torch.full((3, 4), z)).detach() for z in (0.0, 1.0))
    weight = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double().numpy()
    random, inputs = np.random.default_rng(0), np.column_stack([x.double(), np.ones(3)])
    keep = random.random((draws, 4, 6)) >= P
    sampled = np.einsum("noi,bi->nbo", keep * (weight * KEPT), inputs)
    variance = sampled.var(0)
    assert (abs(mean.numpy() - sampled.mean(0)) <= 5 * np.sqrt(variance / draws)).all()
    # the kurtosis of each weight is below 3, a normal number's, and so is that of their sum
    np.testing.assert_allclose((above - mean).numpy() ** 2, variance, rtol=5 * sqrt(2 / draws))


def test_a_matched_network_is_sampled_with_normal_hidden_units():
    config = NetworkConfig("mlp", (1, 1, 5), 3, (4,), (P,), regularizer="dropconnect")
    module, x, samples = config.build().eval(), 2 * torch.randn(2, 1, 1, 5), 4000
    matched = with_moment_matching(module)
    assert all(a is b for a, b in zip(matched.parameters(), module.parameters(), strict=True))
    assert not module.hidden1.matches_moments
    sampler = Sampler(matched, x)
    (site,) = sampler.sites
    assert (site.kind, site.shape, type(site.law).__name__) == ("moment-matching", (4,), "Gaussian")
    got = sampler.sample(x, samples, 1, "independent").double().numpy()
    w = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    flat = x.double().numpy().reshape(2, 5)
    mean = flat @ w["hidden1.weight"].T + w["hidden1.bias"]
    variance = flat**2 @ (w["hidden1.weight"] ** 2).T + w["hidden1.bias"] ** 2
    z = np.random.default_rng(0).standard_normal((100_000, 2, 4))
    hidden = np.maximum(mean + np.sqrt(variance * P / (1 - P)) * z, 0)
    shares = np.exp(hidden @ w["logits.weight"].T + w["logits.bias"])
    p = shares / shares.sum(-1, keepdims=True)
    assert (abs(got.mean(0) - p.mean(0)) <= 5 * p.std(0) / sqrt(samples)).all()
    np.testing.assert_allclose(got.var(0), p.var(0), rtol=0.2)
    plain = Sampler(module, x).summarize(x, samples)
    np.testing.assert_allclose(plain.mean, got.mean(0), atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(matched(x), module(x))


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig("mlp", (1, 1, 5), 3, (4,), (P,)),
        NetworkConfig(
            "gru", (1, 2, 2), 3, (4,), (P, P), regularizer="dropconnect", mask_scope="batch"
        ),
    ],
    ids=["dropout", "gru"],
)
def test_moment_matching_is_for_feed_forward_dropconnect(config):
    with pytest.raises(ConfigError, match="DropConnect on feed-forward layers"):
        with_moment_matching(config.build())
