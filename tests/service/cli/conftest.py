"""Fixtures of the command line's tests."""

import sys

import pytest

from tests.helpers import invoke


@pytest.fixture(scope="session")
def program():
    """The command line as a process; a shell without job control has its children ignore SIGINT."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dropserve.service.cli.main import app; app()"
    )
    return [sys.executable, "-c", code]


@pytest.fixture(scope="session")
def run():
    """Runs a command in this process."""
    return invoke
