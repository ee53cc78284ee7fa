"""Experiments as they are run: interrupted, resumed, published; in the shortest form."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dropserve import lab
from dropserve.lab import experiments, page, runner
from dropserve.lab.experiment import terms
from dropserve.lab.results import RESULTS, read_document
from dropserve.lab.run import Run
from dropserve.models import checkpoint
from dropserve.models.errors import DataError
from dropserve.models.training import fit
from dropserve.service.client import DropserveClient
from tests.helpers import dropserve, encode, eventually, invoke

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DROPSERVE_DATA_DIR", ROOT.parent / "shared" / "data"))
NAME = "uncertainty"
LAB = [Path(sys.executable).with_name("dropserve"), "lab"]

needs_data = pytest.mark.skipif(
    not (DATA / "fashion-mnist").is_dir(), reason="Fashion-MNIST is not in DROPSERVE_DATA_DIR"
)


def command(folder, *options):
    quick = "--quick", "--processes", "1"  # leave a core to other tests, some of which time
    return [*LAB, "run", NAME, *quick, "--results", folder, "--data-dir", DATA, *options]


def done(folder):
    return {path.name for path in (folder / ".runs" / NAME).glob("*.json")}


def weights(version):
    return (version / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "results"
    subprocess.run(command(folder, "--png"), check=True, stdout=subprocess.DEVNULL)
    return folder


@needs_data
@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_with_the_same_results(unbroken, tmp_path):
    folder, finished = tmp_path / "results", set()
    for _ in range(2):
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL)
        eventually(lambda: len(done(folder)) > len(finished), 60)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / f"{NAME}.json").exists()
        kept = {name: (folder / ".runs" / NAME / name).stat().st_mtime_ns for name in done(folder)}
        assert finished <= kept.keys()
        finished = kept.keys()
    subprocess.run(command(folder), check=True, stdout=subprocess.DEVNULL)
    for name, when in kept.items():
        assert (folder / ".runs" / NAME / name).stat().st_mtime_ns == when
    first, second = (json.loads((f / f"{NAME}.json").read_text()) for f in (unbroken, folder))
    assert second["results"] == first["results"]
    assert second["measured"]["runs_before"] >= len(kept)
    models = folder.with_name("quick-checkpoints") / NAME
    assert {version.name for version in models.glob("*/[0-9]*")} == {"1"}
    for model in models.iterdir():
        other = unbroken.with_name("quick-checkpoints") / NAME / model.name
        assert weights(model / "1") == weights(other / "1")


@needs_data
@pytest.mark.slow
def test_an_interrupted_run_ends_at_once_and_says_how_it_continues(tmp_path):
    long = [*LAB, "run", "masks", "--results", tmp_path / "results", "--data-dir", DATA]
    process = subprocess.Popen(
        long, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    started = psutil.Process(process.pid)
    workers = eventually(lambda: computing(started), 60)
    refused = subprocess.run(long, capture_output=True, text=True, check=False)
    assert refused.stderr.startswith("error: another process runs masks into ")
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted: the same command continues with masks; what is done is kept\n"
    assert time.monotonic() - began < 5  # a run takes longer
    eventually(lambda: not any(worker.is_running() for worker in workers), 5)


def computing(process):
    """The processes that it has started for runs, once they have computed for some seconds."""
    children = process.children()
    busy = [child for child in children if child.cpu_times().user > 5]
    return children if busy else []


@needs_data
@pytest.mark.slow
def test_results_plots_and_versions_are_written(unbroken, make_server):
    document = json.loads((unbroken / f"{NAME}.json").read_text())
    experiment = experiments.load(NAME)
    assert document["results"]["quick"]
    with pytest.raises(
        DataError, match=r"uncertainty\.json is of the quick form: `dropserve lab run"
    ):
        page.refresh(unbroken)
    assert document["measured"]["processor_seconds"] > 0
    assert (unbroken / f"{NAME}.svg").read_text().startswith("<?xml")
    assert (unbroken / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    models = unbroken.with_name("quick-checkpoints") / NAME
    assert {p.name for p in models.iterdir()} == {runner.slug(s.label) for s in experiment.settings}
    model = runner.slug(experiment.settings[0].label)
    run = Run(experiment, experiment.settings[0], 0, DATA, quick=True)
    module, _ = checkpoint.load(models / model / "1")
    image = run.test.images[:1]
    with torch.inference_mode():
        wanted = module(run.normalize(image)).softmax(-1)[0].tolist()
    server = make_server(models, default_model=model).start()
    with DropserveClient(server.url) as client:
        got = client.predict(encode(image[0, 0].numpy()), model=model)
    assert got.predictions[0].probabilities == pytest.approx(wanted, abs=1e-6)


@needs_data
def test_a_run_trains_as_train_does():
    experiment = experiments.load(NAME)
    run = Run(experiment, experiment.settings[0], 3, DATA, quick=True)
    trained = run.train()
    module = run.build()
    for epoch in fit(module, run.train_images, run.normalize, run.recipe()):  # noqa: B007
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert epoch.number == len(run.curves["accuracies"])
    assert all(torch.equal(weights[n], t) for n, t in trained.state_dict().items())


@needs_data
def test_measures_at_epochs_leave_the_training_as_it_is():
    experiment = experiments.load("stability")
    run = Run(experiment, experiment.settings[1], 0, DATA, quick=True)
    experiment.measure(run)
    watched = run.module.state_dict()
    plain = run.train().state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in watched.items())


@needs_data
@pytest.mark.slow
def test_runs_are_kept_by_what_they_were_made_with_and_can_be_discarded(unbroken, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(unbroken, folder)
    before = done(folder)
    subprocess.run(command(folder, "--seeds", "1"), check=True, stdout=subprocess.DEVNULL)
    assert done(folder) == before  # one seed is among them
    document = json.loads((folder / f"{NAME}.json").read_text())
    assert document["results"]["seeds"] == 1
    assert document["measured"]["runs_before"] == len(before) // 2
    estimates = document["results"]["estimates"].values()
    assert all(half is None for _, half in estimates)  # one seed has no interval
    subprocess.run(
        command(folder, "--seeds", "1", "--restart"), check=True, stdout=subprocess.DEVNULL
    )
    assert len(done(folder)) == len(before) // 2


def test_what_is_missing_is_told_before_the_first_run(tmp_path, monkeypatch):
    asked = ("lab", "run", NAME, "--results", tmp_path / "results")
    damaged = tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    damaged.parent.mkdir()
    damaged.write_bytes(b"nothing")
    told = invoke(*asked, "--data-dir", tmp_path)
    assert told.exit_code == 2
    assert told.stderr.startswith(f"error: {damaged}: not an IDX file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dropserve.lab.plots", raising=False)
    monkeypatch.delattr(lab, "plots", raising=False)
    told = invoke(*asked)
    assert (told.exit_code, told.stderr) == (
        2, "error: the lab needs matplotlib: install dropserve[lab]\n",
    )  # fmt: skip
    assert not (tmp_path / "results").exists()


def test_the_list_has_every_question():
    shown = " ".join(dropserve("lab", "list").split())
    for name in experiments.NAMES:
        assert name in shown


def test_an_unknown_experiment_is_refused():
    told = invoke("lab", "run", "luck")
    assert told.exit_code == 2
    assert told.stderr.startswith("error: no experiment luck: there are accuracy, rates")


@pytest.mark.parametrize("name", experiments.NAMES)
def test_a_declaration_is_complete(name):
    experiment = experiments.load(name)
    assert len(experiment.setup) == 3
    assert experiment.question.endswith("?")
    labels = {setting.label for setting in experiment.settings}
    assert len({runner.slug(label) for label in labels}) == len(labels)
    for part in (*experiment.tables, *experiment.panels):
        for expression in experiment.rows(part.rows).values():
            assert {label for label, _ in terms(expression)} <= labels
    runs = read_document(RESULTS / f"{name}.json").runs
    for column in {column for table in experiment.tables for column in table.columns}:
        assert any(runs[label][0].get(column) is not None for label in labels), column
    for panel in experiment.panels:
        measures = (panel.y,) if isinstance(panel.y, str) else panel.y
        named = {key for setting in experiment.settings for key in setting.values}
        measured = {key for label in labels for key in runs[label][0]}
        assert {*measures, *filter(None, (panel.series,))} <= measured | named
        assert panel.x is None or panel.x in measured | named
