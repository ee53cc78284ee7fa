"""Fixtures of the tests of reliability: a network to publish, and what an error must be."""

import base64
from pathlib import Path

import httpx
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
def refusal(problem):
    """Check an error that was read from a socket, and its line in the log; return its detail."""

    def check(server, answer, status):
        response = httpx.Response(answer.status, headers=answer.headers, content=answer.body)
        detail = problem(response, status)
        assert detail
        line = server.line(answer.headers["x-request-id"])
        assert (line["status"], line["detail"]) == (status, detail)
        return detail

    return check
