"""Workers that die: only what they had in flight fails, and they are replaced at once."""

import asyncio
import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import uvicorn

from dropserve.service import supervisor
from tests.helpers import eventually, workers
from tests.reliability.exchanges import Load
from tests.reliability.faults import clients_of, serving_workers

SUPERVISE = """
import logging, socket, sys, uvicorn
from dropserve.service.supervisor import Supervisor
logging.basicConfig(level="INFO")
config = uvicorn.Config("failing:app", workers=2)
sys.exit(Supervisor(config, [socket.create_server(("127.0.0.1", 0))]).run())
"""
FAILING = """
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no"})
"""


def kill_under_load(server):
    """Kill a worker; return what became of the requests, and the ports of its clients."""

    async def run():
        async with Load(server.port) as load:
            await load.answers(100)
            victim = workers(server)[1]
            os.kill(victim, signal.SIGSTOP)  # so that its connections stay the same
            clients = clients_of(victim)
            os.kill(victim, signal.SIGKILL)
            await load.answers(100)  # of the other worker
            return load.tally, clients

    return asyncio.run(run())


def replacement_seconds(server, other):
    """Kill a worker that has only just started; return how long another takes to be started."""
    (young,) = set(workers(server)) - {other}
    os.kill(young, signal.SIGKILL)
    died = time.monotonic()
    eventually(lambda: len(set(workers(server)) - {young, other}) == 1, 8, 0.01)
    return time.monotonic() - died


@pytest.mark.slow
def test_only_requests_in_flight_at_a_killed_worker_fail_and_it_is_replaced(make_server):
    server = make_server(workers=2, drain_seconds=1).start(90)
    first = workers(server)
    tally, clients = kill_under_load(server)
    assert clients
    assert {port for port, _ in tally.lost} <= clients
    assert set(tally.statuses) == {200}
    replaced = eventually(lambda: len(found := workers(server)) == 2 and found, 2)
    assert first[0] in replaced

    # one that hangs does not delay the replacement of another; one that dies again waits
    os.kill(first[0], signal.SIGSTOP)
    took = [replacement_seconds(server, first[0]) for _ in range(3)]
    told = [float(p) for p in re.findall(r"is replaced in (\S+) seconds", server.log.read_text())]
    assert told[-1] == 2 * told[-2] >= 2
    assert all(
        pause - 0.1 < seconds < pause + 2 for pause, seconds in zip(told[1:], took, strict=True)
    )
    os.kill(first[0], signal.SIGCONT)
    eventually(lambda: serving_workers(server) == 2, 60)
    assert not [line for line in server.lines() if "Traceback" in line.get("exception", "")]

    # one that hangs while it drains is killed
    os.kill(first[0], signal.SIGSTOP)
    assert server.stop(20) == 1
    assert any(f"worker {first[0]} does not stop" in line["message"] for line in server.lines())


def test_a_worker_that_fails_to_start_stops_the_service(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SUPERVISE]
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "failed to start" in done.stderr


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch):
    def no_memory(*_arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(supervisor, "_Worker", no_memory)
    supervising = supervisor.Supervisor(uvicorn.Config("failing:app", workers=1), [])
    with supervising._woken, supervising._waker:
        for pause in (1, 2, 4):
            supervising._start()
            assert pause - 0.1 < supervising._pause <= pause
        with pytest.raises(OSError, match="Cannot allocate"):
            supervising._start(first=True)
