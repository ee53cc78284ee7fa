"""Commands that ask a service: a stub for what they send and print, a server for the rest."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dropserve.service.client import DropserveClient

PNG = b"\x89PNG\r\n\x1a\n picture"
MODEL = {
    "name": "pets", "version": 2, "versions": [1, 2], "on_request": [], "default": True,
    "refused": [{"version": 3, "reason": "damaged"}],
    "changed": [{"version": 1, "reason": "gone"}], "pinned": 2, "pin_problem": "unreadable",
    "manifest_sha256": "a" * 64,
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


def test_predict_shows_a_bar_a_class_the_most_probable_first(run, stub, image):
    result = run("predict", image, "--url", stub[1])
    assert result.exit_code == 0, result.output
    first, *bars = result.stdout.splitlines()
    assert first == f"{image}: dog (70.0%)"
    assert [bar.split()[0] for bar in bars] == ["dog", "[b]owl", "cat"]
    assert [bar.count("█") for bar in bars] == [21, 6, 3]


def test_uncertainty_marks_the_interval_and_says_where_the_uncertainty_comes_from(run, stub, image):
    handler, url = stub
    result = run("uncertainty", image, "--url", url, "--samples", 50, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert handler.asked[-1].endswith("/uncertainty?samples=50&seed=7&masks=stratified&level=0.9")
    lines = result.stdout.splitlines()
    assert lines[0] == f"{image}: dog (70.0%, mean of 50 samples)"
    assert lines[1].split()[:2] == ["dog", "█" * 15 + "▓" * 6 + "░" * 6]
    assert "70.0%  [50.0%, 90.0%]" in lines[1]
    said = " ".join(result.stdout.split())
    assert f"uncertainty 0.802 nats predictive entropy, at most {math.log(3):.3f}" in said
    assert "from the data 0.700 nats expected entropy" in said
    assert "from the model 0.102 nats mutual information" in said
    assert "votes against 4.0% of the networks variation ratio" in said


@pytest.mark.parametrize(
    ("command", "answer"), [("predict", PREDICTED), ("uncertainty", UNCERTAIN)]
)
def test_json_is_the_answer_itself(run, stub, image, command, answer):
    result = run(command, image, "--url", stub[1], "--json")
    assert json.loads(result.stdout) == answer


@pytest.mark.parametrize("command", ["predict", "uncertainty"])
def test_a_dash_is_the_image_on_standard_input(run, stub, command):
    handler, url = stub
    result = run(command, "-", "--url", url, stdin=PNG)
    assert result.exit_code == 0, result.output
    assert handler.bodies[-1] == PNG
    assert result.stdout.startswith("standard input: dog (70.0%")


def test_standard_input_goes_with_files_but_only_once_and_not_empty(run, stub, image):
    handler, url = stub
    run("predict", image, "-", "--url", url, "--json", stdin=PNG)
    assert handler.bodies[2].count(PNG) == 2
    for images, stdin, message in ((["-", "-"], PNG, "given once"), (["-"], b"", "is empty")):
        result = run("predict", *images, "--url", url, stdin=stdin)
        assert result.exit_code == 2
        assert message in result.stderr


def test_the_key_is_sent_and_never_shown(run, stub, image):
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


@pytest.mark.parametrize(("typed", "completed"), [("p", ["pets"]), ("x", [])])
def test_the_shell_completes_models_by_asking_the_service(stub, typed, completed):
    words = f"dropserve predict --url {stub[1]} --model {typed}"
    environment = {"_DROPSERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "5"}
    environment = os.environ | environment | {"NO_PROXY": "127.0.0.1"}
    program = Path(sys.executable).with_name("dropserve")
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (completed, "")


def test_models_lists_what_is_served(run, stub):
    result = run("models", "--url", stub[1])
    row = [cell.strip() for cell in result.stdout.splitlines()[3].split("│")]
    assert row == ["", "pets", "2 (pinned)", "1, 2", "yes", "vmap", "bfloat16", ""]
    assert result.stdout.splitlines()[-3:] == [
        "pets 3 refused: damaged",
        "pets 1 served from memory: gone",
        "pets: the pin is not followed: unreadable",
    ]
    assert json.loads(run("models", "--url", stub[1], "--json").stdout) == {"models": [MODEL]}


def test_an_error_of_the_service_is_a_line_with_its_request(run, stub, image):
    result = run("predict", image, "--url", stub[1], "--model", "pets", "--version", 1)
    assert (result.exit_code, result.stderr) == (2, "error: no (request r-9)\n")


def test_where_no_model_is_the_default_one_must_be_named(run, stub, image):
    handler, url = stub
    models = {"models": [MODEL | {"default": False}]}
    handler.answers = Stub.answers | {"/v1/models": (200, models)}
    result = run("predict", image, "--url", url)
    assert (result.exit_code, result.stderr) == (2, "error: give --model: there are pets\n")


@pytest.mark.parametrize("command", [["models"], ["watch", "--once"]])
def test_a_service_that_is_not_there_is_a_line(run, command):
    result = run(*command, "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no answer from http://127.0.0.1:1 (")


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{i:02}.png" for i in range(70)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(path)
    return paths


def test_more_images_than_a_request_takes_are_answered_as_one(run, server, images):
    result = run("predict", *images, "--port", server.port, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    with DropserveClient(server.url) as client:
        last = client.predict(images[-1]).predictions[0]
    assert (answer["model"], answer["version"], len(answer["predictions"])) == ("digits-mlp", 2, 70)
    assert answer["predictions"][-1]["label"] == last.label
    assert answer["predictions"][-1]["probability"] == pytest.approx(last.probability, abs=1e-5)


@pytest.mark.parametrize("command", ["predict", "uncertainty"])
def test_an_image_without_an_answer_is_named_and_does_not_affect_the_others(
    run, server, images, tmp_path, command
):
    cut, text, missing = (tmp_path / name for name in ("cut.png", "text.jpg", "missing.png"))
    cut.write_bytes(images[0].read_bytes()[:50])
    text.write_text("text")
    given = [*images[:3], cut, *images[3:20], text, missing]
    result = run(command, *given, "--url", server.url)
    assert result.exit_code == 2
    heads = [line for line in result.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert [head.partition(":")[0] for head in heads] == [str(path) for path in images[:20]]
    first, second, third = result.stderr.splitlines()
    assert re.fullmatch(rf"error: {cut}: .* cannot be decoded.*\(request .*\)", first)
    assert second.startswith(f"error: {text}: no PNG, JPEG or WebP ")
    assert third == f"error: {missing}: No such file or directory"
    result = run(command, *given, "--url", server.url, "--json")
    assert (result.exit_code, result.stderr.count("error: ")) == (2, 3)
    told = [p and p["label"] for p in json.loads(result.stdout)["predictions"]]
    labels = [head.split(": ")[1].partition(" (")[0] for head in heads]
    assert told == [*labels[:3], None, *labels[3:], None, None]
    result = run(command, text, "--url", server.url, "--json")
    assert (result.exit_code, result.stdout) == (2, "")


def test_masks_and_level_are_what_uncertainty_answers_with(run, server, images):
    how = ("--masks", "independent", "--level", 0.5, "--samples", 30)
    result = run("uncertainty", images[0], "--url", server.url, "--json", *how)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert (answer["masks"], answer["predictions"][0]["interval"]["level"]) == ("independent", 0.5)
    with DropserveClient(server.url) as client:
        same = client.uncertainty(images[0], masks="independent", level=0.5, samples=30)
    assert answer["predictions"][0]["mean"] == pytest.approx(same.predictions[0].mean, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "digits-mpl"], "served are colour-cnn, digits-mlp; did you mean digits-mlp?"),
        (["--model", "zebra"], "; /readyz says what was refused\n"),
        (["--model", "colour-cnn", "--version", 9], "no such version of the model; served are 1"),
        (["--version", 1], "give --model as well"),
        (["--port", 80], "give it or --url"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "score"])
def test_a_model_that_is_not_served_is_answered_with_those_that_are(
    run, server, images, command, options, message
):
    given = images[0] if command == "predict" else images[0].parent
    out = ["--out", images[0].parent / "scores.csv"] if command == "score" else []
    result = run(command, given, *out, "--url", server.url, *options)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not list(images[0].parent.glob("scores*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--url", "localhost:8000"], "did you mean http://localhost:8000?"),
        (["predict", "FOLDER"], "`dropserve score FOLDER --out scores.csv` makes a table"),
        (
            ["uncertainty", "IMAGE", "--samples", 5000],
            "--samples: must be less than or equal to 1000",
        ),
        (["uncertainty", "IMAGE", "--samples", "many"], "--samples: must be a valid integer"),
        (["score", "FOLDER", "--out", "nodir/x.csv"], "there is no folder nodir: make it first"),
        (["score", "FOLDER", "--out", "x.xlsx"], "must end in .csv or .parquet"),
        (["watch", "--interval", 0], "--interval: must be greater than or equal to 0.1"),
    ],
)
def test_what_cannot_be_asked_is_a_line_in_plain_words(run, images, arguments, message):
    named = {"FOLDER": str(images[0].parent), "IMAGE": str(images[0])}
    for name, path in named.items():
        arguments = [path if argument == name else argument for argument in arguments]
        message = message.replace(name, path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
