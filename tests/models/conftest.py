"""Fixtures of the tests of `models`."""

import pytest
import torch
from hypothesis import settings

from dropserve.models.data import load_dataset

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _seeded():
    """Give every test PyTorch's global generator in one known state, and put it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return load_dataset("digits", tmp_path_factory.mktemp("data"))
