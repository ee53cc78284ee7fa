"""Fixtures of the command line's tests."""

import sys

import pytest
from typer.testing import CliRunner

from dropserve.service.cli.main import app


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
    """Run a command in this process: as in a pipe, whatever the terminal of the tests is."""

    def invoke(*arguments, stdin=None, **environment):
        plain = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "100"}
        runner = CliRunner(env=plain | {"NO_PROXY": "127.0.0.1"} | environment)
        return runner.invoke(app, [str(argument) for argument in arguments], input=stdin)

    return invoke
