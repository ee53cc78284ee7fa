"""The sampler against an exhaustive oracle: all 2^n thinned networks, in float64 NumPy."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from dropserve.models.dropout import InvertedDropout
from dropserve.models.errors import SamplingError
from dropserve.models.montecarlo import MASK_KINDS, Sampler, summarize
from dropserve.models.montecarlo.masks import draw

RATES = (0.3, 0.5)
WIDTH = 4  # two sites of four units: 256 thinned networks
SEEDS = 80

either_kind = pytest.mark.parametrize("masks", MASK_KINDS)
any_path = pytest.mark.parametrize("path", ["folded", "vmap", "loop"])


@cache
def tiny():
    """Return a network of 256 thinned networks, three images, and a sampler."""
    torch.manual_seed(4)
    module = nn.Sequential(
        nn.Linear(3, WIDTH), nn.ReLU(), InvertedDropout(RATES[0]),
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(RATES[1]),
        nn.Linear(WIDTH, 3),
    ).eval()  # fmt: skip
    for linear in module[::3]:
        nn.init.normal_(linear.weight, std=0.9)
    x = torch.randn(3, 3)
    return module, x, Sampler(module, x)


def thinned(first, second):
    """Return the probabilities [B, C] of the network whose kept units are given, in float64."""
    module, x, _ = tiny()
    (w1, b1), (w2, b2), (w3, b3) = (
        (m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in module[::3]
    )
    h = np.maximum(x.double().numpy() @ w1.T + b1, 0) * first / (1 - RATES[0])
    h = np.maximum(h @ w2.T + b2, 0) * second / (1 - RATES[1])
    logits = np.exp(h @ w3.T + b3)
    return logits / logits.sum(1, keepdims=True)


def on(path):
    """Return a sampler of the tiny network that takes a path of our choice."""
    module, x, _ = tiny()
    sampler = Sampler(module, x)
    assert sampler.path == "folded"
    sampler.path = path
    return sampler


@cache
def exact():
    """Enumerate all masks with their Bernoulli weights: predictive mean and variance [B, C]."""
    weights, answers = [], []
    for bits in product([0, 1], repeat=2 * WIDTH):
        keep = np.array(bits).reshape(2, WIDTH)
        p = np.array(RATES)[:, None]
        weights.append(np.where(keep, 1 - p, p).prod())
        answers.append(thinned(*keep))
    assert sum(weights) == pytest.approx(1)
    mean = np.average(answers, axis=0, weights=weights)
    return mean, np.average((np.array(answers) - mean) ** 2, axis=0, weights=weights)


@cache
def means(masks, samples):
    """Return the sampler's predictive means [seeds, B, C]."""
    _, x, sampler = tiny()
    runs = [sampler.sample(x, samples, seed, masks).double().mean(0) for seed in range(SEEDS)]
    return torch.stack(runs).numpy()


def rmse(masks, samples):
    return np.sqrt(((means(masks, samples) - exact()[0]) ** 2).mean())


@either_kind
@any_path
def test_every_sample_is_a_forward_pass_with_its_masks_put_in_by_hand(masks, path):
    _, x, _ = tiny()
    sampler = on(path)
    samples = range(25)
    got = sampler.sample(x, len(samples), 9, masks)
    first, second = (draw(masks, 9, site, WIDTH, RATES[site], samples) for site in (0, 1))
    assert got.dtype == torch.float32
    for t in samples:
        np.testing.assert_allclose(got[t], thinned(first[t], second[t]), atol=1e-6)
        logits = sampler.thinned(x, 9, masks, t)
        torch.testing.assert_close(logits.detach().softmax(-1), got[t], rtol=0, atol=1e-6)


@either_kind
@pytest.mark.parametrize("path", ["folded", "vmap"])
def test_mean_and_variance_converge_to_those_of_all_thinned_networks(masks, path):
    _, x, _ = tiny()
    mean, variance = exact()
    got = on(path).summarize(x, 20_000, 1, masks)
    np.testing.assert_allclose(got.mean, mean, atol=5 * np.sqrt(variance.max() / 20_000))
    np.testing.assert_allclose(got.variance, variance, atol=0.02 * variance.max())


@pytest.mark.parametrize("samples", [20, 100, 500])
def test_independent_masks_err_by_the_square_root_of_variance_over_t(samples):
    assert rmse("independent", samples) == pytest.approx(
        np.sqrt(exact()[1].mean() / samples), rel=0.2
    )


@pytest.mark.parametrize("samples", [20, 100, 500])
def test_stratified_masks_err_clearly_less(samples):
    assert rmse("stratified", samples) < 0.75 * rmse("independent", samples)


def test_stratified_masks_err_less_with_more_samples_at_the_same_rate_or_better():
    assert rmse("stratified", 500) < 1.2 * rmse("stratified", 20) * np.sqrt(20 / 500)


@either_kind
@pytest.mark.parametrize("samples", [100, 500])
def test_the_mean_is_not_biased(masks, samples):
    runs = means(masks, samples)
    error = np.abs(runs.mean(0) - exact()[0])
    assert (error <= 5 * runs.std(0, ddof=1) / np.sqrt(SEEDS)).all()


@either_kind
@pytest.mark.parametrize("samples", [100, 107])
def test_the_standard_error_is_the_error_that_is_made(masks, samples):
    _, x, sampler = tiny()
    errors = [
        summarize(sampler.sample(x, samples, seed, masks), masks).standard_error
        for seed in range(SEEDS)
    ]
    claimed = np.sqrt(torch.stack(errors).square().mean().item())
    assert claimed == pytest.approx(rmse(masks, samples), rel=0.25)


@either_kind
@any_path
def test_a_seed_and_a_prefix_decide_everything(masks, path):
    _, x, _ = tiny()
    sampler = on(path)
    hundred = sampler.sample(x, 100, 6, masks)
    torch.testing.assert_close(sampler.sample(x, 20, 6, masks), hundred[:20], rtol=0, atol=1e-6)
    assert torch.equal(sampler.sample(x, 100, 6, masks), hundred)
    assert (sampler.sample(x, 100, 7, masks) - hundred).abs().amax(dim=(1, 2)).median() > 1e-3


@pytest.mark.parametrize("seeds", [2, [7, 7, 0, 2**63 - 1, 7]], ids=["one seed", "a seed each"])
@either_kind
@any_path
def test_an_image_gets_the_same_answer_alone_and_in_a_batch(masks, path, seeds):
    sampler, batch = on(path), torch.randn(5, 3)
    got = sampler.sample(batch, 120, seeds, masks)
    for i, seed in enumerate(seeds if isinstance(seeds, list) else [seeds] * 5):
        alone = sampler.sample(batch[i : i + 1], 120, seed, masks)
        torch.testing.assert_close(alone[:, 0], got[:, i], rtol=1e-5, atol=1e-6)
    assert sampler.sample(batch[:0], 20, []).shape == (20, 0, 3)


@either_kind
@any_path
def test_samples_taken_at_once_are_those_taken_one_chunk_after_another(masks, path):
    _, x, _ = tiny()
    sampler = on(path)
    many = sampler.sample(x, 237, 5, masks)
    chunks = list(sampler.chunks(x, 237, 5, masks))
    assert [chunk.shape for chunk in chunks] == [(3, 3, 100), (3, 3, 100), (3, 3, 37)]
    assert torch.equal(torch.cat(chunks, 2).permute(2, 1, 0), many)
    got, expected = sampler.summarize(x, 237, 5, masks), summarize(many, masks)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name), value, rtol=0, atol=1e-9)
    first, second = (draw(masks, 5, site, WIDTH, RATES[site], range(237)) for site in (0, 1))
    for t in (0, 99, 100, 199, 200, 236):
        np.testing.assert_allclose(many[t], thinned(first[t], second[t]), atol=1e-6)


@any_path
def test_samples_that_do_not_fit_into_one_chunk_are_the_same_samples(path):
    x = torch.randn(2**16, 16)  # so wide that a chunk holds a sample
    sampler = Sampler(nn.Dropout(0.5).eval(), x)
    sampler.path = path
    got = sampler.sample(x, 11, 3)
    keep = draw("stratified", 3, 0, 16, 0.5, range(11))
    rows = torch.randint(2**16, (50,))
    expected = (x[rows] * torch.from_numpy(keep[:, None] * 2.0)).softmax(-1)
    torch.testing.assert_close(got[:, rows].double(), expected, rtol=1e-6, atol=1e-6)


@any_path
def test_an_empty_batch_has_empty_answers(path):
    _, x, _ = tiny()
    assert on(path).sample(x[:0], 5).shape == (5, 0, 3)
    summary = on(path).summarize(x[:0], 20)
    assert summary.mean.shape == summary.standard_error.shape == summary.lower.shape == (0, 3)
    assert summary.variation_ratio.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"samples": 0}, "at least 1, not 0"),
        ({"samples": -3}, "at least 1, not -3"),
        ({"seed": -1}, "0 to 2.63-1, not -1"),
        ({"seed": 2**63}, "0 to 2.63-1"),
        ({"seed": [0, -1, 0]}, "0 to 2.63-1, not -1"),
        ({"seed": [0, 1]}, "3 images need one seed, or a seed each"),
        ({"masks": "antithetic"}, "stratified, independent, not 'antithetic'"),
    ],
    ids=repr,
)
def test_arguments_out_of_range_are_refused(arguments, reason):
    _, x, sampler = tiny()
    with pytest.raises(SamplingError, match=reason):
        sampler.sample(x, **arguments)
