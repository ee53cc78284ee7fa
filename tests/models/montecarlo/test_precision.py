"""float32 or bfloat16: what is taken, and that it computes what it says."""

import pytest
import torch
from torch import nn

from dropserve.models.dropout import SpatialDropout
from dropserve.models.errors import UnsupportedModule
from dropserve.models.montecarlo import Sampler
from dropserve.models.montecarlo.sampler import (
    BATCHES,
    MAX_ERROR,
    MIN_SPEEDUP,
    Choice,
    choose_precision,
)

EXACT = torch.full((2, 3), 1 / 3)


class Machine:
    """Computes in both precisions by a clock of its own."""

    def __init__(self, speedups, off=0.0):
        self.speedups, self.off, self.now, self.runs = speedups, off, 0.0, []

    def run(self, dtype, images):
        self.runs.append((dtype, images))
        low = dtype == torch.bfloat16
        self.now += 1 / self.speedups[images] if low else 1.0
        return EXACT + self.off if low else EXACT

    def choose(self, asked):
        return choose_precision(asked, self.run, native=True, clock=lambda: self.now)


@pytest.mark.parametrize(
    ("asked", "speedups", "off", "expected"),
    [
        ("auto", (3.0, 2.0, 5.0), MAX_ERROR / 2, "bfloat16"),
        ("auto", (3.0, 3.0, MIN_SPEEDUP + 0.01), 0.0, "bfloat16"),
        ("auto", (3.0, 3.0, MIN_SPEEDUP - 0.01), 0.0, "float32"),
        ("auto", (3.0, 1.0, 3.0), 0.0, "float32"),
        ("auto", (0.5, 3.0, 3.0), 0.0, "float32"),
        ("auto", (3.0, 3.0, 3.0), MAX_ERROR * 2, "float32"),
        ("auto", (3.0, 3.0, 3.0), float("nan"), "float32"),
        ("bfloat16", (0.5, 0.4, 0.6), 0.1, "bfloat16"),
        ("bfloat16", (3.0, 3.0, 3.0), float("nan"), "bfloat16"),
    ],
)
def test_bfloat16_is_taken_if_it_pays_at_every_batch_or_is_asked_for(
    asked, speedups, off, expected
):
    machine = Machine(dict(zip(BATCHES, speedups, strict=True)), off)
    choice = machine.choose(asked)
    assert choice.dtype == expected
    tried = {images for _, images in machine.runs}
    assert choice.speedup == pytest.approx(min(machine.speedups[images] for images in tried))
    assert choice.error == pytest.approx(off, abs=1e-6, nan_ok=True)
    if expected == "bfloat16":
        assert tried == set(BATCHES)


@pytest.mark.parametrize("slow", range(12))
def test_one_slow_run_decides_nothing_because_the_precisions_take_turns(slow):
    machine = Machine(dict.fromkeys(BATCHES, 1.0))
    run = machine.run

    def run_with_a_pause(dtype, images):
        machine.now += 50.0 * (len(machine.runs) == slow)
        return run(dtype, images)

    machine.run = run_with_a_pause
    assert machine.choose("auto").dtype == "float32"
    turns = [dtype for dtype, _ in machine.runs]
    assert turns == [torch.float32, torch.bfloat16] * (len(turns) // 2)


@pytest.mark.parametrize(("asked", "native"), [("float32", True), ("auto", False)])
def test_nothing_is_measured_for_float32_or_where_bfloat16_cannot_pay(asked, native):
    choice = choose_precision(asked, lambda *_: pytest.fail("measured"), native=native)
    assert choice == Choice("float32", None, None)


def test_auto_never_measures_on_a_processor_without_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    module, x = NETWORKS["mlp"]().eval(), torch.randn(6, 1, 8, 8)
    assert Sampler(module, x, "auto").precision == Choice("float32")


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


def test_auto_takes_float32_where_a_module_cannot_compute_in_bfloat16(monkeypatch):
    class Scale(nn.Module):
        by = torch.ones(5)  # neither parameter nor buffer

        def forward(self, x):
            return x * self.by

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), Scale(), nn.Linear(5, 3)).eval()
    x = torch.randn(4, 6)
    sampler = Sampler(module, x, "auto")
    assert sampler.precision == Choice("float32")
    assert torch.equal(sampler.sample(x, 5), Sampler(module, x).sample(x, 5))
    with pytest.raises(UnsupportedModule, match="cannot compute in bfloat16"):
        Sampler(module, x, "bfloat16")


def test_a_single_thinned_network_is_computed_in_float32():
    module, x = NETWORKS["mlp"]().eval(), torch.randn(6, 1, 8, 8)
    exact, rough = Sampler(module, x), Sampler(module, x, "bfloat16")
    for t in range(3):
        got = rough.thinned(x, 4, "independent", t)
        assert got.dtype == torch.float32
        assert torch.equal(got, exact.thinned(x, 4, "independent", t))
