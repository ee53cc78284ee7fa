"""The command line, end to end: real training of two epochs, and a stub of the service."""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from dropserve.models import catalogue, checkpoint, recipes
from dropserve.models.data import load_dataset
from dropserve.models.hyperparameters import Recipe
from dropserve.models.training import fit, with_threads
from dropserve.service.cli import train as training_commands
from dropserve.service.cli.main import app
from dropserve.service.settings import Settings, environment_name

ROOT = Path(__file__).parents[3]
PNG = b"\x89PNG\r\n\x1a\n picture"
MODEL = {
    "name": "pets", "version": 2, "versions": [1, 2], "default": True,
    "refused": [{"version": 3, "reason": "damaged"}],
    "changed": [], "pinned": 2, "pin_problem": None, "manifest_sha256": "a" * 64,
}  # fmt: skip
DETAILS = MODEL | {
    "classes": ["cat", "dog", "[b]owl"],
    "input": {
        "height": 8, "width": 8, "channels": 1, "mean": [0.5], "std": [0.5], "invert": False,
    },
    "training": False, "parameters": 10, "sites": [], "path": "vmap",
    "precision": {"dtype": "bfloat16", "speedup": 3.1, "error": 0.0004}, "network": {}, "data": {},
    "evaluation": {}, "sha256": "", "torch_version": "",
}  # fmt: skip
PREDICTED = {
    "model": "pets",
    "version": 2,
    "predictions": [
        {"label": "dog", "index": 1, "probability": 0.7, "probabilities": [0.1, 0.7, 0.2]}
    ],
}
UNCERTAIN = {
    "model": "pets", "version": 2, "method": "dropout", "samples": 50, "seed": 7,
    "masks": "stratified", "log_base": "e",
    "predictions": [{
        "label": "dog", "index": 1, "degrees_of_freedom": None,
        "mean": [0.1, 0.7, 0.2], "variance": [0.0, 0.01, 0.01],
        "standard_error": None, "predictive_entropy": 0.802, "expected_entropy": 0.7,
        "mutual_information": 0.102, "variation_ratio": 0.04,
        "interval": {"level": 0.9, "lower": [0.0, 0.5, 0.1], "upper": [0.2, 0.9, 0.4]},
        "sample_probabilities": None,
    }],
}  # fmt: skip
BUSY = {"type": "about:blank", "title": "t", "status": 422, "detail": "no", "request_id": "r-9"}


class Stub(BaseHTTPRequestHandler):
    """Answers as the service would, without a model."""

    asked: list[str]
    bodies: list[bytes]
    keys: list[str | None]
    answers = {  # noqa: RUF012  never changed
        "/v1/models": (200, {"models": [MODEL]}),
        "/v1/models/pets": (200, DETAILS),
        "/v1/models/pets/versions/1": (200, DETAILS | {"version": 1}),
        "/v1/models/pets/versions/1/predict": (422, BUSY),
        "/v1/models/pets/versions/2": (200, DETAILS),
        "/v1/models/pets/versions/2/predict": (200, PREDICTED),
        "/v1/models/pets/versions/2/uncertainty": (200, UNCERTAIN),
    }

    def do_GET(self):
        self.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.keys.append(self.headers.get("Authorization"))
        self.asked.append(self.path)
        status, answer = self.answers[self.path.partition("?")[0]]
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815  the base class calls it so

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    handler = type("Stub", (Stub,), {"asked": [], "bodies": [], "keys": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "rex.png"
    path.write_bytes(PNG)
    return str(path)


def run(*arguments, stdin=None, **settings):
    # Rich would take the first two for a terminal, httpx would send the stub's requests elsewhere.
    env = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "100", "NO_PROXY": "127.0.0.1"}
    env |= settings
    return CliRunner(env=env).invoke(app, [str(a) for a in arguments], input=stdin)


def train(root, *options):
    return run("train", "--epochs", 2, "--samples", 10, "--checkpoints", root, *options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
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


def test_evaluate_finds_the_figures_of_the_checkpoint(trained):
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
def test_evaluate_says_what_is_not_there(trained, options, message):
    result = run("evaluate", "--checkpoints", trained[0], *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_if_missing_does_nothing_where_there_is_a_version(trained):
    result = train(trained[0], "--if-missing")
    assert result.exit_code == 0
    assert result.stdout == "digits-mlp has version 1 already: nothing to do\n"
    assert catalogue.versions(trained[0], "digits-mlp") == [1]


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


def test_an_interrupted_run_is_neither_lost_nor_continued_unasked(stopped):
    result = train(stopped)
    assert result.exit_code == 2
    assert "interrupted after epoch 1" in result.stderr
    assert "--resume" in result.stderr
    assert "--restart" in result.stderr
    assert (stopped / "digits-mlp" / ".training" / "state.safetensors").exists()


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(stopped, trained):
    result = train(stopped, "--resume")
    assert result.exit_code == 0, result.output
    assert "epoch 1/2" not in result.stdout
    assert "epoch 2/2" in result.stdout
    ended, unbroken = (
        checkpoint.load(root / "digits-mlp" / "1")[1].sha256 for root in (stopped, trained[0])
    )
    assert ended == unbroken
    assert not (stopped / "digits-mlp" / ".training").exists()


def test_restart_begins_anew(stopped):
    result = train(stopped, "--restart", "--seed", 1)
    assert result.exit_code == 0, result.output
    assert "epoch 1/2" in result.stdout


def test_resuming_with_other_options_is_refused(stopped):
    result = train(stopped, "--resume", "--seed", 1)
    assert result.exit_code == 2
    assert "another network, recipe" in result.stderr
    assert "(seed was 0, now is 1)" in result.stderr


def test_resuming_where_nothing_was_interrupted_says_so_and_trains(tmp_path):
    (tmp_path / "fresh").mkdir()
    catalogue.pin(tmp_path, "fresh", 7)
    result = train(tmp_path, "--resume", "--name", "fresh", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "no interrupted run of fresh to resume: a new one begins\n" in result.stdout
    assert "epochs done before" not in result.stdout
    assert "1,437 images to train on, 360 to test on" in result.stdout
    assert catalogue.versions(tmp_path, "fresh") == [1]
    assert "version 7 is pinned: to let the new one answer, dropserve pin fresh" in result.stdout


def test_two_processes_share_the_work_and_save_one_version(tmp_path):
    command = [Path(sys.executable).with_name("dropserve"), "train", "--devices", "2"]
    command += ["--epochs", "4", "--samples", "0", "--checkpoints", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "MEMBER: 2/2" in done.stderr
    assert done.stdout.count("epoch 4/4") == 1
    assert [f.name for f in (tmp_path / "digits-mlp").iterdir()] == ["1"]
    _, metadata = checkpoint.load(tmp_path / "digits-mlp" / "1")
    assert metadata.evaluation["eval"]["accuracy"] > 0.85


def test_every_field_of_a_recipe_is_an_option():
    options = {p.name for p in typer.main.get_command(app).get_command(None, "train").params}
    assert {field.name for field in fields(Recipe)} - options == {"validation_share"}


def test_a_state_with_a_flipped_bit_is_refused_and_nothing_is_published(stopped):
    state = stopped / "digits-mlp" / ".training" / "state.safetensors"
    raw = bytearray(state.read_bytes())
    raw[-10] ^= 1
    state.write_bytes(raw)
    result = train(stopped, "--resume")
    assert result.exit_code == 2
    assert "state.safetensors: damaged: its SHA-256 is" in result.stderr
    assert "--restart" in result.stderr
    assert catalogue.versions(stopped, "digits-mlp") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nothing"], "no dataset 'nothing'"),
        (["--network", "resnet"], "network must be mlp, cnn"),
        (["--network", "torch.nn:Flatten"], "calls no dropout"),
        (["--network", "torch.nn:Dropout"], "logits [B, C]"),
        (["--network", "torch.nn:GRU"], "GRU: TypeError"),
        (
            [
                "--network",
                "torch.nn:Linear",
                "--network-arguments",
                '{"in_features": 3, "out_features": 2}',
            ],
            "cannot take images of (1, 8, 8)",
        ),
        (["--network", "none.such:factory"], "No module named 'none'"),
        (["--network", "torch.nn:Flatten", "--hidden", "3"], "are for mlp and cnn"),
        (["--network-arguments", "{}"], "arguments are for a factory"),
        (
            ["--network-arguments", "3"],
            '--network-arguments: must be a JSON object, as {"a": 1}',
        ),
        (["--hidden", "many"], "--hidden: must be numbers with commas between them"),
        (["--epochs", "many"], "--epochs: must be a whole number"),
        (["--optimizer", "adam"], "--optimizer: 'adam' is not one of 'adamw', 'sgd'"),
        (["--threads", "0"], "threads must be 1 to 256"),
        (["--hidden", "64"], "one rate a hidden layer"),
        (["--dropout", "0,0"], "calls no dropout"),
        (["--learning-rate", "-1"], "learning_rate must be in"),
        (["--name", "a/b"], "'a/b' cannot name a model"),
        (["--resume", "--restart"], "not both"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path, options, message):
    result = train(tmp_path, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_ones_own_is_built_from_its_arguments(tmp_path, monkeypatch):
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


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path):
    # A shell without job control starts children that ignore SIGINT, hence the handler.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dropserve.service.cli.main import app; app()"
    )
    command = [sys.executable, "-c", code, "train", "--epochs", "100000"]
    with subprocess.Popen(
        [*command, "--checkpoints", tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("digits: ")
        assert process.stdout.readline().startswith("epoch 1/100000: loss")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted: --resume continues\n"
    assert (tmp_path / "digits-mlp" / ".training" / "state.safetensors").exists()


def test_settings_lists_every_field_with_its_meaning():
    result = run("settings")
    assert result.exit_code == 0
    for name in Settings.model_fields:
        assert environment_name(name) in result.stdout
    rows = {row["variable"]: row for row in json.loads(run("settings", "--json").stdout)}
    assert set(rows) == {environment_name(name) for name in Settings.model_fields}
    assert rows["DROPSERVE_PORT"]["meaning"] == Settings.model_fields["port"].description


def test_settings_shows_the_default_beside_what_is_set(monkeypatch):
    monkeypatch.setenv("DROPSERVE_MAX_SIDE", "77")
    rows = {row["variable"]: row for row in json.loads(run("settings", "--json").stdout)}
    assert (rows["DROPSERVE_MAX_SIDE"]["default"], rows["DROPSERVE_MAX_SIDE"]["value"]) == (
        16384,
        77,
    )


@pytest.mark.parametrize("command", [["settings"], ["serve"], ["train"]])
def test_a_setting_that_is_wrong_is_named(monkeypatch, command):
    monkeypatch.setenv("DROPSERVE_THREADS", "secret")
    result = run(*command)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: DROPSERVE_THREADS: ")
    assert "secret" not in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("PORT", "abc", "must be a whole number"),
        ("PORT", "65536", "must be at most 65535"),
        ("POLL_SECONDS", "0", "must be above 0.0"),
        ("POLL_SECONDS", "soon", "must be a number"),
        ("ADMIN_TOKEN", "short", "must have at least 16 characters"),
        ("TRACING", "maybe", "must be true or false"),
        ("PRECISION", "float16", "must be 'float32', 'bfloat16' or 'auto'"),
    ],
)
def test_a_setting_that_is_wrong_is_told_in_plain_words(variable, value, told):
    result = run("settings", **{f"DROPSERVE_{variable}": value})
    assert (result.exit_code, result.stderr) == (2, f"error: DROPSERVE_{variable}: {told}\n")


def test_version_says_which_release_of_what_this_is():
    told = run("--version").stdout
    assert told == (
        f"dropserve {version('dropserve')} (Python {platform.python_version()}, "
        f"PyTorch {torch.__version__})\n"
    )


@pytest.mark.parametrize("command", ["train", "import", "evaluate", "uncertainty", "score", ""])
def test_flags_have_no_type_in_the_help(command):
    told = run(*[command] * bool(command), "--help").stdout
    assert "--help" in told
    assert "bool" not in told


def test_the_help_of_train_says_what_the_recipes_are():
    told = " ".join(re.sub("[│ ]+", " ", run("train", "--help", COLUMNS="200").stdout).split())
    assert "At most so many. [default: (20; digits 60; fashion-mnist mlp 30;" in told
    assert "[default: (0.02; fashion-mnist cnn 0.05)]" in told
    assert "Augment: mirror half. [default: (off; fashion-mnist cnn on)]" in told


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


def test_serve_says_that_there_is_nothing_to_serve(tmp_path):
    # In a process of its own, because serving takes over the process's logging.
    command = [sys.executable, "-c", "from dropserve.service.cli.main import app; app()", "serve"]
    done = subprocess.run(
        [*command, "--checkpoints", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"error: {tmp_path}: no checkpoint in it" in done.stderr
    assert "Traceback" not in done.stderr


def test_predict_shows_a_bar_a_class_the_most_probable_first(stub, image):
    result = run("predict", image, "--url", stub[1])
    assert result.exit_code == 0, result.output
    first, *bars = result.stdout.splitlines()
    assert first == f"{image}: dog (70.0%)"
    assert [bar.split()[0] for bar in bars] == ["dog", "[b]owl", "cat"]
    assert [bar.count("█") for bar in bars] == [21, 6, 3]


def test_uncertainty_marks_the_interval_and_says_where_the_doubt_comes_from(stub, image):
    handler, url = stub
    result = run("uncertainty", image, "--url", url, "--samples", 50, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert handler.asked[-1].endswith("/uncertainty?samples=50&seed=7&masks=stratified&level=0.9")
    lines = result.stdout.splitlines()
    assert lines[0] == f"{image}: dog (70.0%, mean of 50 samples)"
    assert lines[1].split()[:2] == ["dog", "█" * 15 + "▓" * 6 + "░" * 6]
    assert "70.0%  [50.0%, 90.0%]" in lines[1]
    said = " ".join(result.stdout.split())
    assert f"doubt in all 0.802 nats predictive entropy, at most {math.log(3):.3f}" in said
    assert "from the data 0.700 nats expected entropy" in said
    assert "from the model 0.102 nats mutual information" in said
    assert "votes against 4.0% of the networks variation ratio" in said


@pytest.mark.parametrize(
    ("command", "answer"), [("predict", PREDICTED), ("uncertainty", UNCERTAIN)]
)
def test_json_is_the_answer_itself(stub, image, command, answer):
    result = run(command, image, "--url", stub[1], "--json")
    assert json.loads(result.stdout) == answer


@pytest.mark.parametrize("command", ["predict", "uncertainty"])
def test_a_dash_is_the_picture_on_standard_input(stub, command):
    handler, url = stub
    result = run(command, "-", "--url", url, stdin=PNG)
    assert result.exit_code == 0, result.output
    assert handler.bodies[-1] == PNG
    assert result.stdout.startswith("standard input: dog (70.0%")


def test_standard_input_goes_with_files_but_only_once_and_not_empty(stub, image):
    handler, url = stub
    run("predict", image, "-", "--url", url, "--json", stdin=PNG)
    assert handler.bodies[2].count(PNG) == 2
    for images, stdin, message in ((["-", "-"], PNG, "given once"), (["-"], b"", "nothing came")):
        result = run("predict", *images, "--url", url, stdin=stdin)
        assert result.exit_code == 2
        assert message in result.stderr


def test_the_key_is_sent_and_never_shown(stub, image):
    handler, url = stub
    run("predict", image, "--url", url, DROPSERVE_API_KEY="s3cret")
    assert set(handler.keys) == {"Bearer s3cret"}
    for command in (["settings"], ["settings", "--json"]):
        result = run(*command, DROPSERVE_API_KEY="s3cret")
        assert result.exit_code == 0
        assert "s3cret" not in result.output
    result = run("predict", image, "--url", url, DROPSERVE_API_KEY="s3cr\tet")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: DROPSERVE_API_KEY: an API key is printable ASCII, without spaces around it\n"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_had_for_a_shell(shell):
    command = [Path(sys.executable).with_name("dropserve"), "--show-completion", shell]
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # by its argument
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=named)
    assert "_DROPSERVE_COMPLETE" in done.stdout


@pytest.mark.parametrize(("typed", "completed"), [("p", ["pets"]), ("x", [])])
def test_the_shell_completes_models_by_asking_the_service(stub, typed, completed):
    words = f"dropserve predict --url {stub[1]} --model {typed}"
    environment = {"_DROPSERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "5"}
    done = subprocess.run(
        [Path(sys.executable).with_name("dropserve")],
        env=os.environ | environment | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == completed
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["train", "score", "watch", "uncertainty"])
def test_help_leaves_room_to_read_on_a_narrow_terminal(command):
    lines = run(command, "--help", COLUMNS="80").stdout.splitlines()
    options = [line for line in lines if line.startswith("│ ") and "--" in line]
    assert options
    assert max(map(len, lines)) <= 80
    assert all(len(line) - line.index("  ", 5) > 40 for line in options)


def test_models_lists_what_is_served(stub):
    result = run("models", "--url", stub[1])
    row = [cell.strip() for cell in result.stdout.splitlines()[3].split("│")]
    assert row == ["", "pets", "2 (pinned)", "1, 2", "yes", "vmap", "bfloat16", ""]
    assert result.stdout.splitlines()[-1] == "pets 3 refused: damaged"
    assert json.loads(run("models", "--url", stub[1], "--json").stdout) == {"models": [MODEL]}


def test_an_error_of_the_service_is_a_line_with_its_request(stub, image):
    result = run("predict", image, "--url", stub[1], "--model", "pets", "--version", 1)
    assert (result.exit_code, result.stderr) == (2, "error: no (request r-9)\n")


def test_a_service_that_is_not_there_is_a_line():
    result = run("models", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no answer from http://127.0.0.1:1 (")


def test_an_image_that_is_not_there_is_a_line(stub, tmp_path):
    result = run("predict", tmp_path / "none.png", "--url", stub[1])
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'none.png'}: No such file or directory\n"


def test_a_version_without_a_model_is_a_line(stub, image):
    result = run("predict", image, "--url", stub[1], "--version", 1)
    assert result.exit_code == 2
    assert "give --model" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--help"],
        ["score", "--help"],
        ["settings"],
        ["watch", "--once", "--url", "http://127.0.0.1:1"],
    ],
)
def test_commands_that_only_talk_import_no_torch(arguments):
    code = (
        "import sys; from dropserve.service.cli.main import app; app(standalone_mode=False);"
        "assert not {'torch', 'numpy', 'fastapi'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
