"""The benchmarks: what `python -m bench.engine --quick` writes, figures that no clock decides, and
whether what does not measure the same, or answers wrong, is found out."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench import bulk, engine, timing
from bench.http import __main__ as http
from bench.http import reference
from bench.networks import with_dropout
from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from tests.helpers import encode, noise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "results" / "engine.json"
    command = [sys.executable, "-W", "error", "-m", "bench.engine", "--quick"]
    command += ["--json", str(path), "--cache", str(folder / "cache")]
    environment = {**os.environ, "DROPSERVE_DATA_DIR": str(folder)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads(path.read_text())


def row(result, part, **wanted):
    return next(r for r in result[part] if wanted.items() <= r.items())


@pytest.mark.slow
def test_every_network_is_timed_in_every_way(result):
    paths = {r["network"]: r["path"] for r in result["engine"]}
    assert paths == {"mlp": "folded", "cnn": "folded", "residual": "vmap", "encoder": "vmap"}
    for r in result["engine"]:
        times = r["microseconds"]
        assert set(times) == {*result["contenders"], "ours_fifth", "ours_summary_fifth"}
        assert min(times.values()) > 0
        assert 0 < r["gap"] < 4 * r["chance"] < 0.1  # the loop and ours say the same
        assert r["ratios"]["loop/ours"] == pytest.approx(times["loop"] / times["ours"])


@pytest.mark.slow
def test_ten_stratified_samples_beat_ten_independent_ones_and_more_beat_fewer(result):
    for study in result["efficiency"]:
        rmse = {(r["masks"], r["samples"]): r["rmse"]["mean"] for r in study["rows"]}
        assert rmse["stratified", 10] < 0.7 * rmse["independent", 10]
        assert rmse["stratified", 50] < 0.7 * rmse["independent", 50]
        assert rmse["independent", 50] < 0.7 * rmse["independent", 10]


@pytest.mark.slow
def test_the_reported_error_of_independent_samples_is_about_the_true_one(result):
    for study in result["efficiency"]:
        found = row({"rows": study["rows"]}, "rows", masks="independent", samples=10)
        assert found["reported/true"] == pytest.approx(1, abs=0.3)
        stratified = row({"rows": study["rows"]}, "rows", masks="stratified", samples=10)
        assert stratified["reported/true"] is None  # one block says nothing of its own error


@pytest.mark.slow
def test_a_thousand_samples_stay_within_the_memory_that_is_claimed(result):
    found = row(result, "memory", network="cnn", samples=1000, batch=64)
    assert 1 < found["mib"]["ours_summary"] < 600


@pytest.mark.slow
def test_training_is_measured_beside_plain_loops(result):
    for r in result["training"]:
        assert set(r["images_per_second"]) == {"fit", "dataloader", "dataloader_batches"}
        assert min(r["images_per_second"].values()) > 0


@pytest.mark.slow
def test_every_claim_says_whether_it_is_met(result):
    assert len(result["claims"]) >= 10
    for claim in result["claims"]:
        above = claim["measured"] >= claim["target"]
        assert claim["met"] is (above if claim["relation"] == ">=" else not above)
        assert claim["text"]


@pytest.mark.parametrize("main", [engine.main, http.main])
def test_a_part_does_not_overwrite_the_results_of_the_whole(main, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "memory" if main is engine.main else "loop"])
    assert "--json" in capsys.readouterr().err


def module(p):
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 4)
    with torch.no_grad():
        layers[3].weight.mul_(20)  # so sure of itself that dropout moves its mean
    return nn.Sequential(*layers).eval()


X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def test_contenders_that_measure_the_same_are_apart_by_chance():
    calls = timing.contenders(module(0.5), X, 100)
    gap, chance = timing.compare(calls, with_dropout(module(0.5)), X, 100)
    assert 0.5 * chance < gap < 1.5 * chance


@pytest.mark.parametrize("name", ["loop", "fold", "ours", "ours_new_seed"])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_a_contender_that_drops_at_another_rate_is_found_out(name, p):
    calls = timing.contenders(module(0.5), X, 100)
    calls[name] = timing.contenders(module(p), X, 100)[name]
    with pytest.raises(RuntimeError, match="disagree"):
        timing.compare(calls, with_dropout(module(0.5)), X, 100)


def test_a_loop_without_dropout_is_found_out():
    with pytest.raises(RuntimeError, match="disagree"):
        timing.compare(timing.contenders(module(0.5), X, 100), module(0.5), X, 100)


def test_every_call_of_ours_with_a_new_seed_has_other_masks():
    call = timing.contenders(module(0.5), X, 20)["ours_new_seed"]
    assert not torch.equal(call(), call())


T = 100


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A checkpoint's module, pictures that it is unsure about [K, 1, 8, 8], and their answers."""
    torch.manual_seed(0)
    config = NetworkConfig("mlp", (1, 8, 8), 4, hidden=(32, 32), dropout=(0.2, 0.5))
    network, shown = config.build().eval(), Preprocessing((8, 8), 1, (0.5,), (0.1,))
    with torch.no_grad():
        network.logits.weight.mul_(20)
    metadata = checkpoint.Metadata("a", config, shown, tuple("abcd"))
    version = checkpoint.save(tmp_path_factory.mktemp("bench-http"), network, metadata)
    asked = reference.unsure(version, [encode(pixels) for pixels in noise(400, 8, 8)])
    pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(png)))) for png in asked]
    x = (torch.stack(pixels).float().div(255).unsqueeze(1) - 0.5) / 0.1
    return network, x, reference.expected(version, asked, T)


def answers(served, samples, rates=None, count=10):
    """Make `count` times the mean and variance [K, C] of so many passes, by PyTorch, at rates."""
    network, x, _ = served
    noisy = with_dropout(network)
    for layer, p in zip(filter(is_dropout, noisy.modules()), rates or (), strict=False):
        layer.p = p
    with torch.inference_mode():
        passes = [noisy(x.repeat(samples, 1, 1, 1)).softmax(-1) for _ in range(count)]
    drawn = torch.stack(passes).double().unflatten(1, (samples, -1)).numpy()
    return drawn.mean(1), drawn.var(1, ddof=1)


def is_dropout(layer):
    return "Dropout" in type(layer).__name__


def is_wrong(expected, mean, variance):
    try:
        expected.check_samples(mean, variance)
    except reference.WrongAnswer:
        return True
    return False


def test_a_right_server_is_not_called_wrong_in_ten_thousand_runs(served):
    mean, variance = answers(served, T, count=400)
    rng, pictures = np.random.default_rng(0), np.arange(mean.shape[1])
    for _ in range(10_000):  # each picture's answer is that of one of 400 requests
        drawn = rng.integers(0, len(mean), len(pictures))
        assert not is_wrong(served[2], mean[drawn, pictures], variance[drawn, pictures])


@pytest.mark.parametrize(
    ("samples", "rates"),
    [(T // 5, (0.2, 0.5)), (T, (0.1, 0.1)), (T, (0.5, 0.5)), (T, (0.2, 0)), (T, (0, 0.5))],
)
def test_a_server_with_a_fifth_of_the_passes_or_other_rates_is_found_out(served, samples, rates):
    runs = zip(*answers(served, samples, rates), strict=True)
    assert all(is_wrong(served[2], mean, variance) for mean, variance in runs)


def test_a_server_in_eval_mode_or_without_an_answer_is_found_out(served):
    network, x, expected = served
    with torch.inference_mode():
        plain = network(x).softmax(-1).double().numpy()
    expected.check_predictions(plain)
    nothing = np.full(plain.shape, np.nan)
    assert is_wrong(expected, plain, np.zeros(plain.shape))
    assert is_wrong(expected, expected.mean, nothing)
    for wrong in (expected.mean, nothing, plain[:, :3]):
        with pytest.raises(reference.WrongAnswer):
            expected.check_predictions(wrong)


def looks_at(images, actors, part, each, start, table):
    """Look at a run as often as the benchmark: actors do parts, and then a table is written."""
    for number in range(1000):
        clock = number * bulk._LOOK
        work = max(0, clock - start) / each  # of an actor, in images
        parts = actors * part * int(work / part)
        done = parts if work < images / actors else images - 1
        writing = min(table, max(0, clock - start - images * each / actors))
        written = images if writing == table else done
        processor = 3 * min(start, clock) + actors * each * min(work, images / actors) + writing
        yield bulk.Look(written, processor, clock)
        if writing == table:
            return


@pytest.mark.parametrize(("actors", "part"), [(1, 4096), (2, 4096), (2, 10)])
def test_bulk_scoring_counts_neither_the_start_nor_work_on_what_is_not_done(actors, part):
    looks = [*looks_at(100_000, actors, part, 150e-6, start=8, table=0.6)]
    processor, clock = bulk.per_image(looks, 100_000)
    assert processor == pytest.approx(156e-6, rel=0.01)
    assert clock == pytest.approx(150e-6 / actors + 6e-6, rel=0.02)
    with pytest.raises(SystemExit, match="give more"):
        bulk.per_image([*looks_at(1000, actors, 10, 150e-6, start=8, table=0.6)], 1000)


def test_bulk_scoring_meets_its_targets():
    result = json.loads(bulk.RESULT.read_text())
    rounds = {(row["engine"], row["mode"]): row["rounds"] for row in result["rows"]}
    each = {key: np.array([r["microseconds_per_image"] for r in of]) for key, of in rounds.items()}
    assert result["images"] == 100_000
    for mode in bulk.MODES:
        two, one = each["ray, 2 actors", mode], each["ray, 1 actor", mode]
        assert np.median(two / one) < 1 + bulk.TARGET_SCALING
        for name in ("ray, 1 actor", "ray, 2 actors"):
            assert np.median(each["http", mode] / each[name, mode]) > bulk.TARGET_SPEEDUP
