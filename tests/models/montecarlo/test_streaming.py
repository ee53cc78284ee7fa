"""Streaming: what it says after each sample, and what it holds between its steps."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from dropserve.models.montecarlo import (
    MASK_KINDS,
    Sample,
    Sampler,
    Statistics,
    Summary,
    stream_samples,
    summarize,
)
from dropserve.models.montecarlo.masks import draw
from dropserve.models.montecarlo.scaled_masks import ScaledMasks


def stream(samples, masks):
    """Return a sampler, an image, statistics and the steps that fill them."""
    module = nn.Sequential(nn.Linear(4, 11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 3)).eval()
    x, statistics = torch.randn(1, 4), Statistics(samples, masks)
    sampler = Sampler(module, x)
    return sampler, x, statistics, stream_samples(sampler, x, samples, 7, masks, statistics)


@pytest.mark.parametrize("masks", MASK_KINDS)
def test_after_each_sample_it_says_what_a_summary_of_the_samples_so_far_does(masks):
    sampler, x, statistics, steps = stream(127, masks)
    told = [sample for step in steps for sample in step]
    every, whole = sampler.sample(x, 127, 7, masks), sampler.summarize(x, 127, 7, masks)
    keep = draw(masks, 7, 0, 11, 0.3, range(127))
    names = {field.name for field in fields(Sample)} & {field.name for field in fields(Summary)}
    assert len(names) == 6
    assert [sample.t for sample in told] == list(range(1, 128))
    for t, sample in enumerate(told, 1):
        np.testing.assert_array_equal(sample.probabilities, every[t - 1, 0])
        np.testing.assert_array_equal(np.unpackbits(sample.kept[0], count=11), keep[t - 1])
        known = summarize(every[:t], masks)
        for name in names:
            got, expected = getattr(sample, name), getattr(known, name)
            if expected is None or name == "degrees_of_freedom":
                assert got == expected, (t, name)
            else:
                assert got.dtype == np.float32, name
                np.testing.assert_allclose(got, expected[0], rtol=1e-4, atol=1e-7, err_msg=name)
    for name, value in vars(statistics.summary()).items():
        np.testing.assert_array_equal(value, getattr(whole, name))


def test_ten_are_yielded_at_a_time_and_no_masks_are_held_between_the_steps():
    *_, steps = stream(30, "stratified")
    assert [len(step) for step in (next(steps), next(steps))] == [10, 10]
    assert not [
        value for value in steps.gi_frame.f_locals.values() if isinstance(value, ScaledMasks)
    ]
    assert [sample.t for sample in next(steps)] == list(range(21, 31))
