"""Masks: a pure function of (seed, site, sample), with the law that is claimed for them."""

from itertools import combinations, product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from dropserve.models.montecarlo.masks import BLOCK, MASK_KINDS, draw, draw_normal

RATES = (0.01, 0.25, 0.3, 0.37, 0.5, 0.7, 0.99)
SIGMAS = 5

kinds = st.sampled_from(MASK_KINDS)
seeds = st.integers(0, 2**63 - 1)
sites = st.integers(0, 30)
units = st.integers(1, 40)
rates = st.floats(0, 1, exclude_max=True)


def philox(seed, site, counter):
    """Return Philox-4x64-10 of a 256-bit counter, after Salmon et al. (2011), section 3.3."""
    word = 2**64 - 1
    x = [counter >> (64 * i) & word for i in range(4)]
    key = [seed, site]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], 2**64)
        x = [high1 ^ x[1] ^ key[0], low1, high0 ^ x[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B97F4A7C15 & word, key[1] + 0xBB67AE8584CAA73B & word]
    return x


def words(seed, site, row, width):
    """Return row `row` of a site's table of 64-bit words, from the counter alone."""
    counts = -(-width // 4)
    return [w for c in range(counts) for w in philox(seed, site, row * counts + c + 1)]


@pytest.mark.parametrize(("seed", "site"), [(0, 0), (2**63 - 1, 3)])
def test_independent_masks_come_from_philox_by_the_counter(seed, site):
    p = 0.37
    for t, width in product((0, 1, 57), (8, 9, 11)):
        halves = [h for w in words(seed, site, t, -(-width // 2)) for h in (w % 2**32, w >> 32)]
        expected = [h >= p * 2**32 for h in halves[:width]]
        assert draw("independent", seed, site, width, p, range(t, t + 1))[0].tolist() == expected


@pytest.mark.parametrize(("seed", "site"), [(0, 0), (2**63 - 1, 3)])
def test_stratified_masks_come_from_philox_by_the_counter(seed, site):
    p = 0.37  # three or, with probability .7, four of ten are dropped
    for block, width in product((0, 1, 5), (8, 9, 11)):
        got = draw("stratified", seed, site, width, p, range(block * 10, block * 10 + 10))
        for unit, word in enumerate(words(seed, site, block, width)[:width]):
            size = 4 if int(word) >> 32 < 0.7 * 2**32 else 3
            subsets = list(combinations(range(10), size))
            dropped = subsets[(word % 2**32) * len(subsets) >> 32]
            assert set(np.flatnonzero(~got[:, unit])) == set(dropped)


@given(kinds, seeds, sites, units, rates, st.integers(0, 70), st.integers(0, 70))
def test_any_range_of_samples_is_a_slice_of_all(kind, seed, site, units, p, a, b):
    start, stop = sorted((a, b))
    all_of_them = draw(kind, seed, site, units, p, range(stop))
    got = draw(kind, seed, site, units, p, range(start, stop))
    assert got.shape == (stop - start, units)
    np.testing.assert_array_equal(got, all_of_them[start:])


@given(seeds, sites, units, rates, st.integers(0, 5))
def test_a_stratified_block_drops_each_unit_ten_p_times_to_rounding(seed, site, units, p, block):
    keep = draw("stratified", seed, site, units, p, range(block * BLOCK, (block + 1) * BLOCK))
    dropped = (~keep).sum(0)
    assert ((dropped == np.floor(10 * p)) | (dropped == np.floor(10 * p) + 1)).all()
    if 10 * p % 1 == 0:
        assert (dropped == 10 * p).all()


@settings(max_examples=30)
@given(kinds, seeds, sites)
def test_another_seed_or_another_site_gives_other_masks(kind, seed, site):
    one = draw(kind, seed, site, 64, 0.5, range(20))
    for seed_, site_ in (((seed + 1) % 2**63, site), (seed, site + 1), (site, seed % 2**32)):
        if (seed_, site_) != (seed, site):
            other = draw(kind, seed_, site_, 64, 0.5, range(20))
            assert abs((one == other).mean() - 0.5) < SIGMAS * 0.5 / sqrt(one.size)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_every_sample_drops_each_unit_at_rate_p(kind, p):
    """Units are independent within a sample, so the drops of one sample are binomial."""
    count = 50_000
    keep = draw(kind, 5, 1, count, p, range(13))  # a whole block and a bit
    tolerance = SIGMAS * sqrt(p * (1 - p) / count)
    assert (np.abs((~keep).mean(1) - p) <= tolerance).all()


def test_every_subset_of_a_stratified_block_is_equally_likely():
    width = 45_000
    keep = draw("stratified", 1, 0, width, 0.2, range(BLOCK))
    pairs = np.flatnonzero(~keep.T.reshape(-1)).reshape(width, 2) % BLOCK
    counts = np.array([(pairs == pair).all(1).sum() for pair in combinations(range(BLOCK), 2)])
    assert counts.sum() == width
    chi_square = ((counts - 1000) ** 2 / 1000).sum()  # 44 degrees of freedom
    assert abs(chi_square - 44) <= SIGMAS * sqrt(2 * 44)


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_units_are_independent_of_each_other_within_a_sample(kind, p):
    samples, count = 5000, 41
    keep = draw(kind, 11, 0, count, p, range(samples)).astype(float)
    pairs = np.corrcoef(keep.T)[np.triu_indices(count, 1)]
    assert np.abs(pairs).max() <= SIGMAS / sqrt(samples)
    assert (pairs**2).mean() * samples == pytest.approx(1, abs=SIGMAS * sqrt(2 / len(pairs)))


@pytest.mark.parametrize("p", RATES)
def test_independent_samples_are_independent_of_each_other(p):
    keep = draw("independent", 3, 0, 20_000, p, range(11)).astype(float)
    pairs = np.corrcoef(keep)[np.triu_indices(11, 1)]
    assert np.abs(pairs).max() <= SIGMAS / sqrt(20_000)


def test_samples_of_a_stratified_block_avoid_each_other():
    """Ten exclusive slots: the correlation of two samples of a block is -1/9 at p = .1."""
    keep = draw("stratified", 3, 0, 50_000, 0.1, range(20)).astype(float)
    correlation = np.corrcoef(keep)
    inside = correlation[:10, :10][np.triu_indices(10, 1)]
    assert np.abs(inside + 1 / 9).max() <= SIGMAS / sqrt(50_000)
    assert np.abs(correlation[:10, 10:]).max() <= SIGMAS / sqrt(50_000)


def test_blocks_are_independent_so_that_their_spread_tells_the_error():
    keep = draw("stratified", 3, 0, 5000, 0.25, range(100))
    counts = (~keep).reshape(5, 2, 10, 5000).sum(2)
    assert set(counts.flat) == {2, 3}
    correlation = np.corrcoef(counts[:, 0].ravel(), counts[:, 1].ravel())[0, 1]
    assert abs(correlation) < SIGMAS / sqrt(counts[:, 0].size)


@given(kinds, seeds, sites, units, st.integers(0, 70), st.integers(0, 70))
def test_any_range_of_normal_numbers_is_a_slice_of_all(kind, seed, site, units, a, b):
    start, stop = sorted((a, b))
    all_of_them = draw_normal(kind, seed, site, units, range(stop))
    got = draw_normal(kind, seed, site, units, range(start, stop))
    assert got.shape == (stop - start, units)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, all_of_them[start:])


@given(seeds, sites, units, st.integers(0, 5))
def test_a_stratified_block_has_a_normal_number_in_each_tenth(seed, site, units, block):
    samples = range(block * BLOCK, (block + 1) * BLOCK)
    drawn = draw_normal("stratified", seed, site, units, samples).astype(float)
    inner = norm.ppf(np.arange(1, BLOCK) / BLOCK)[:, None]
    ordered = np.sort(drawn, 0)
    assert (ordered[:-1] <= inner + 1e-6).all()
    assert (ordered[1:] >= inner - 1e-6).all()


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_normal_numbers_are_normal_and_independent_of_each_other_within_a_sample(kind):
    for sample in draw_normal(kind, 5, 1, 5000, range(23)):  # two blocks and a bit
        assert kstest(sample, "norm").pvalue > 1e-4
    drawn = draw_normal(kind, 5, 2, 41, range(5000))
    pairs = np.corrcoef(drawn.T)[np.triu_indices(41, 1)]
    assert np.abs(pairs).max() <= SIGMAS / sqrt(5000)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_normal_numbers_of_a_stratified_block_avoid_each_other_and_others_do_not(kind):
    """Two samples fall into tenths that differ: their product's mean is that of the tenths'."""
    edges = norm.pdf(norm.ppf(np.arange(BLOCK + 1) / BLOCK))
    tenths = (edges[:-1] - edges[1:]) * BLOCK  # the mean in each
    inside = -(tenths**2).mean() / (BLOCK - 1) if kind == "stratified" else 0.0
    found = np.corrcoef(draw_normal(kind, 5, 1, 50_000, range(20)))
    for block in (found[:10, :10], found[10:, 10:]):
        assert np.abs(block[np.triu_indices(10, 1)] - inside).max() <= SIGMAS / sqrt(50_000)
    assert np.abs(found[:10, 10:]).max() <= SIGMAS / sqrt(50_000)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_normal_numbers_of_another_seed_or_site_are_others(kind):
    one, *others = (
        draw_normal(kind, seed, site, 64, range(20)).ravel()
        for seed, site in ((3, 4), (4, 3), (3, 5), (2**63 - 1, 4))
    )
    for other in others:
        assert abs(np.corrcoef(one, other)[0, 1]) <= SIGMAS / sqrt(one.size)
