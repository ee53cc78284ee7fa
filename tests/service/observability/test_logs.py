"""Logs: one JSON object a line, the formatter alone and the real server's."""

import json
import logging
import re
import warnings

import httpx
import pytest

from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.service.observability.logs import FIELDS, JsonFormatter, config


def record(message, *, fields=None, error=None):
    info = (type(error), error, None) if error else None
    made = logging.LogRecord("dropserve.x", logging.INFO, "x.py", 1, message, (), info)
    if fields is not None:
        setattr(made, FIELDS, fields)
    return json.loads(JsonFormatter().format(made))


def test_a_record_is_one_line_of_json_with_its_fields():
    line = record("hello\nthere", fields={"status": 200, "route": None})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "dropserve.x",
        "message": "hello\nthere",
        "status": 200,
        "route": None,
    }


def test_an_exception_is_a_field_of_its_line():
    assert "ValueError: bad" in record("failed", error=ValueError("bad"))["exception"]


def test_a_field_that_json_does_not_know_is_written_as_text():
    assert record("x", fields={"path": ValueError("y")})["path"] == "y"


@pytest.mark.parametrize("value", ["\ud800", 2**64, [["\ud800"]]])
def test_what_orjson_refuses_is_written_all_the_same(value):
    assert record("hello", fields={"value": value})["value"] == value


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_configuration_takes_the_level(level):
    assert config(level)["root"]["level"] == level.upper()


def test_a_request_has_a_line_that_says_what_it_cost(server, http):
    http.post(
        "/v1/models/digits-mlp/versions/1/uncertainty?samples=2",
        json={"instances": [[[0]], [[1]], [[2]]]},
        headers={"X-Request-ID": "logged"},
    )
    line = server.line("logged")
    assert 0 < line.pop("milliseconds") < 60_000
    line.pop("time")
    assert line == {
        "level": "info",
        "logger": "dropserve.requests",
        "message": "request",
        "request_id": "logged",
        "method": "POST",
        "route": "/v1/models/{name}/versions/{version}/uncertainty",
        "model": "digits-mlp",
        "version": 1,
        "images": 3,
        "status": 200,
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("GET", "/MARKER", 404, None),
        ("POST", "/predict", 415, "/predict"),
        ("POST", "/v1/models/MARKER/predict", 404, "/v1/models/{name}/predict"),
    ],
)
def test_a_refused_request_has_a_line_without_what_was_sent(
    method, path, status, route, server, http
):
    request_id = http.request(method, path).headers["x-request-id"]
    line = server.line(request_id)
    assert (line["status"], line["route"], line["level"]) == (status, route, "info")
    assert "MARKER" not in json.dumps(line)


NOISY = """
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

warnings.warn("an import warns")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(64, 3)

    def forward(self, x):
        torch.from_numpy(np.frombuffer(b"read-only", np.uint8))  # PyTorch itself warns
        x = F.dropout(x.flatten(1), 0.5, self.training)
        return self.logits(x) if x.sum().item() > -1e9 else x  # no vmap: one pass a sample
"""


def test_what_python_and_pytorch_warn_of_is_logged_with_the_model(
    make_server, tmp_path, monkeypatch
):
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    preprocessing = Preprocessing((8, 8), 1, (0.3,), (0.4,))
    network = NetworkConfig("noisy:Net", preprocessing.shape, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("one", "two"):
            about = checkpoint.Metadata(name, network, preprocessing, ("a", "b", "c"))
            checkpoint.save(tmp_path / "checkpoints", network.build(), about)
    server = make_server(
        tmp_path / "checkpoints", default_model="one", factories="noisy:Net"
    ).start()
    pixels = {"instances": [[[0] * 8] * 8]}
    assert httpx.post(server.url + "/uncertainty", json=pixels).status_code == 200
    assert server.stop() == 0
    assert server.errors.read_text() == ""
    found = [line for line in server.lines() if line["level"] == "warning"]
    for name in ("one", "two"):
        (slow,) = [
            x for x in found if "runs one pass a sample" in x["message"] and x["model"] == name
        ]
        assert slow["version"] == 1
    for kind, message in (("an import", "an import warns"), ("PyTorch", "is not writable")):
        (warned,) = [x for x in found if message in x["message"]]
        assert (warned["model"], warned["kind"]) == ("one", "UserWarning"), kind
        assert re.fullmatch(r".*noisy\.py:\d+", warned["where"])
