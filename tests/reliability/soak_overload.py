"""Five times the load that one worker can do: it refuses cheaply, and serves what it accepts.

The server is on one core, this process on another. Capacity is measured in the same run, before
and after, by clients that each wait for their answer.
"""

from dataclasses import dataclass, field

import pytest

from tests.reliability.figures import SCALE, published
from tests.reliability.load import (
    Sample,
    clients,
    closed_loop,
    counted,
    failures,
    milliseconds,
    on_core,
    open_loop,
    probing,
    run,
    statuses,
)
from tests.reliability.messages import get, request

pytestmark = pytest.mark.timeout(600)

SECONDS = 60 * SCALE
CALIBRATION = 10 * SCALE
TIMES = 5
LEAST_SERVICE = {"overload": (2048, 40.0, 0.9), "overload-short": (512, 5.0, 0.7)}
"""Units of a layer, milliseconds of a request, and the least goodput as a part of capacity."""
MAX_WAIT = 2000.0  # milliseconds, the default of DROPSERVE_MAX_WAIT
SLACK = 50.0  # milliseconds
CONNECTIONS = 500


@dataclass(frozen=True)
class Overload:
    """What was measured; times in milliseconds, rates a second."""

    service: float
    before: float
    after: float
    samples: list[Sample] = field(repr=False)
    probes: list[Sample] = field(repr=False)

    @property
    def goodput(self) -> float:
        """Answers a second while requests arrived."""
        end = self.samples[0].due + SECONDS
        return sum(s.status == 200 and s.done <= end for s in self.samples) / SECONDS

    def latency(self, percentile: float, *allowed: int) -> float:
        """A percentile of the time from when requests of these statuses were due."""
        return milliseconds((s.latency for s in self.samples if s.status in allowed), percentile)

    @property
    def slowest_probe(self) -> float:
        return milliseconds((probe.latency for probe in self.probes), 100)

    def figures(self) -> dict[str, float | str]:
        lag = milliseconds((s.sent - s.due for s in self.samples), 99)
        return {
            "time of one request alone, median, ms": self.service,
            "capacity before, answers a second": round(self.before, 1),
            "capacity after, answers a second": round(self.after, 1),
            "seconds of overload": SECONDS,
            "requests a second": round(len(self.samples) / SECONDS, 1),
            "statuses": str(statuses(self.samples)),
            "goodput, answers a second": round(self.goodput, 1),
            "accepted, p50, ms": self.latency(50, 200),
            "accepted, p99, ms": self.latency(99, 200),
            "refused, p50, ms": self.latency(50, 429, 503),
            "refused, p99, ms": self.latency(99, 429, 503),
            "`/livez`, slowest, ms": self.slowest_probe,
            "lag of the generator, p99, ms": lag,
        }


@pytest.mark.parametrize("name", LEAST_SERVICE)
def test_overload(name, tmp_path, save_version, make_server):
    units, least, share = LEAST_SERVICE[name]
    save_version(tmp_path, hidden=(units, units))
    with published(name, "make soak SOAK=overload") as figures:
        with on_core(0):
            server = make_server(tmp_path).start()
        with on_core(1):
            found = run(measure(server.port, least))
        figures |= found.figures()
        assert failures(found.samples, (200, 429, 503)) == []
        assert [s for s in found.samples if s.status == 503 and not s.retry_after] == []
        assert failures(found.probes) == []
        assert found.goodput >= share * (found.before + found.after) / 2
        assert found.latency(99, 200) <= MAX_WAIT + found.service + SLACK
        assert found.latency(99, 429, 503) < 50
        assert found.slowest_probe < 100


async def measure(port: int, least: float) -> Overload:
    async with clients(port, CONNECTIONS) as http, clients(port, 1) as other:
        requests = await long_requests(http, least)
        service = await median_alone(http, requests, CALIBRATION / 2)
        before = await capacity(http, requests)
        async with probing(other, get("/livez"), 0.1) as probes:
            samples = await open_loop(http, requests, TIMES * before, SECONDS)
        after = await capacity(http, requests)
        return Overload(service, before, after, samples, probes)


async def long_requests(http, least):
    """Find how many samples take long enough; no two seeds share a batch, or masks."""
    for samples in (50, 100, 150, 200, 300, 400, 600, 800, 1000):
        path = f"/uncertainty?samples={samples}&seed="
        requests = counted(lambda seed, path=path: request(f"{path}{seed}"))
        if await median_alone(http, requests, 1) >= least:
            return requests
    raise AssertionError("no request takes long enough")


async def median_alone(http, requests, seconds):
    """The median time of requests that come one after another, in milliseconds."""
    samples = await closed_loop(http, requests, 1, seconds)
    assert failures(samples) == []
    return milliseconds((sample.latency for sample in samples), 50)


async def capacity(http, requests):
    """Answers a second to eight clients, each of which waits for its answer."""
    samples = await closed_loop(http, requests, 8, CALIBRATION)
    assert failures(samples) == []
    return len(samples) / (max(s.done for s in samples) - samples[0].due)
