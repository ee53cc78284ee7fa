"""Statistics against NumPy in float64, one formula at a time."""

from dataclasses import fields
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.models.errors import SamplingError
from dropserve.models.montecarlo.statistics import Statistics, degrees_of_freedom, summarize

LEVELS = (0.5, 0.9, 0.99)


def draws(samples, batch=3, classes=4, seed=0, sharpness=2.0):
    logits = sharpness * np.random.default_rng(seed).normal(size=(samples, batch, classes))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def entropy(row):
    return -sum(q * log(q) for q in row if q > 0)


def entropies(p):
    return np.apply_along_axis(entropy, -1, p)


def votes_against_the_mode(p):
    """Return, for each image, the share of samples that do not vote for the modal class."""
    votes = p.argmax(-1)
    return [1 - max(np.bincount(column)) / len(p) for column in votes.T]


@pytest.mark.parametrize("samples", [2, 7, 10, 20, 33, 100])
@pytest.mark.parametrize("level", LEVELS)
def test_every_figure_equals_numpy(samples, level):
    p = draws(samples)
    got = summarize(torch.from_numpy(p), "independent", level)
    tail = (1 - level) / 2
    expected = {
        "mean": p.mean(0),
        "variance": p.var(0, ddof=1),
        "standard_error": np.sqrt(p.var(0, ddof=1) / samples),
        "predictive_entropy": entropies(p.mean(0)),
        "expected_entropy": entropies(p).mean(0),
        "mutual_information": entropies(p.mean(0)) - entropies(p).mean(0),
        "lower": np.quantile(p, tail, axis=0),
        "upper": np.quantile(p, 1 - tail, axis=0),
        "variation_ratio": votes_against_the_mode(p),
    }
    assert expected.keys() | {"degrees_of_freedom"} == {f.name for f in fields(got)}
    for name, value in expected.items():
        tensor = getattr(got, name)
        assert tensor.dtype == torch.float64, name
        np.testing.assert_allclose(tensor, value, rtol=1e-12, atol=1e-14, err_msg=name)


def test_float32_probabilities_are_summed_in_float64():
    p = torch.from_numpy(draws(1000)).float()
    got = summarize(p, "independent")
    np.testing.assert_allclose(got.mean, p.numpy().astype(float).mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.variance, p.numpy().astype(float).var(0, ddof=1), rtol=1e-11)


def solve_mean_variance(p):
    """Sum the covariances of all pairs of samples: V with itself, C within a block, 0 elsewhere."""
    samples, blocks = len(p), len(p) // 10
    block = np.arange(samples) // 10
    pairs = (block[:, None] == block).sum() - samples
    sums = p[: 10 * blocks].reshape(blocks, 10, *p.shape[1:]).sum(1)
    found = np.zeros_like(p[0])
    for _ in range(200):  # a fixed point, because V is measured about the mean of the samples
        v = p.var(0) + found
        c = (sums.var(0, ddof=1) - 10 * v) / 90
        found = (samples * v + pairs * c) / samples**2
    return found


@pytest.mark.parametrize("samples", [20, 21, 25, 29, 30, 37, 101])
def test_the_stratified_standard_error_counts_every_covariance(samples):
    p = draws(samples)
    got = summarize(torch.from_numpy(p), "stratified").standard_error
    np.testing.assert_allclose(got, np.sqrt(solve_mean_variance(p)), rtol=1e-12)


@pytest.mark.parametrize("masks", ["stratified", "independent"])
def test_degrees_of_freedom_are_there_where_a_standard_error_is(masks):
    for samples in range(1, 42):
        known = summarize(torch.from_numpy(draws(samples)), masks).standard_error is not None
        differences = samples - 1 if masks == "independent" else samples // 10 - 1
        assert degrees_of_freedom(masks, samples) == (differences if known else None)
        assert known == (differences > 0)


@pytest.mark.parametrize("masks", ["stratified", "independent"])
def test_a_single_sample_has_no_variance_and_no_standard_error(masks):
    p = torch.from_numpy(draws(1))
    got = summarize(p, masks)
    assert got.variance is None
    assert got.standard_error is None
    assert torch.equal(got.mutual_information, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(got.variation_ratio, torch.zeros(3, dtype=torch.float64))
    for figure in (got.mean, got.lower, got.upper):
        assert torch.equal(figure, p[0])


def test_certain_samples_that_contradict_each_other_are_all_mutual_information():
    p = torch.eye(4).repeat(5, 1).unsqueeze(1)  # [20, 1, 4], exact zeros and ones
    got = summarize(p, "independent")
    assert got.predictive_entropy.item() == pytest.approx(log(4))
    assert got.expected_entropy.item() == 0
    assert got.mutual_information.item() == pytest.approx(log(4))
    assert got.variation_ratio.item() == 0.75


@pytest.mark.parametrize("masks", ["stratified", "independent"])
def test_equal_samples_leave_no_mutual_information(masks):
    p = torch.tensor([[[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]]]).expand(30, 2, 3)
    got = summarize(p, masks)
    assert got.mutual_information.tolist() == pytest.approx([0, 0], abs=1e-15)
    assert got.variation_ratio.tolist() == [0, 0]
    for field in fields(got):
        assert np.isfinite(np.asarray(getattr(got, field.name))).all(), field.name
    assert got.standard_error.max() < 1e-9


def test_rounding_makes_no_negative_mutual_information():
    p = torch.from_numpy(draws(1, batch=1000)).expand(7, -1, -1)
    got = summarize(p, "independent")
    assert (got.predictive_entropy < got.expected_entropy).any(), "this test needs rounding errors"
    assert (got.mutual_information >= 0).all()


sizes = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(2, 6))


@settings(max_examples=60)
@given(sizes, st.integers(0, 10**6), st.floats(0, 200), st.floats(0.01, 0.99))
def test_entropies_add_up_and_intervals_are_in_order(size, seed, sharpness, level):
    p = torch.from_numpy(draws(*size, seed=seed, sharpness=sharpness))
    got = summarize(p, "stratified", level)
    assert (got.mutual_information >= 0).all()
    total = got.expected_entropy + got.mutual_information
    torch.testing.assert_close(got.predictive_entropy, total, rtol=0, atol=1e-12)
    assert (got.predictive_entropy <= log(size[2]) + 1e-12).all()
    assert (got.lower <= got.upper).all()
    assert (got.lower >= p.amin(0)).all()
    assert (got.upper <= p.amax(0)).all()
    assert ((got.variation_ratio >= 0) & (got.variation_ratio <= 1 - 1 / size[2] + 1e-12)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_add_up_to_all_samples_at_once(data):
    total = data.draw(st.integers(1, 260))
    level = data.draw(st.floats(0.01, 0.99))
    masks = data.draw(st.sampled_from(["stratified", "independent"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    p = rng.dirichlet(np.full(4, 0.4), (total, 3))  # [T, B, C]
    if data.draw(st.booleans()):
        p = p.round(1)  # ties
    statistics = Statistics(total, masks, level)
    start = 0
    while start < total:
        assert not statistics.complete
        stop = start + 10 * data.draw(st.integers(1, 9))
        statistics.add(torch.from_numpy(p[start:stop].transpose(2, 1, 0).copy()))
        start = stop
    assert statistics.complete
    assert statistics._ordered.shape[2] <= (1 - level) * total + 4
    got, whole = statistics.summary(), summarize(torch.from_numpy(p), masks, level)
    np.testing.assert_allclose(got.lower, np.quantile(p, (1 - level) / 2, 0), atol=1e-12)
    np.testing.assert_allclose(got.upper, np.quantile(p, (1 + level) / 2, 0), atol=1e-12)
    for name, value in vars(whole).items():
        mine = getattr(got, name)
        assert (mine is None) == (value is None)
        if value is not None:
            np.testing.assert_allclose(mine, value, atol=1e-12)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_sums_and_tails_are_kept_and_not_the_samples(level):
    total, batch, classes = 5000, 3, 4
    statistics, rng = Statistics(total, "stratified", level), np.random.default_rng(0)
    for _ in range(total // 100):
        chunk = rng.dirichlet(np.ones(classes), (batch, 100)).astype(np.float32)
        statistics.add(torch.from_numpy(chunk.transpose(2, 0, 1).copy()))
    tails = statistics._ordered.nbytes / (4 * batch * classes)
    assert tails <= (1 - level) * total + 4
    sums = [kept for kept in vars(statistics).values() if isinstance(kept, dict)]
    assert sum(array.size for kept in sums for array in kept.values()) < 10 * batch * classes
    assert statistics.summary().lower.shape == (batch, classes)


def test_ties_give_their_vote_to_the_first_class():
    p = torch.tensor([[[0.4, 0.4, 0.2]], [[0.2, 0.4, 0.4]], [[0.4, 0.2, 0.4]]])  # votes 0, 1, 0
    assert summarize(p, "independent").variation_ratio.item() == pytest.approx(1 / 3)


def test_a_summary_needs_all_samples():
    statistics = Statistics(20, "stratified")
    statistics.add(torch.full((2, 1, 10), 0.5))
    with pytest.raises(SamplingError, match="10 samples of 20"):
        statistics.summary()
