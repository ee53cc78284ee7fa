"""float32 or bfloat16: what is taken, and that it computes what it says."""

import time

import pytest
import torch
from torch import nn

from models.montecarlo import Sampler
from models.montecarlo.precision import MAX_ERROR, choose

EXACT = torch.full((2, 3), 1 / 3)


def fake(slow, off):
    """Return an `at` whose bfloat16 takes `slow` times as long and is `off`, and its switches."""
    chosen = []

    def at(dtype):
        chosen.append(dtype)
        low = dtype == torch.bfloat16

        def run():
            time.sleep(0.002 * (slow if low else 1))
            return EXACT + off if low else EXACT

        return run

    return at, chosen


@pytest.mark.parametrize(
    ("asked", "slow", "off", "expected"),
    [
        ("auto", 0.2, MAX_ERROR / 2, "bfloat16"),
        ("auto", 0.2, MAX_ERROR * 2, "float32"),
        ("auto", 3.0, 0.0, "float32"),
        ("bfloat16", 3.0, 0.1, "bfloat16"),
    ],
)
def test_bfloat16_is_taken_if_it_pays_or_is_asked_for(asked, slow, off, expected):
    at, chosen = fake(slow, off)
    choice = choose(asked, at)
    assert choice.dtype == expected
    assert chosen[-1] == getattr(torch, expected)
    assert choice.error == pytest.approx(off, abs=1e-6)
    assert (choice.speedup > 1) == (slow < 1)


def test_float32_measures_nothing():
    assert choose("float32", lambda _: pytest.fail("measured")).speedup is None


@pytest.mark.parametrize("path", ["folded", "vmap", "loop"])
def test_bfloat16_answers_hardly_differ(path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.25),
        nn.Linear(288, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    x = torch.randn(6, 1, 8, 8)
    exact, rough = Sampler(module, x), Sampler(module, x, "bfloat16")
    assert (exact.precision.dtype, rough.precision.dtype) == ("float32", "bfloat16")
    exact.path = rough.path = path
    gap = (exact.summarize(x, 50).mean - rough.summarize(x, 50).mean).abs().max()
    assert 0 < gap < 0.01
    assert all(p.dtype == torch.float32 for p in module.parameters())
