"""The commands that ask a running service, over a real server: many images, and what goes wrong."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dropserve.service.cli.main import app
from dropserve.service.client import DropserveClient


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{i:02}.png" for i in range(70)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(path)
    return paths


def run(*arguments):
    result = CliRunner(env={"NO_PROXY": "127.0.0.1", "COLUMNS": "100"}).invoke(
        app, [str(argument) for argument in arguments]
    )
    return result.exit_code, result.stdout, result.stderr


def port(server):
    return server.url.rpartition(":")[2]


def test_more_images_than_a_request_takes_are_answered_as_one(server, images):
    code, told, _ = run("predict", *images, "--port", port(server), "--json")
    assert code == 0
    answer = json.loads(told)
    with DropserveClient(server.url) as client:
        last = client.predict(images[-1]).predictions[0]
    assert (answer["model"], answer["version"], len(answer["predictions"])) == ("digits-mlp", 2, 70)
    assert answer["predictions"][-1]["label"] == last.label
    assert answer["predictions"][-1]["probability"] == pytest.approx(last.probability, abs=1e-5)


@pytest.mark.parametrize("command", ["predict", "uncertainty"])
def test_an_image_without_an_answer_is_named_after_the_others_are_shown(
    server, images, tmp_path, command
):
    cut, text, missing = (tmp_path / name for name in ("cut.png", "text.jpg", "missing.png"))
    cut.write_bytes(images[0].read_bytes()[:50])
    text.write_text("text")
    given = [*images[:3], cut, *images[3:20], text, missing]
    code, told, errors = run(command, *given, "--url", server.url)
    assert code == 2
    heads = [line for line in told.splitlines() if line.startswith(str(tmp_path))]
    assert [head.partition(":")[0] for head in heads] == [str(path) for path in images[:20]]
    first, second, third = errors.splitlines()
    assert first.startswith(f"error: {cut}: the picture cannot be decoded")
    assert "(request " in first
    assert second == f"error: {text}: no PNG, JPEG or WebP image"
    assert third == f"error: {missing}: No such file or directory"
    code, told, errors = run(command, *given, "--url", server.url, "--json")
    assert (code, told) == (2, "")  # predictions would not be in the order of the images
    assert errors.count("error: ") == 3


def test_masks_and_level_are_what_uncertainty_answers_with(server, images):
    how = ("--masks", "independent", "--level", 0.5, "--samples", 30)
    code, told, _ = run("uncertainty", images[0], "--url", server.url, "--json", *how)
    assert code == 0
    answer = json.loads(told)
    assert (answer["masks"], answer["predictions"][0]["interval"]["level"]) == ("independent", 0.5)
    with DropserveClient(server.url) as client:
        same = client.uncertainty(images[0], masks="independent", level=0.5, samples=30)
    assert answer["predictions"][0]["mean"] == pytest.approx(same.predictions[0].mean, abs=1e-5)
    assert math.isfinite(answer["predictions"][0]["mutual_information"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "digits-mpl"], "there are colour-cnn, digits-mlp; did you mean digits-mlp?"),
        (["--model", "zebra"], "there are colour-cnn, digits-mlp; /readyz says what was refused\n"),
        (
            ["--model", "colour-cnn", "--version", 9],
            "no version 9 of 'colour-cnn' is served: there",
        ),
        (["--version", 1], "give --model as well"),
        (["--port", 80], "give it or --url"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "score"])
def test_a_model_that_is_not_served_is_answered_with_those_that_are(
    server, images, command, options, message
):
    given = images[0] if command == "predict" else images[0].parent
    out = ["--out", images[0].parent / "scores.csv"] if command == "score" else []
    code, told, errors = run(command, given, *out, "--url", server.url, *options)
    assert (code, told, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert message in errors
    assert not list(images[0].parent.glob("scores*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--url", "localhost:8000"], "did you mean http://localhost:8000?"),
        (["predict", "FOLDER"], "`dropserve score FOLDER --out scores.csv` makes a table"),
        (["uncertainty", "IMAGE", "--samples", 5000], "--samples: must be at most 1000"),
        (["uncertainty", "IMAGE", "--samples", "many"], "--samples: must be a whole number"),
        (["score", "FOLDER", "--out", "nodir/x.csv"], "there is no folder nodir: make it first"),
        (["watch", "--interval", 0], "--interval: must be at least 0.1"),
    ],
)
def test_what_cannot_be_asked_is_a_line_in_plain_words(images, arguments, message):
    named = {"FOLDER": str(images[0].parent), "IMAGE": str(images[0])}
    for name, path in named.items():
        arguments = [path if argument == name else argument for argument in arguments]
        message = message.replace(name, path)
    code, told, errors = run(*arguments)
    assert (code, told, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert message in errors
