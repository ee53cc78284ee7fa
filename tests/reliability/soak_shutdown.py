"""50 SIGTERMs and 20 worker kills under load: what was received is answered; some minutes."""

import asyncio
import os
import random
import signal
import time
from collections import Counter

import pytest

from tests.helpers import eventually, workers
from tests.reliability.exchanges import Load
from tests.reliability.faults import clients_of, serving_workers
from tests.reliability.figures import SCALE, published

pytestmark = pytest.mark.timeout(1800)
COMMAND = "make soak SOAK=shutdown"
SIGTERMS = round(50 * SCALE)
KILLS = round(20 * SCALE)


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


def test_sigterms(make_server):
    draw = random.Random(1)
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
        print(f"{len(ended)}: {tally.answered} answered, {len(tally.lost)} lost, {seconds:.2f} s")
    with published("sigterms", COMMAND) as figures:
        figures |= {
            "SIGTERMs, of one worker and of two in turn": SIGTERMS,
            "requests received in full": statuses.total() + len(lost),
            "answers by status": str(dict(statuses)),
            "requests lost": len(lost),
            "until the port was closed, longest, s": rounded(closed),
            "until the process had ended, longest, s": rounded(ended),
        }
        assert lost == []
        assert set(statuses) == {200}


def test_worker_kills(make_server):
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
    with published("worker-kills", COMMAND) as figures:
        figures |= {
            "workers killed, of two": KILLS,
            "requests answered": answered,
            "requests lost in flight at the killed worker": in_flight,
            "requests lost elsewhere": len(others),
            "until two workers served again, longest, s": rounded(served),
        }
        assert others == []
        assert server.stop() == 0
