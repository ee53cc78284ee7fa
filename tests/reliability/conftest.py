"""Fixtures of the tests of reliability: a network to publish, and what an error must be."""

import base64
import json
from pathlib import Path

import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.examples import Example
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from tests.helpers import encode, noise


@pytest.fixture(scope="session")
def save_version():
    """Publish the next version of `digits-mlp`, by default of default size, with random weights."""
    preprocessing = Preprocessing((28, 28), 1, (0.3,), (0.4,), invert=True)

    def save(root: Path, seed: int = 0, hidden: tuple[int, int] = (256, 256)) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = NetworkConfig("mlp", preprocessing.shape, 10, hidden, (0.2, 0.5))
            module = network.build()
        classes = tuple(str(digit) for digit in range(10))
        examples = (Example(0, base64.b64encode(encode(noise(28, 28))).decode()),)
        about = checkpoint.Metadata(
            "digits-mlp", network, preprocessing, classes, examples=examples
        )
        return checkpoint.save(root, module, about)

    return save


@pytest.fixture
def models(tmp_path, save_version):
    """A folder with one version of `digits-mlp`."""
    save_version(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def refusal():
    """Check an error: a problem with the request's id, which the log has, and no echo.

    It returns the detail.
    """

    def check(server, answer, status):
        assert answer.status == status, answer
        assert answer.headers["content-type"] == "application/problem+json"
        problem = json.loads(answer.body)
        assert set(problem) == {"type", "title", "status", "detail", "request_id"}
        assert (problem["status"], bool(problem["detail"])) == (status, True)
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert b"MARKER" not in answer.body
        assert server.line(problem["request_id"])["status"] == status
        return problem["detail"]

    return check
