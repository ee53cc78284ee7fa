"""The store of masks: what it draws, keeps and releases."""

import gc
import weakref

import numpy as np
import pytest
import torch

from dropserve.models.montecarlo.masks import BLOCK, MASK_KINDS, draw
from dropserve.models.montecarlo.scaled_masks import CHUNK, MaskStore
from dropserve.models.montecarlo.sites import Site
from dropserve.models.regularizers import Bernoulli

CPU = torch.device("cpu")
CHANNELS = (7, 1, 1)
SITES = (
    Site("first", Bernoulli("dropout", 0.2), (40,), (1, 40), 0),
    Site("second", Bernoulli("spatial", 0.5), CHANNELS[:1], (1, *CHANNELS), 0),
    Site("third", Bernoulli("vanilla", 0.8, rescaled=False), (3,), (1, 3), 0),
)


def wide(units):
    return MaskStore([Site("wide", Bernoulli("dropout", 0.5), (units,), (1, units), 0)])


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_factors_are_the_drawn_masks_times_what_a_survivor_is_multiplied_by(kind):
    drawn = MaskStore(SITES).get(kind, 9, range(20, 43), CPU)
    assert drawn.samples == 23
    for index, (site, factor) in enumerate(zip(SITES, drawn.factors, strict=True)):
        keep = draw(kind, 9, index, site.units, site.p, range(20, 43))
        survivor = 1.0 if site.kind == "vanilla" else 1 / (1 - site.p)
        assert factor.shape == (23, *site.template)
        assert factor.dtype == torch.float32
        np.testing.assert_allclose(factor.flatten(1), keep * survivor, rtol=1e-7)


def test_the_same_masks_are_drawn_once():
    store = MaskStore(SITES)
    first = store.get("stratified", 3, range(30), CPU)
    others = [("independent", 3, range(30)), ("stratified", 4, range(30))]
    for kind, seed, samples in [*others, ("stratified", 3, range(100, 130))]:
        other = store.get(kind, seed, samples, CPU)
        assert other is not first
        assert not torch.equal(other.factors[0], first.factors[0])
    assert store.get("stratified", 3, range(30), CPU) is first


def test_fewer_samples_than_are_kept_are_the_first_of_them_and_more_begin_with_them():
    store = MaskStore(SITES)
    parent = store.get("stratified", 3, range(50), CPU)
    for samples in (1, 13, 20):
        part = store.get("stratified", 3, range(samples), CPU)
        assert (part.samples, part.parent) == (samples, parent)
        for few, all_of_them in zip(part.factors, parent.factors, strict=True):
            assert few.data_ptr() == all_of_them.data_ptr()
            assert torch.equal(few, all_of_them[:samples])
    more = store.get("stratified", 3, range(60), CPU)
    assert (more.samples, more.parent, len(store._kept)) == (60, more, 1)
    assert torch.equal(more.factors[0][:50], parent.factors[0])


def test_the_masks_used_last_stay_and_the_rest_go():
    store = wide(20_000)  # 8 MB a seed
    often = store.get("independent", 0, range(100), CPU)
    for seed in range(1, 40):
        store.get("independent", seed, range(100), CPU)
        assert store.get("independent", 0, range(100), CPU) is often
        assert sum(masks.nbytes for masks in store._kept.values()) <= 2**26 + 8 * 10**6
    assert {seed for _, seed, _, _ in store._kept} == {0, *range(32, 40)}


@pytest.mark.parametrize("first", [20, 100])
def test_pinned_masks_stay_whatever_comes_also_where_more_of_them_are_drawn(first):
    store = wide(20_000)
    store.get("stratified", 0, range(first), CPU, pin=True)
    pinned = store.get("stratified", 0, range(100), CPU)
    for seed in range(1, 30):
        assert not store.get("stratified", seed, range(100), CPU).pinned
    assert store.get("stratified", 0, range(100), CPU) is pinned
    assert pinned.pinned


def test_forgotten_masks_are_drawn_again_and_pinned_ones_and_the_latest_stay():
    store = wide(1000)
    pinned = store.get("stratified", 0, range(20), CPU, pin=True)
    gone, latest = (store.get("stratified", seed, range(20), CPU) for seed in (1, 2))
    store.forget()
    assert [seed for _, seed, _, _ in store._kept] == [0, 2]
    assert store.get("stratified", 0, range(20), CPU) is pinned
    assert store.get("stratified", 2, range(20), CPU) is latest
    again = store.get("stratified", 1, range(20), CPU)
    assert again is not gone
    assert torch.equal(again.factors[0], gone.factors[0])


@pytest.mark.parametrize("parts", [(), (20, 7)])
def test_masks_that_are_released_are_freed_at_once(parts):
    gc.collect()
    gc.disable()
    try:
        store = wide(20_000)
        gone = weakref.ref(store.get("stratified", 0, range(100), CPU))
        for samples in parts:
            store.get("stratified", 0, range(samples), CPU)
        for seed in range(1, 30):
            store.get("stratified", seed, range(100), CPU)
        assert gone() is None
        gone = weakref.ref(store.get("stratified", 29, range(100), CPU))
        for samples in parts:
            store.get("stratified", 29, range(samples), CPU)
        store.get("stratified", 29, range(110), CPU)
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_made_of_masks_later_counts_as_memory_too():
    store = wide(20_000)  # 8 MB a seed, and as much again made of it
    for seed in range(7):
        store.get("independent", seed, range(100), CPU)
    for seed in range(7):
        masks = store.get("independent", seed, range(100), CPU)
        before = masks.nbytes
        masks.thinned.append((torch.zeros(10**6), torch.zeros(10**6)))
        assert masks.nbytes == before + 8 * 10**6
        assert sum(masks.nbytes for masks in store._kept.values()) <= 2**26 + 16 * 10**6


@pytest.mark.parametrize("units", [1, 4000, 41_943, 100_000, 419_430, 450_000])
def test_a_chunk_is_whole_blocks_and_not_too_large(units):
    chunk = wide(units).chunk
    assert chunk % BLOCK == 0
    assert 0 < chunk <= CHUNK
    assert chunk == BLOCK or chunk * units <= 2**22
