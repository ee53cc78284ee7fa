"""Thousands of connections that send slowly or nothing: good traffic is served as before.

Half of the slow ones send a head byte by byte, half a body; the others send nothing.
"""

import asyncio
import time
from collections.abc import Iterable
from itertools import repeat

import httpx
import pytest

from tests.conftest import LIMITED
from tests.helpers import PNG, eventually
from tests.reliability.figures import SCALE, published
from tests.reliability.load import (
    Sample,
    Usage,
    clients,
    descriptors,
    failures,
    milliseconds,
    on_core,
    open_loop,
    run,
)
from tests.reliability.messages import get, head_of_image, request

pytestmark = pytest.mark.timeout(300)

COMMAND = "make soak SOAK=connections"
SLOW, SILENT = round(500 * SCALE), round(5_000 * SCALE)
RATE = 100  # good requests a second, half of them over new connections
BEFORE, DURING = 30 * SCALE, 45  # seconds
DEADLINES = {"silent": 10, "slow head": 10, "slow body": 5}
"""Seconds: DROPSERVE_HEAD_TIMEOUT, and the window of the minimum rate of a body."""
SLACK = 2  # seconds
HEAD = head_of_image()


class Held(asyncio.Protocol):
    """A connection that sends some bytes at once, and others at one a second, until it is closed.

    Attributes:
        seconds: from its opening to its closing; None: it is open.
    """

    def __init__(self, kind: str, at_once: bytes = b"", slowly: Iterable[int] = ()) -> None:
        self.kind = kind
        self.seconds: float | None = None
        self._at_once, self._slowly = at_once, iter(slowly)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._opened = time.perf_counter()
        self._transport = transport
        transport.write(self._at_once)
        self._drip()

    def _drip(self) -> None:
        if self.seconds is None and (byte := next(self._slowly, None)) is not None:
            self._transport.write(bytes([byte]))
            asyncio.get_running_loop().call_later(1, self._drip)

    def connection_lost(self, _error: Exception | None) -> None:
        self.seconds = time.perf_counter() - self._opened


def slow_and_silent() -> list[Held]:
    """Make them in the order in which they are opened: the slow ones are among the first."""
    heads = (Held("slow head", slowly=HEAD) for _ in range(SLOW // 2))
    bodies = (Held("slow body", HEAD, PNG) for _ in range(SLOW - SLOW // 2))
    return [*heads, *bodies, *silent(SILENT)]


def silent(count: int) -> list[Held]:
    return [Held("silent") for _ in range(count)]


async def hold(port: int, held: list[Held], rate: float) -> None:
    """Open the connections, so many a second."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    for number, each in enumerate(held):
        await asyncio.sleep(max(0, started + number / rate - time.perf_counter()))
        await loop.create_connection(lambda each=each: each, "127.0.0.1", port)


async def good_traffic(port: int, seconds: float) -> list[Sample]:
    """Predictions, half of them over connections that stay open and half over new ones."""
    async with clients(port, 16) as kept, clients(port, keep_alive=False) as fresh:
        parts = (open_loop(http, repeat(request()), RATE / 2, seconds) for http in (kept, fresh))
        kept_samples, fresh_samples = await asyncio.gather(*parts)
    return kept_samples + fresh_samples


def test_slow_and_silent_connections_do_no_harm(models, make_server):
    async def measure():
        before = await good_traffic(server.port, BEFORE)
        held = slow_and_silent()
        opening = asyncio.create_task(hold(server.port, held, rate=1_000))
        during = await good_traffic(server.port, DURING)
        await opening
        return before, during, held

    with published("connections", COMMAND) as figures:
        with descriptors(16_384):
            with on_core(0):
                server = make_server(models, max_connections=8_192).start()
            usage = Usage.of(server.process.pid)
            with on_core(1):
                before, during, held = run(measure())
        latencies = [[sample.latency for sample in part] for part in (before, during)]
        figures |= {
            "slow connections": SLOW,
            "silent connections": SILENT,
            "good requests": len(during),
            "good requests that failed": len(failures(before + during)),
            "good traffic before, p50, ms": milliseconds(latencies[0], 50),
            "good traffic before, p99, ms": milliseconds(latencies[0], 99),
            "good traffic meanwhile, p50, ms": milliseconds(latencies[1], 50),
            "good traffic meanwhile, p99, ms": milliseconds(latencies[1], 99),
        }
        for kind in DEADLINES:
            closed = [each.seconds for each in held if each.kind == kind and each.seconds]
            figures[f"{kind}, closed"] = len(closed)
            figures[f"{kind}, closed after at most, s"] = round(max(closed, default=0), 2)
        assert failures(before + during) == []
        assert milliseconds(latencies[1], 99) <= 2 * milliseconds(latencies[0], 99)
        late = [e for e in held if e.seconds is None or e.seconds > DEADLINES[e.kind] + SLACK]
        assert len(late) == 0
        eventually(lambda: Usage.of(server.process.pid).descriptors == usage.descriptors, 5)


def test_a_thousand_silent_connections_deny_nobody_a_thousand_descriptors(models, make_server):
    count = 1_010

    async def measure():
        held = silent(count)
        await hold(server.port, held, rate=1_000)
        async with clients(server.port, keep_alive=False) as http:
            probes = await open_loop(http, repeat(get("/livez")), 20, 5)
            requests = await open_loop(http, repeat(get("/v1/models")), 20, 2)
            await asyncio.sleep(DEADLINES["silent"] + SLACK)
            after = await open_loop(http, repeat(request()), 20, 2)
        return held, probes, requests, after

    with published("descriptors", COMMAND) as figures:
        server = make_server(models, command=LIMITED).start()
        with descriptors(4_096):
            held, probes, requests, after = run(measure())
        figures |= {
            "descriptors that the worker may have": 1_024,
            "silent connections": count,
            "probes answered 200": sum(sample.status == 200 for sample in probes),
            "probes, slowest, ms": milliseconds((sample.latency for sample in probes), 100),
            "requests answered 200": sum(sample.status == 200 for sample in requests),
            "requests refused with 503": sum(sample.status == 503 for sample in requests),
            "requests without an answer": sum(sample.status == 0 for sample in probes + requests),
            "silent connections left after the deadline": sum(e.seconds is None for e in held),
        }
        assert failures(probes) == []
        assert 503 in {sample.status for sample in requests}  # there are that many connections
        assert failures(requests, (200, 503)) == []
        assert [s for s in requests if s.status == 503 and not s.retry_after] == []
        assert failures(after) == []
        assert sum(each.seconds is None for each in held) == 0
        assert httpx.get(server.url + "/readyz").status_code == 200
