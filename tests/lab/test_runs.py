"""Experiments as they are run: interrupted, resumed, published; in the shortest form."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dropserve.lab import experiments, runner
from dropserve.lab.experiment import terms
from dropserve.lab.run import Run
from dropserve.models import checkpoint
from dropserve.models.training import fit
from dropserve.service.client import DropserveClient
from tests.helpers import encode, eventually

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DROPSERVE_DATA_DIR", ROOT.parent / "shared" / "data"))
NAME = "averaging"
LAB = [Path(sys.executable).with_name("dropserve"), "lab"]

needs_data = pytest.mark.skipif(
    not (DATA / "fashion-mnist").is_dir(), reason="Fashion-MNIST is not in DROPSERVE_DATA_DIR"
)


def command(folder, *options):
    return [*LAB, "run", NAME, "--quick", "--results", folder, "--data-dir", DATA, *options]


def done(folder):
    return {path.name for path in (folder / ".runs" / NAME).glob("*.json")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "results"
    subprocess.run(command(folder, "--png"), check=True, stdout=subprocess.DEVNULL)
    return folder


@needs_data
def test_a_run_that_is_killed_twice_ends_with_the_same_results(unbroken, tmp_path):
    folder, finished = tmp_path / "results", set()
    for _ in range(2):
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL)
        eventually(lambda: len(done(folder)) > len(finished), seconds=60)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / f"{NAME}.json").exists()
        kept = {name: (folder / ".runs" / NAME / name).stat().st_mtime_ns for name in done(folder)}
        assert finished <= kept.keys()
        finished = kept.keys()
    time.sleep(0.5)  # of processes that end without the one that started them
    subprocess.run(command(folder), check=True, stdout=subprocess.DEVNULL)
    for name, when in kept.items():
        assert (folder / ".runs" / NAME / name).stat().st_mtime_ns == when
    first, second = (json.loads((f / f"{NAME}.json").read_text()) for f in (unbroken, folder))
    assert second["results"] == first["results"]
    assert second["measured"]["runs_before"] >= len(kept)


@needs_data
def test_an_interrupted_run_says_how_it_continues(tmp_path):
    folder = tmp_path / "results"
    process = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    eventually(lambda: done(folder), seconds=60)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == f"interrupted: the same command continues with {NAME}; what is done is kept\n"


@needs_data
def test_results_plots_and_versions_are_written(unbroken, make_server):
    document = json.loads((unbroken / f"{NAME}.json").read_text())
    experiment = experiments.load(NAME)
    assert document["results"]["quick"]
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


def test_an_unknown_experiment_is_refused():
    told = subprocess.run([*LAB, "run", "luck"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
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
