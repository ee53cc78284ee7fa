"""Streaming: what it holds between its steps. What it says: tests/service/http/test_stream.py."""

import torch
from torch import nn

from dropserve.models.montecarlo import Sampler, Statistics, stream_samples
from dropserve.models.montecarlo.scaled_masks import ScaledMasks


def test_no_masks_are_held_between_the_steps():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    x = torch.ones(1, 4)
    steps = stream_samples(
        Sampler(module, x), x, 30, 7, "stratified", Statistics(30, "stratified", 0.9)
    )
    assert [len(step) for step in (next(steps), next(steps))] == [10, 10]
    assert not [
        value for value in steps.gi_frame.f_locals.values() if isinstance(value, ScaledMasks)
    ]
    assert [sample.t for sample in next(steps)] == list(range(21, 31))
