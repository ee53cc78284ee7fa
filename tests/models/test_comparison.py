"""Train mode beside eval mode, a pass a step."""

import pytest
import torch
from torch import nn

from bench import training_mode
from dropserve.models.comparison import compare
from dropserve.models.montecarlo import Sampler
from dropserve.models.regularizers import DropConnect


def run(steps):
    """Return how many steps there were, and what they came to."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return count, end.value
        count += 1


def test_images_are_not_overwritten_and_eval_is_the_same_twice():
    module = nn.Sequential(nn.LeakyReLU(inplace=True), nn.Dropout(0.5), nn.Linear(9, 3)).eval()
    x = torch.randn(4, 9)
    before = x.clone()
    _, found = run(compare(module, Sampler(module, x), x, passes=3, seed=5))
    assert torch.equal(x, before)
    expected = module(x.clone()).softmax(-1)
    for row in found.eval:
        assert torch.equal(row, expected)
    assert found.train.shape == (3, 4, 3)
    assert [layer.name for layer in found.layers] == ["0", "1", "2"]


def test_between_passes_nothing_watches_the_module():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(9, 3)).eval()
    x = torch.randn(4, 9)
    steps, between = compare(module, Sampler(module, x), x, passes=3), 0
    for _ in steps:
        between += 1
        assert not torch.is_inference_mode_enabled()
        assert not any(leaf._forward_hooks for leaf in module)
    assert between >= 4  # two in eval mode, three in train mode


def test_noise_on_weights_is_told_by_its_layer():
    module = nn.Sequential(DropConnect(9, 4, 0.5), nn.ReLU(), nn.Linear(4, 3)).eval()
    x = torch.randn(4, 9)
    for p, expected in ((None, 0.5), (0.25, 0.25)):
        _, found = run(compare(module, Sampler(module, x), x, passes=2, p=p))
        assert [layer.p for layer in found.layers] == [expected, None, None]


class DropPath(nn.Module):
    """Stochastic depth, whose rate has another name than p."""

    def forward(self, x):
        return training_mode.drop_path(x, 0.3, self.training)


class Switched(nn.Module):
    """Runs a dropout in train mode alone, and one at rate 0 in both modes."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.none = nn.Linear(9, 9), nn.AlphaDropout(0.25), nn.Dropout(0.0)
        self.path, self.last = DropPath(), nn.Linear(9, 3)
        self.last.p = 3.0  # of something else

    def forward(self, x):
        x = self.first(x)
        if self.training:
            x = nn.functional.dropout(self.drop(x), 0.5)
        return self.last(self.none(self.path(x)))


def test_layers_that_run_in_one_mode_are_left_out_and_rates_are_those_of_train_mode():
    module, x = Switched().eval(), torch.randn(4, 9)
    _, found = run(compare(module, Sampler(module, x), x, passes=3, p=0.75))
    assert [(layer.name, layer.p) for layer in found.layers] == [
        ("first", None), ("path", pytest.approx(0.3)), ("none", 0.0), ("last", None),
    ]  # fmt: skip
    assert found.distance().min() > 0
