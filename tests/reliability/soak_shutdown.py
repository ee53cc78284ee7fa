"""50 SIGTERMs and 20 worker kills under load: figures for docs/reliability.md, some minutes.

`python -m pytest tests/reliability/soak_shutdown.py` writes the figures to
bench/results/reliability/shutdown.json.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import eventually, workers
from tests.reliability.exchanges import Load
from tests.reliability.faults import clients_of, serving_workers

pytestmark = pytest.mark.timeout(900)
RESULTS = Path(__file__).parents[2] / "bench/results/reliability/shutdown.json"
SIGTERMS = 50
KILLS = 20


@pytest.fixture(scope="module")
def results():
    """Figures by test; they are written and shown when the module is done."""
    figures = {}
    yield figures
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2)
    RESULTS.write_text(text + "\n")
    print(text)


def rounded(seconds):
    return round(max(seconds), 3)


def stop_under_load(server, pause):
    """Send SIGTERM; return the tally, and the seconds until port and process were gone."""

    async def run():
        async with Load(server.port) as load:
            await load.answers(50)
            await asyncio.sleep(pause)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await load.refused()
            closed = time.monotonic() - started
        return load.tally, closed, started

    tally, closed, started = asyncio.run(run())
    assert server.stop(60) == 0
    return tally, closed, time.monotonic() - started


def test_sigterms(make_server, results):
    draw = random.Random(1)  # noqa: S311
    counts = [1 + n % 2 for n in range(SIGTERMS)]
    servers = [make_server(workers=counts[0])]
    statuses, lost, closed, ended = Counter(), [], [], []
    for count in [*counts[1:], None]:
        if count is not None:
            servers.append(make_server(workers=count))  # it loads its models meanwhile
        server = servers.pop(0).start(90)
        tally, seconds_open, seconds = stop_under_load(server, draw.random() / 2)
        statuses += tally.statuses
        lost += tally.lost
        closed.append(seconds_open)
        ended.append(seconds)
    results["sigterms"] = {
        "sigterms": SIGTERMS,
        "received_in_full": statuses.total() + len(lost),
        "answered": dict(statuses),
        "lost": len(lost),
        "longest_seconds_until_the_port_was_closed": rounded(closed),
        "longest_seconds_until_the_process_had_ended": rounded(ended),
    }
    assert lost == []
    assert set(statuses) == {200}


def test_worker_kills(make_server, results):
    server = make_server(workers=2).start(90)
    answered, in_flight, others, served = 0, 0, [], []

    async def kill():
        async with Load(server.port) as load:
            await load.answers(100)
            victim = workers(server)[0]  # the older one
            os.kill(victim, signal.SIGSTOP)  # so that its connections stay the same
            clients = clients_of(victim)
            os.kill(victim, signal.SIGKILL)
            await load.answers(200)
            return load.tally, clients

    for _ in range(KILLS):
        started = time.monotonic()
        old = set(workers(server))
        tally, clients = asyncio.run(kill())
        answered += tally.answered
        in_flight += sum(port in clients for port, _ in tally.lost)
        others += [lost for lost in tally.lost if lost[0] not in clients]
        eventually(lambda old=old: len(set(workers(server)) - old) == 1, 30, 0.005)
        eventually(lambda: serving_workers(server) == 2, 60, 0.05)
        served.append(time.monotonic() - started)
    results["worker_kills"] = {
        "kills": KILLS,
        "answered": answered,
        "lost_in_flight_at_the_killed_worker": in_flight,
        "lost_elsewhere": len(others),
        "longest_seconds_until_two_workers_served_again": rounded(served),
    }
    assert others == []
    assert server.stop() == 0
