"""A process that is stuck says so, and ends."""

import socket
import subprocess
import time

import httpx
import pytest

from tests.helpers import eventually
from tests.reliability import controlled_network as controlled
from tests.reliability.controlled_network import HANG, SLEEP, ask
from tests.reliability.messages import request

PROBES = ("/readyz", "/healthz", "/v2/health/ready")


@pytest.fixture
def start(make_server, tmp_path):
    """Start a server of the controlled network."""

    def started(spin=0.006, **settings):
        controlled.publish(tmp_path, spin=spin)
        limits = {"factories": controlled.FACTORY, "default_model": controlled.NAME}
        return make_server(tmp_path, **limits, **settings).start()

    return started


def post(server, value):
    """Send an image and do not wait for the answer."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(request(body=controlled.image(value)))
    return connection


def statuses(server):
    return [httpx.get(server.url + path).status_code for path in PROBES]


def ended(server, seconds):
    """Wait for the process; return its exit status and how long it took."""
    started = time.perf_counter()
    return server.process.wait(seconds + 5), time.perf_counter() - started


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_hung_inference_thread_is_not_ready_within_a_second_and_ends_the_process(
    start, problem, fast_path
):
    limit = 4
    server = start(watchdog=limit, fast_path=fast_path)
    for _ in range(3):  # it knows then what a step takes
        assert ask(server, 0).status_code == 200
    with post(server, HANG):
        started = time.perf_counter()
        eventually(lambda: httpx.get(server.url + "/readyz").status_code == 503, 2, 0.02)
        assert time.perf_counter() - started < 1
        assert "the network has run for" in problem(httpx.get(server.url + "/readyz"), 503)
        assert statuses(server) == [503] * 3
        assert httpx.get(server.url + "/livez").status_code == 200
        status, _ = ended(server, limit)
        assert time.perf_counter() - started < limit
    assert status == 1
    (line,) = [line for line in server.lines() if line["level"] == "critical"]
    assert "the network has run for" in line["reason"]
    assert {line["reason"] for line in server.lines() if line.get("status") == 503} == {"hung"}
    assert "controlled_network.py" in server.errors.read_text()  # every thread's traceback


def test_a_blocked_event_loop_ends_the_process(start):
    limit = 2
    server = start(spin=0, watchdog=limit)  # its batches run on the event loop
    with post(server, HANG), socket.create_connection(("127.0.0.1", server.port)) as probe:
        started = time.perf_counter()
        probe.settimeout(limit / 2)
        probe.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(TimeoutError):
            probe.recv(1)
        status, _ = ended(server, limit)
        assert time.perf_counter() - started < limit + 0.5
    assert status == 1
    assert "controlled_network.py" in server.errors.read_text()


def test_a_step_that_is_merely_long_is_ready(start):
    """The first is of an unknown length, and the second takes what the first took."""
    server = start(watchdog=20)
    for _ in range(2):
        with post(server, round(2 / SLEEP)) as connection:
            connection.setblocking(False)
            end = time.monotonic() + 1.8
            while time.monotonic() < end:
                assert statuses(server) == [200] * 3
                time.sleep(0.02)
            connection.settimeout(5)
            assert connection.recv(99).startswith(b"HTTP/1.1 200")


def test_a_process_without_a_watchdog_is_not_ready_and_stays(start):
    server = start(watchdog=0)
    assert ask(server, 0).status_code == 200
    with post(server, HANG):
        eventually(lambda: httpx.get(server.url + "/readyz").status_code == 503, 3)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(3)
    server.process.kill()
