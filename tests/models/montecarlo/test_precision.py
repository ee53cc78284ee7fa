"""float32 or bfloat16: what is taken, and that it computes what it says."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from dropserve.models.dropout import SpatialDropout
from dropserve.models.montecarlo import Sampler
from dropserve.models.montecarlo.precision import MAX_ERROR, Choice, choose

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
        ("auto", 3.0, MAX_ERROR * 2, "float32"),
        ("auto", 0.2, float("nan"), "float32"),
        ("bfloat16", 3.0, 0.1, "bfloat16"),
    ],
)
def test_bfloat16_is_taken_if_it_pays_or_is_asked_for(asked, slow, off, expected):
    at, chosen = fake(slow, off)
    choice = choose(asked, at, native=True)
    assert choice.dtype == expected
    assert chosen[-1] == getattr(torch, expected)
    assert choice.error == pytest.approx(off, abs=1e-6, nan_ok=True)
    assert (choice.speedup > 1) == (slow < 1)


@pytest.mark.parametrize(("asked", "native"), [("float32", True), ("auto", False)])
def test_nothing_is_measured_for_float32_or_where_bfloat16_cannot_pay(asked, native):
    choice = choose(asked, lambda _: pytest.fail("measured"), native=native)
    assert choice == Choice("float32", None, None)


NETWORKS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(48, 4),
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), SpatialDropout(0.1),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.25), nn.Linear(128, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4),
    ),
}  # fmt: skip


AUTOCAST = pytest.mark.xfail(raises=RuntimeError, reason="autocast passes by convolutions in vmap")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("mlp", "folded"), ("mlp", "vmap"), ("mlp", "loop"),
        ("cnn", "folded"), pytest.param("cnn", "vmap", marks=AUTOCAST), ("cnn", "loop"),
    ],
)  # fmt: skip
def test_bfloat16_answers_hardly_differ(name, path):
    module, x = NETWORKS[name]().eval(), torch.randn(6, 1, 8, 8)
    exact, rough = Sampler(module, x), Sampler(module, x, "bfloat16")
    assert exact.precision == Choice("float32")
    assert rough.precision.dtype == "bfloat16"
    assert 0 < rough.precision.error < 0.02
    assert rough.precision.speedup > 0
    assert exact.path == rough.path == "folded"
    exact.path = rough.path = path
    gap = (exact.summarize(x, 50).mean - rough.summarize(x, 50).mean).abs().max()
    assert 0 < gap < 0.02
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_auto_takes_float32_where_a_module_cannot_compute_in_bfloat16():
    class Scale(nn.Module):
        by = torch.ones(5)  # neither parameter nor buffer

        def forward(self, x):
            return x * self.by

    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), Scale(), nn.Linear(5, 3)).eval()
    x = torch.randn(4, 6)
    sampler = Sampler(module, x)
    exact = sampler.sample(x, 5)
    assert choose("auto", partial(sampler._at, x), native=True).dtype == "float32"
    assert torch.equal(sampler.sample(x, 5), exact)


def test_a_single_thinned_network_is_computed_in_float32():
    module, x = NETWORKS["mlp"]().eval(), torch.randn(6, 1, 8, 8)
    exact, rough = Sampler(module, x), Sampler(module, x, "bfloat16")
    for t in range(3):
        got = rough.thinned(x, 4, "independent", t)
        assert got.dtype == torch.float32
        assert torch.equal(got, exact.thinned(x, 4, "independent", t))
