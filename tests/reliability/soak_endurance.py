"""Half an hour at half of what one worker can do, on every route, while versions are published.

Every request is answered 200, and what the process holds does not grow: a line is fitted to its
resident memory after a third of the time, one point between two versions that are published.
"""

import asyncio
import base64
import json
import random
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dropserve.models import checkpoint
from tests.helpers import PNG, encode, noise
from tests.reliability.figures import SCALE, published
from tests.reliability.load import (
    Sample,
    Usage,
    clients,
    closed_loop,
    failures,
    milliseconds,
    on_core,
    open_loop,
    run,
    statuses,
)
from tests.reliability.messages import get, request

SECONDS = 1800 * SCALE
pytestmark = pytest.mark.timeout(SECONDS + 300)

CALIBRATION = min(20, SECONDS / 6)
WARM_UP = SECONDS / 3
PUBLISH_EVERY = min(60, SECONDS / 6)
KEPT = 4  # versions in the folder
CONNECTIONS = 64
MOST_GROWTH = 10  # MB an hour

PHOTO = encode(Image.fromarray(noise(28, 28, 3)).resize((224, 224)), "JPEG")
LARGE = encode(noise(300, 200))
NUMBERS = json.dumps({"instances": [[[7] * 28] * 28] * 4}).encode()
BASE64 = json.dumps({"images": [base64.b64encode(PHOTO).decode()]}).encode()
PART = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n'
FORM = PART % PNG + PART % PHOTO + b"--cut--\r\n"
TENSOR = {"name": "image", "shape": [1, 28, 28], "datatype": "UINT8", "data": [7] * 784}
INFER = json.dumps({"inputs": [TENSOR]}).encode()
JSON, MULTIPART = "application/json", "multipart/form-data; boundary=cut"


def requests(seed: int = 0):
    """Yield requests of every kind, small predictions most often."""
    draw = random.Random(seed)
    kinds = {
        lambda: request("/predict", PNG): 8,
        lambda: request("/predict", LARGE): 2,
        lambda: request("/predict", PHOTO, "image/jpeg"): 3,
        lambda: request("/predict", NUMBERS, JSON): 2,
        lambda: request("/predict", BASE64, JSON): 1,
        lambda: request("/predict", FORM, MULTIPART): 2,
        lambda: request("/uncertainty", PNG): 3,
        lambda: request(uncertainty(draw), PHOTO, "image/jpeg"): 3,
        lambda: request(f"/uncertainty/stream?samples={draw.randint(1, 20)}", PNG): 1,
        lambda: request("/compare", PNG): 1,
        lambda: request("/v2/models/digits-mlp/infer", INFER, JSON): 2,
        lambda: get("/v1/models/digits-mlp/examples"): 1,
        lambda: get("/v1/models"): 1,
        lambda: get("/metrics"): 0.2,
        lambda: get("/"): 0.5,
        lambda: get("/playground/main.js"): 0.5,
        lambda: get("/readyz"): 1,
    }
    while True:
        (make,) = draw.choices([*kinds], [*kinds.values()])
        yield make()


def uncertainty(draw: random.Random) -> str:
    masks = draw.choice(["independent", "stratified"])
    return f"/uncertainty?samples={draw.randint(1, 50)}&seed={draw.randrange(2**40)}&masks={masks}"


@dataclass
class Watch:
    """What the process holds, once a second."""

    process: int
    times: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    async def watch(self):
        while True:
            self.times.append(time.perf_counter())
            self.usages.append(Usage.of(self.process))
            await asyncio.sleep(1)

    def growth(self):
        """The slope of resident memory after the warm-up, and half its 95% interval, MB an hour.

        Memory rises and falls with each version. The seconds between two are not independent,
        and a line through them takes a rise that comes back each time for a slope.
        """
        period = ((np.array(self.times) - self.times[0] - WARM_UP) // PUBLISH_EVERY).astype(int)
        resident = np.array([usage.resident for usage in self.usages]) / 1e6
        medians = [np.median(resident[period == n]) for n in range(period[-1])]  # whole ones
        line = stats.linregress(np.arange(len(medians)) * PUBLISH_EVERY / 3600, medians)
        return line.slope, stats.t.ppf(0.975, len(medians) - 2) * line.stderr

    def median(self, what, part):
        """The median of descriptors or threads in a part of the run."""
        return float(np.median([getattr(usage, what) for usage in self.usages[part]]))


def test_endurance(models, save_version, make_server):
    with published("endurance", "make soak SOAK=endurance") as figures:
        with on_core(0):
            server = make_server(models, poll_seconds=1).start()
        watch = Watch(server.process.pid)
        with on_core(1):
            capacity, samples, versions = run(measure(server, watch, models, save_version))
        slope, interval = watch.growth()
        warm = sum(seconds < watch.times[0] + WARM_UP for seconds in watch.times)
        minute = max(5, round(60 * SCALE))
        parts = slice(warm, warm + minute), slice(-minute, None)
        descriptors = [watch.median("descriptors", part) for part in parts]
        threads = [watch.median("threads", part) for part in parts]
        figures |= {
            "minutes": round(SECONDS / 60, 1),
            "capacity, requests a second": round(capacity, 1),
            "requests": len(samples),
            "statuses": str(statuses(samples)),
            "versions published": versions,
            "p50, ms": milliseconds((sample.latency for sample in samples), 50),
            "p99, ms": milliseconds((sample.latency for sample in samples), 99),
            "resident after warm-up, MB": round(watch.usages[warm].resident / 1e6, 1),
            "resident at the end, MB": round(watch.usages[-1].resident / 1e6, 1),
            "slope of resident memory, MB an hour": round(slope, 2),
            "half of its 95% interval, MB an hour": round(interval, 2),
            "descriptors after warm-up and at the end": "{:g}, {:g}".format(*descriptors),
            "threads after warm-up and at the end": "{:g}, {:g}".format(*threads),
        }
        assert failures(samples) == []
        assert versions >= 5
        assert slope < MOST_GROWTH
        assert descriptors[0] == descriptors[1]
        assert threads[0] == threads[1]
        assert not server.errors.read_text()
        assert [line for line in server.lines() if line["level"] == "error"] == []


async def measure(server, watch, root, save_version) -> tuple[float, list[Sample], int]:
    """Return the capacity, requests a second, the samples, and how many versions were published."""
    async with clients(server.port, CONNECTIONS, CONNECTIONS) as http:
        asked = requests()
        calibration = await closed_loop(http, asked, 8, CALIBRATION)
        assert failures(calibration) == []
        capacity = len(calibration) / CALIBRATION
        async with background(watch.watch()), background(publish(root, save_version)) as publishing:
            samples = await open_loop(http, asked, capacity / 2, SECONDS)
        return capacity, samples, publishing.result()


async def publish(root, save_version) -> int:
    """Publish a version from time to time and remove the oldest, until cancelled; count them."""
    for number in count(1):
        try:
            await asyncio.sleep(PUBLISH_EVERY)
        except asyncio.CancelledError:
            return number - 1
        await asyncio.to_thread(save_version, root, number)
        for old in checkpoint.versions(root, "digits-mlp")[:-KEPT]:
            await asyncio.to_thread(checkpoint.remove, root, "digits-mlp", old)
    raise AssertionError


@asynccontextmanager
async def background(work):
    """Run a coroutine during the block, and cancel it in the end; an error of it is raised."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
