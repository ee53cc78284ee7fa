"""The command line, end to end: real training of two epochs, and a stub of the service."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer.main

from dropserve.models import checkpoint, recipes
from dropserve.models.data import load_dataset
from dropserve.models.hyperparameters import Recipe
from dropserve.models.training import fit, with_threads
from dropserve.service.cli import train as training_commands
from dropserve.service.cli.main import app

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def train(run):
    def train(root, *options):
        return run("train", "--epochs", 2, "--samples", 10, "--checkpoints", root, *options)

    return train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return root, train(root)


def test_train_saves_a_version_and_says_how_good_it_is(trained):
    root, result = trained
    assert result.exit_code == 0, result.output
    assert "epoch 1/2: loss" in result.stdout
    assert "epoch 2/2: loss" in result.stdout
    assert "eval mode" in result.stdout
    assert "Monte Carlo dropout, T = 10" in result.stdout
    assert f"next: dropserve serve --checkpoints {root}" in result.stdout
    assert sorted(path.name for path in (root / "digits-mlp").iterdir()) == ["1"]


def test_the_checkpoint_says_where_it_comes_from(trained):
    _, metadata = checkpoint.load(trained[0] / "digits-mlp" / "1")
    digits = load_dataset("digits", Path("none"))
    assert metadata.data == {
        "name": "digits", "digest": digits.digest(), "train": 1437, "test": 360,
    }  # fmt: skip
    assert (metadata.recipe["epochs"], metadata.recipe["seed"]) == (2, 0)
    assert metadata.evaluation["images"] == 360
    assert metadata.evaluation["eval"]["accuracy"] > 0.8
    assert metadata.evaluation["dropout"]["samples"] == 10


def test_evaluate_finds_the_figures_of_the_checkpoint(run, trained):
    root, _ = trained
    result = run(
        "evaluate", "--name", "digits-mlp", "--checkpoints", root, "--samples", 0, "--json"
    )
    assert result.exit_code == 0, result.output
    _, metadata = checkpoint.load(root / "digits-mlp" / "1")
    assert json.loads(result.stdout)["eval"] == pytest.approx(metadata.evaluation["eval"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "digits-mpl"], "there are digits-mlp; did you mean digits-mlp?"),
        (["--name", "digits-mlp", "--version", 7], "there are 1"),
        (["--name", "digits-mlp", "--dataset", "nothing"], "no dataset 'nothing'"),
    ],
)
def test_evaluate_says_what_is_not_there(run, trained, options, message):
    result = run("evaluate", "--checkpoints", trained[0], *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_if_missing_does_nothing_where_there_is_a_version(train, trained):
    result = train(trained[0], "--if-missing")
    assert result.exit_code == 0
    assert result.stdout == "digits-mlp has version 1 already: nothing to do\n"
    assert checkpoint.versions(trained[0], "digits-mlp") == [1]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """What a run of two epochs leaves behind that was stopped after its first."""
    root = tmp_path_factory.mktemp("interrupted")
    data = load_dataset("digits", Path("none"))
    normalize = data.preprocessing.normalize
    plan = recipes.plan("digits", "mlp", Path("none"), recipe={"epochs": 2})
    state = root / "digits-mlp" / ".training" / "state.safetensors"
    options = {"state_path": state, "description": plan.description() | {"on": ["32-true", 1]}}
    recipe = with_threads(plan.recipe, plan.module, normalize(data.train.images[:1]))
    epochs = fit(plan.module, data.train, normalize, recipe, **options)
    next(epochs)
    epochs.close()
    return root


@pytest.fixture
def stopped(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "stopped")


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(train, stopped, trained):
    result = train(stopped, "--resume")
    assert result.exit_code == 0, result.output
    assert "epoch 1/2" not in result.stdout
    assert "epoch 2/2" in result.stdout
    ended, unbroken = (
        checkpoint.load(root / "digits-mlp" / "1")[1].sha256 for root in (stopped, trained[0])
    )
    assert ended == unbroken
    assert not (stopped / "digits-mlp" / ".training").exists()


def test_restart_begins_anew(train, stopped):
    result = train(stopped, "--restart", "--seed", 1)
    assert result.exit_code == 0, result.output
    assert "epoch 1/2" in result.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], ["interrupted after epoch 1", "--resume", "--restart"]),
        (["--resume", "--seed", 1], ["another network, recipe", "(seed was 0, now is 1)"]),
    ],
    ids=["unasked", "with other options"],
)
def test_an_interrupted_run_is_neither_lost_nor_continued(train, stopped, options, told):
    result = train(stopped, *options)
    assert result.exit_code == 2
    assert all(text in result.stderr for text in told)
    assert (stopped / "digits-mlp" / ".training" / "state.safetensors").exists()
    assert checkpoint.versions(stopped, "digits-mlp") == []


def test_resuming_where_nothing_was_interrupted_says_so_and_trains(train, tmp_path):
    (tmp_path / "fresh").mkdir()
    checkpoint.pin(tmp_path, "fresh", 7)
    result = train(tmp_path, "--resume", "--name", "fresh", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "no interrupted run of fresh to resume: a new one begins\n" in result.stdout
    assert "epochs done before" not in result.stdout
    assert "1,437 images to train on, 360 to test on" in result.stdout
    assert checkpoint.versions(tmp_path, "fresh") == [1]
    assert "version 7 is pinned: to let the new one answer, dropserve pin fresh" in result.stdout


def test_a_run_of_other_processes_is_refused_with_their_number(train, tmp_path):
    data = load_dataset("digits", Path("none"))
    plan = recipes.plan("digits", "mlp", Path("none"), recipe={"epochs": 2})
    state = tmp_path / "digits-mlp" / ".training" / "state.safetensors"
    made_with = plan.description() | {"on": ["32-true", 2]}
    recipe = replace(plan.recipe, threads=1)
    run = partial(fit, state_path=state, description=made_with)
    next(run(plan.module, data.train, data.preprocessing.normalize, recipe))
    result = train(tmp_path, "--resume", "--threads", 1)
    assert result.exit_code == 2
    assert "[precision, processes] was ['32-true', 2], now is ['32-true', 1]" in result.stderr
    assert "resume it with the options it was started with" in result.stderr
    assert state.exists()


def test_the_former_name_of_the_device_is_an_option_too(train, tmp_path):
    for option in ("--device", "--accelerator"):
        result = train(tmp_path, option, "cuda")
        assert result.stderr.startswith("error: no GPU for the device cuda: ")


@pytest.mark.slow
def test_two_processes_share_the_work_and_save_one_version(tmp_path):
    command = [Path(sys.executable).with_name("dropserve"), "train", "--devices", "2"]
    command += ["--epochs", "4", "--samples", "0", "--checkpoints", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "processes: 2" in done.stdout
    assert done.stdout.count("epoch 4/4") == 1
    assert [f.name for f in (tmp_path / "digits-mlp").iterdir()] == ["1"]
    _, metadata = checkpoint.load(tmp_path / "digits-mlp" / "1")
    assert metadata.evaluation["eval"]["accuracy"] > 0.85


def test_every_field_of_a_recipe_is_an_option():
    options = {p.name for p in typer.main.get_command(app).get_command(None, "train").params}
    assert {field.name for field in fields(Recipe)} - options == {"validation_share"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nothing"], "no dataset 'nothing'"),
        (["--network", "resnet"], "network must be mlp, cnn"),
        (["--network", "torch.nn:Flatten"], "calls no dropout"),
        (["--network", "torch.nn:Dropout"], "logits [B, C]"),
        (["--network", "torch.nn:GRU"], "GRU: TypeError"),
        (["--network", "none.such:factory"], "No module named 'none'"),
        (["--network", "torch.nn:Flatten", "--hidden", "3"], "for a factory use arguments"),
        (["--network-arguments", "{}"], "arguments are for a factory"),
        (
            ["--network-arguments", "3"],
            '--network-arguments: must be a JSON object, as {"a": 1}',
        ),
        (["--hidden", "many"], "--hidden: must be numbers with commas between them"),
        (["--epochs", "many"], "--epochs: must be a valid integer"),
        (["--optimizer", "adam"], "--optimizer: 'adam' is not one of 'adamw', 'sgd'"),
        (["--threads", "0"], "threads must be 1 to 256"),
        (["--hidden", "64"], "one rate a hidden layer"),
        (["--regularizer", "zoneout"], "mlp can have regularizer dropout, vanilla, gaussian"),
        (["--learning-rate", "-1"], "learning_rate must be in"),
        (["--name", "a/b"], "'a/b' cannot name a model"),
        (["--resume", "--restart"], "not both"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(train, tmp_path, options, message):
    result = train(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_ones_own_is_built_from_its_arguments(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n"
        "def small(width):\n"
        "    head = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.3))\n"
        "    return nn.Sequential(nn.Flatten(), *head, nn.Linear(width, 10))\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = ["--network", "own_network:small", "--network-arguments", '{"width": 32}']
    result = train(tmp_path / "models", *options)
    assert result.exit_code == 0, result.output
    module, metadata = checkpoint.load(tmp_path / "models" / "digits-small" / "1", None)
    assert metadata.network.arguments == {"width": 32}
    assert module(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(program, tmp_path):
    command = [*program, "train", "--epochs", "100000", "--checkpoints", tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdout.readline().startswith("digits: ")
        assert process.stdout.readline().startswith("epoch 1/100000: loss")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted: --resume continues\n"
    assert (tmp_path / "digits-mlp" / ".training" / "state.safetensors").exists()


def test_the_help_of_train_says_what_the_recipes_are(run):
    told = " ".join(re.sub("[│ ]+", " ", run("train", "--help", COLUMNS="200").stdout).split())
    assert "Most epochs. [default: (20; digits 60; fashion-mnist mlp 30;" in told
    assert "[default: (0.02; fashion-mnist cnn 0.05; fashion-mnist wrn 0.05;" in told
    assert (
        "Augment: mirror half. [default: (off; fashion-mnist cnn on; fashion-mnist wrn on;" in told
    )


@pytest.mark.parametrize(
    ("eval_mode", "dropout", "images", "told"),
    [
        ((0.3, 0.03), (0.2, 0.02), 5000, ["have lower NLL and ECE than"]),
        ((0.2, 0.02), (0.3, 0.03), 5000, ["have higher NLL and ECE than", "take eval mode's"]),
        ((0.3, 0.02), (0.2, 0.03), 5000, ["have lower NLL, higher ECE than", "take eval mode's"]),
        ((0.3, 0.02), (0.2, 0.01), 360, ["have lower NLL and ECE than", "360 images are few"]),
    ],
)
def test_a_hint_says_whether_monte_carlo_dropout_made_the_probabilities_better(
    capsys, eval_mode, dropout, images, told
):
    rest = {"accuracy": 0.9, "brier": 0.1}
    scores = [rest | dict(zip(("nll", "ece"), pair, strict=True)) for pair in (eval_mode, dropout)]
    training_commands.show_scores({"images": images, "eval": scores[0], "dropout": scores[1]})
    *_, hint = capsys.readouterr().out.splitlines()
    assert hint.startswith("hint: Monte Carlo dropout's probabilities have ")
    assert all(text in hint for text in told)
    assert ("take eval mode's" in hint) == ("higher" in told[0])
    assert ("few" in hint) == (images < 1000)


def test_of_many_classes_the_worst_pairs_are_shown(capsys):
    counts = [[9 if i == k else 0 for k in range(40)] for i in range(40)]
    counts[3][5], counts[7][1] = 1, 3
    training_commands.show_confusion(counts, [f"class {k}" for k in range(40)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert rows == [
        ["class", "7", "class", "1", "3", "25.0%"], ["class", "3", "class", "5", "1", "10.0%"],
    ]  # fmt: skip
