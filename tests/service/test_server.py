"""The process: what it refuses to start with, how it stops, and several workers."""

import json
import shutil
import socket
import threading
import time

import httpx
import pytest
import torch
from PIL import Image

from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.service.fastpath.uvicorn_protocol import FastPathProtocol
from dropserve.service.server import uvicorn_options
from dropserve.service.settings import Settings
from tests.helpers import encode, free_port

PNG = encode(Image.new("RGB", (16, 16), (9, 99, 199)))
HEADERS = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def damaged(checkpoints, tmp_path_factory):
    """The checkpoints with one byte of one of them changed."""
    root = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(checkpoints, root)
    weights = root / "colour-cnn" / "1" / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A checkpoint that asks for a factory to be imported and called."""
    root = tmp_path_factory.mktemp("foreign")
    network = NetworkConfig("os.path:join", (1, 8, 8), 2, (), ())
    preprocessing = Preprocessing((8, 8), 1, (0.5,), (0.5,))
    metadata = checkpoint.Metadata("foreign", network, preprocessing, ("a", "b"))
    checkpoint.save(root, torch.nn.Linear(1, 1), metadata)
    return root


REFUSED = {
    "a strict start": "model.safetensors: damaged, edited or exchanged: it has",
    "an empty folder": "no checkpoint in it; make one with",
    "an unknown default": "the default model 'other' is not in it",
    "an untrusted factory": "the factory 'os.path:join' is not trusted here",
}


@pytest.fixture(scope="module")
def started(make_server, damaged, foreign, checkpoints, tmp_path_factory):
    """All servers of this module, started at once: loading is most of their time."""
    empty = tmp_path_factory.mktemp("empty")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield {
            "one worker": make_server(),
            "two workers": make_server(workers=2, default_version=1),
            "a strict start": make_server(damaged, port=free_port(), strict_start=True),
            "an empty folder": make_server(empty, port=free_port(), default_model=None),
            "an unknown default": make_server(checkpoints, port=free_port(), default_model="other"),
            "an untrusted factory": make_server(foreign, port=free_port(), default_model=None),
            "a port that is taken": make_server(port=taken.getsockname()[1]),
        }


def nothing_listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(("case", "message"), REFUSED.items())
def test_it_refuses_to_start_says_why_and_never_listens(case, message, started):
    server = started[case]
    assert server.process.wait(90) == 1
    assert message in server.errors.read_text().splitlines()[-1]
    assert not any("running" in line["message"] for line in server.lines())
    assert nothing_listens(server.settings["port"])


def test_a_port_that_is_taken_is_logged_and_an_exit_status(started):
    server = started["a port that is taken"]
    assert server.process.wait(90) > 0
    assert any("address already in use" in line["message"] for line in server.lines())


def test_sigterm_lets_an_open_request_finish_and_exits_0(started):
    server = started["one worker"].start(90)
    path = "/v1/models/colour-cnn/uncertainty?samples=1000"
    answers = []

    def ask():
        files = [("file", ("a.png", PNG))] * 64
        answers.append(httpx.post(server.url + path, files=files, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    assert not answers  # it is still being computed
    assert server.stop() == 0
    asking.join(10)
    assert answers[0].status_code == 200
    assert len(answers[0].json()["predictions"]) == 64
    assert [line["status"] for line in server.lines() if line["message"] == "request"][-1] == 200
    assert server.errors.read_text() == ""
    assert nothing_listens(server.port)


def test_two_workers_serve_the_same_and_stop_cleanly(started):
    server = started["two workers"].start(90)
    answers = {
        httpx.post(server.url + "/predict", content=PNG, headers=HEADERS).content for _ in range(20)
    }
    (answer,) = answers
    assert json.loads(answer)["version"] == 1  # of two: the setting says so
    assert server.stop() == 0
    assert all("message" in line for line in server.lines())
    assert server.errors.read_text() == ""
    assert nothing_listens(server.port)


@pytest.mark.parametrize(
    ("settings", "fast"), [({}, True), ({"fast_path": False}, False), ({"tracing": True}, False)]
)
def test_the_fast_path_is_on_unless_it_is_switched_off_or_requests_are_traced(settings, fast):
    http = uvicorn_options(Settings(**settings))["http"]
    assert issubclass(http, FastPathProtocol) is fast
