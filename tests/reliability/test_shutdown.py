"""SIGTERM: what the kernel has received in full is answered, the rest is cut, and the port closes.

Expected figures: the exit status is 0, within a few seconds where no request takes long.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from dropserve.service.app import create_app
from dropserve.service.inference.inference import Inference
from dropserve.service.server import uvicorn_options
from dropserve.service.settings import Settings
from dropserve.service.supervisor import Server
from tests.helpers import encode, eventually, noise, workers
from tests.reliability.exchanges import FAST, SLOW, Load
from tests.reliability.messages import get, head_of_image, request

IMAGE = encode(noise(16, 16, 3))
LONG = "/v1/models/colour-cnn/uncertainty?samples=1000&seed={}"
READY = ("/readyz", "/v2/health/ready", "/v2/models/digits-mlp/ready", "/livez")
NUMBERS = json.dumps({"instances": [[[7] * 16] * 16] * 64}).encode()
DRAINED = b"".join(
    [request(LONG.format(n), NUMBERS, "application/json") for n in range(3)]
    + [get(path) for path in READY]
)
"""Long requests, and probes that are answered when those are: while the server drains."""


def refuses(server):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) != 0


def read_answers(connection, count):
    """Read answers: of each its status, its headers and its body."""
    file, answers = connection.makefile("rb"), []
    for _ in range(count):
        status = int(file.readline().split()[1])
        lines = iter(file.readline, b"\r\n")
        headers = dict(line.decode().lower().strip().split(": ", 1) for line in lines)
        answers.append((status, headers, file.read(int(headers["content-length"]))))
    return answers


@pytest.mark.parametrize("count", [1, 2])
def test_under_load_what_was_received_is_answered_and_the_port_refuses(count, make_server):
    server = make_server(workers=count, fast_path=count == 2).start(90)

    async def stop_under_load():
        async with Load(server.port) as load:
            await load.answers(200)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await load.refused()
            return load.tally, time.monotonic() - started

    with server.connect() as connection:
        connection.sendall(DRAINED)
        tally, seconds_open = asyncio.run(stop_under_load())
        answers = read_answers(connection, 7)
    assert tally.lost == []
    assert set(tally.statuses) == {200}
    assert seconds_open < 1.5
    assert server.stop(10) == 0
    assert [status for status, _, _ in answers] == [200, 200, 200, 503, 503, 503, 200]
    assert ["connection" in headers for _, headers, _ in answers] == [False] * 6 + [True]
    assert b"stopping" in answers[3][2]
    assert [line["reason"] for line in server.lines() if "reason" in line] == ["draining"] * 3
    assert server.errors.read_text() == ""
    assert "uvicorn.access" not in server.log.read_text()


@pytest.fixture
def stopping(checkpoints):
    """Run a server in a thread; its event loop is blocked at the moment when it is to stop.

    It yields how to connect, how to stop it and wait for that moment, and how to go on.
    """
    settings = Settings(checkpoints=checkpoints, default_model="digits-mlp", port=0)
    app = create_app(settings, Inference(settings))
    server = Server(uvicorn.Config(app, **uvicorn_options(settings)))
    blocked, goes_on, shutdown = threading.Event(), threading.Event(), server.shutdown

    async def block_and_shut_down(sockets=None):
        blocked.set()
        goes_on.wait(30)
        await shutdown(sockets)

    def stop():
        server.should_exit = True
        assert blocked.wait(30)

    server.shutdown = block_and_shut_down
    with socket.create_server(("127.0.0.1", 0)) as port:
        thread = threading.Thread(target=server.run, args=([port],))
        thread.start()
        eventually(lambda: server.started)
        address = port.getsockname()
        yield lambda: socket.create_connection(address, 20), stop, goes_on.set
        thread.join(30)
        assert not thread.is_alive()


def test_what_only_the_kernel_has_received_is_answered(stopping):
    connect, stop, go_on = stopping
    kept = [connect() for _ in range(3)]
    for connection in kept:
        connection.sendall(FAST)
        assert read_answers(connection, 1)[0][0] == 200
    stop()
    fresh, pipelined, unsent = [connect() for _ in range(3)], connect(), connect()
    for connection in kept + fresh:
        connection.sendall(FAST)
    pipelined.sendall(FAST + SLOW * 2)
    go_on()
    for connection in kept + fresh:
        ((status, headers, _),) = read_answers(connection, 1)
        assert (status, headers["connection"]) == (200, "close")
    answers = read_answers(pipelined, 3)
    assert [status for status, _, _ in answers] == [200] * 3
    assert ["connection" in headers for _, headers, _ in answers] == [False, False, True]
    for connection in [*kept, *fresh, pipelined, unsent]:
        assert connection.recv(1) == b""
        connection.close()


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_half_sent_upload_is_refused_and_not_waited_for(fast_path, make_server):
    server = make_server(fast_path=fast_path).start(90)
    with server.connect() as small, server.connect() as large, server.connect() as head:
        small.sendall(head_of_image(len(IMAGE)) + IMAGE[:-1])
        large.sendall(head_of_image(2**20) + bytes(2**19))
        head.sendall(b"POST /predict HTTP/1.1\r\nHost:")
        time.sleep(0.3)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        large.sendall(bytes(2**18))  # the answer is there by now, and must not be destroyed
        for connection in (small, large):
            ((status, headers, body),) = read_answers(connection, 1)
            assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
            assert b"stopping" in body
        assert head.recv(1) == b""
    assert server.stop(10) == 0
    assert time.monotonic() - started < 5
    assert [line["reason"] for line in server.lines() if "reason" in line] == ["draining"] * 2
    assert "exception" not in server.log.read_text()


def test_a_thread_that_never_ends_does_not_keep_the_process():
    program = (
        "import threading, time; from dropserve.service.supervisor import _exit_after;"
        "threading.Thread(target=time.sleep, args=[60]).start(); _exit_after(0.1)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=30).returncode == 1


def test_workers_stop_when_their_parent_is_killed(make_server):
    server = make_server(workers=2).start(90)
    left = workers(server)
    server.process.kill()
    eventually(lambda: refuses(server), 5)
    eventually(lambda: not any(map(runs, left)), 10)


def runs(process):
    """Say if a process is there, and not only waits to be noticed as dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False
