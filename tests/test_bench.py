"""`python -m bench.engine --quick`: what it writes, and the figures that no clock decides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_network_is_timed_in_every_way(result):
    paths = {r["network"]: r["path"] for r in result["engine"]}
    assert paths == {"mlp": "folded", "cnn": "folded", "residual": "vmap", "encoder": "vmap"}
    for r in result["engine"]:
        times = r["microseconds"]
        assert set(times) == {*result["contenders"], "ours_fifth", "ours_summary_fifth"}
        assert min(times.values()) > 0
        assert 0 < r["gap"] < 0.05  # the loop and ours say the same, but for chance
        assert r["ratios"]["loop/ours"] == pytest.approx(times["loop"] / times["ours"])


def test_ten_stratified_samples_beat_ten_independent_ones_and_more_beat_fewer(result):
    for study in result["efficiency"]:
        rmse = {(r["masks"], r["samples"]): r["rmse"]["mean"] for r in study["rows"]}
        assert rmse["stratified", 10] < 0.7 * rmse["independent", 10]
        assert rmse["stratified", 50] < 0.7 * rmse["independent", 50]
        assert rmse["independent", 50] < 0.7 * rmse["independent", 10]


def test_the_reported_error_of_independent_samples_is_about_the_true_one(result):
    for study in result["efficiency"]:
        found = row({"rows": study["rows"]}, "rows", masks="independent", samples=10)
        assert found["reported/true"] == pytest.approx(1, abs=0.3)
        stratified = row({"rows": study["rows"]}, "rows", masks="stratified", samples=10)
        assert stratified["reported/true"] is None  # one block says nothing of its own error


def test_a_thousand_samples_stay_within_the_memory_that_is_claimed(result):
    found = row(result, "memory", network="cnn", samples=1000, batch=64)
    assert 1 < found["mib"]["ours_summary"] < 600


def test_training_is_measured_beside_plain_loops(result):
    for r in result["training"]:
        assert set(r["images_per_second"]) == {"fit", "dataloader", "dataloader_batches"}
        assert min(r["images_per_second"].values()) > 0


def test_every_claim_says_whether_it_is_met(result):
    assert len(result["claims"]) >= 10
    for claim in result["claims"]:
        above = claim["measured"] >= claim["target"]
        assert claim["met"] is (above if claim["relation"] == ">=" else not above)
        assert claim["text"]
