"""What `dropserve serve` says to a person: that the port is taken, that it is ready."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dropserve.service.cli import main
from dropserve.service.cli.terminal import Refused
from dropserve.service.settings import Settings

DROPSERVE = Path(sys.executable).with_name("dropserve")


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])  # noqa: S104  not bound
def test_a_port_that_is_taken_is_refused_by_its_name(taken, host):
    with pytest.raises(Refused, match=f"{host}:{taken} is in use.*--port"):
        main.check_free(host, taken)


def test_a_free_port_and_any_port_are_fine(taken):
    main.check_free("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    assert free != taken
    main.check_free("127.0.0.1", free)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(Refused, match=r"is called no\.such\.host\.invalid: "):
        main.check_free("no.such.host.invalid", 80)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # noqa: S104  not bound
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("here.test", "http://here.test:8000"),
    ],
)
def test_a_client_on_this_machine_finds_the_service_at_its_url(host, url):
    assert Settings(host=host).url == url


def test_a_taken_port_is_a_line_before_anything_is_loaded(taken, checkpoints):
    command = [DROPSERVE, "serve", "--port", str(taken), "--checkpoints", checkpoints]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"error: 127\.0\.0\.1:{taken} is in use .*\n", done.stderr)


def test_a_person_is_told_when_it_is_ready_and_where(checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DROPSERVE_")}
    environment |= {"DROPSERVE_DEFAULT_MODEL": "digits-mlp", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [DROPSERVE, "serve", "--port", str(port), "--checkpoints", checkpoints],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=environment,
    ) as server:
        os.close(theirs)
        told = b""
        while not told.endswith(b"\n"):
            told += os.read(ours, 4096)
        server.send_signal(signal.SIGTERM)
    os.close(ours)
    assert server.returncode == 0
    assert told.decode().strip() == (
        f"ready: http://127.0.0.1:{port} serves colour-cnn 1, digits-mlp 2; Ctrl-C stops it"
    )
