"""Measures what a capacity model needs, and holds the model against it: `python -m bench.capacity`.

First the parts: processor time of a batch by its size, of the network and of the whole server, of
the generator of load and of the proxy; memory, start time, first requests. From these throughput of
one worker, of two, and of two replicas behind HAProxy is predicted; from these and throughput their
latency, by the simulation in `bench/cluster.py`; and compared with what is measured. Linux alone,
two cores at least; writes results/scaling/capacity.json.

A machine whose cores others use too changes its speed within seconds. So what batches take,
throughput and latencies are measured in turns, in rounds. Throughput is measured before and after
each: where both differ, the speed has changed meanwhile, and the round does not count; times of the
others are scaled to the mean speed.
"""

import argparse
import asyncio
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.cluster import Floats, Law, measured, steady
from bench.generator import Load, Seen
from bench.http.processes import free_port, serving
from bench.networks import CACHE, load_images
from bench.progress import follow
from dropserve.lab.machine import machine, versions
from dropserve.models import checkpoint
from dropserve.models.data import Dataset, load_dataset
from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import default_config
from dropserve.models.training import fit
from dropserve.service.inference.classifier import Classifier, Predict, Task, Uncertainty
from tests.reliability.load import metrics, on_core, run
from tests.reliability.messages import request

RESULTS = Path(__file__).parent / "results" / "scaling" / "capacity.json"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Clients that each wait for their answer: about the sizes of batches, up to full ones."""
MAX_BATCH = 64
COPIES = 20
"""Models more, by which memory and start time of one are told from those of the process."""
LOADS = (0.5, 0.8)
ROUNDS, LEAST = 24, 8
"""Rounds, and how many of them must count."""
STEADY = 0.15
"""Most that throughput before and after a measurement may differ."""
_SLICE = 0.5  # seconds of requests that come at random
_TURN = 0.02  # seconds of the generator on a core that it shares
_PROXY_RATES = 500, 1000, 2000  # requests per second that come at random, through the proxy
_WARM, _BRIEF = 0.05, 0.2  # seconds before throughput is measured, and of that
_RUNS = 60  # of the simulation
MOST = 0.15
"""Difference between a prediction and what was measured that is allowed."""
_IMAGES = 6400  # of a training's only epoch: what a network costs hardly depends on its weights
_HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    http-reuse always
frontend all
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance leastconn
{servers}
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of request, and its label on the page."""

    label: str
    model: str
    samples: int = 0
    asgi: bool = False

    @property
    def task(self) -> Task:
        """Return the task of the classifier."""
        return Uncertainty(self.samples) if self.samples else Predict()

    def requests(self, pngs: Sequence[bytes]) -> Iterator[bytes]:
        """Write requests without end; the fast path does not take one that limits its wait."""
        action = f"uncertainty?samples={self.samples}" if self.samples else "predict"
        header = ["X-Request-Timeout: 60"] if self.asgi else []
        path = f"/v1/models/{self.model}/{action}"
        return cycle([request(path, png, "image/png", *header) for png in pngs])


MODELS = {"digits-mlp": "mlp", "fashion-mnist-mlp": "mlp", "fashion-mnist-cnn": "cnn"}
KINDS = {
    "digits": Kind("digits MLP, predict", "digits-mlp"),
    "digits-asgi": Kind("digits MLP, predict, ASGI path", "digits-mlp", asgi=True),
    "digits-100": Kind("digits MLP, T = 100", "digits-mlp", 100),
    "mlp": Kind("Fashion-MNIST MLP, predict", "fashion-mnist-mlp"),
    "mlp-100": Kind("Fashion-MNIST MLP, T = 100", "fashion-mnist-mlp", 100),
    "cnn": Kind("Fashion-MNIST CNN, predict", "fashion-mnist-cnn"),
    "cnn-100": Kind("Fashion-MNIST CNN, T = 100", "fashion-mnist-cnn", 100),
    "cnn-1000": Kind("Fashion-MNIST CNN, T = 1,000", "fashion-mnist-cnn", 1000),
}
HELD, HELD_BATCH = "cnn-100", 8
"""The kind that the model is held against, and its DROPSERVE_MAX_BATCH: a batch is one step of less
than 5 ms, which runs on the event loop; longer ones run in a thread, and on one core both then wait
for each other. A request takes many times as long as the generator needs for it."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of full throughput, for requests that come at random."""
SATURATING = 4 * HELD_BATCH
"""Clients that keep a process busy with full batches."""
CONNECTIONS = 8 * SATURATING
"""For requests that come at random, to a process: none waits for a connection."""


def publish(root: Path, data_dir: Path) -> Dataset:
    """Train the models shortly, unless they are there; return the 28 x 28 images."""
    large = load_images(data_dir)
    for name, network in MODELS.items():
        data = load_dataset("digits", data_dir) if name == "digits-mlp" else large
        if checkpoint.versions(root, name):
            continue
        config = default_config(network, data.preprocessing.shape, len(data.classes))
        torch.manual_seed(0)
        module, train = config.build(), data.train
        some = train.take(torch.arange(min(_IMAGES, len(train))))
        list(fit(module, some, data.preprocessing.normalize, Recipe(epochs=1)))
        about = checkpoint.Metadata(name, config, data.preprocessing, data.classes)
        checkpoint.save(root, module.eval(), about)
    return large


def files(data: Dataset) -> list[bytes]:
    """Return some images of a test set as PNG."""
    found = []
    for image in data.test.images[:8]:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "PNG")
        found.append(file.getvalue())
    return found


def publish_copies(root: Path, target: Path, model: str, count: int) -> None:
    """Write one model under so many names."""
    module, about = checkpoint.load(root / model / "1")
    for number in range(count):
        checkpoint.save(target, module, replace(about, name=f"copy-{number}"))


@dataclass(frozen=True)
class Server:
    """A service that runs: its processes that answer, its port, the seconds that it took."""

    port: int
    workers: list[psutil.Process]
    start: float
    log: Path

    def processor_seconds(self) -> float:
        """Return processor time of all that answer."""
        return sum(_processor_seconds(worker) for worker in self.workers)

    def batches(self) -> tuple[float, float]:
        """Return how many batches have run, and images in them."""
        found = metrics(f"http://127.0.0.1:{self.port}")
        return found["dropserve_batch_images_count"], found["dropserve_batch_images_sum"]


def _processor_seconds(process: psutil.Process) -> float:
    """Add up what the threads have run, to the nanosecond: psutil's clock ticks are of 10 ms."""
    files = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


@contextmanager
def served(
    root: Path,
    workers: int = 1,
    cores: Sequence[int] = (1,),
    max_batch: int = MAX_BATCH,
) -> Iterator[Server]:
    """Serve a folder of models; each process that answers is kept on a core."""
    port = free_port()
    settings = {
        "DROPSERVE_PORT": str(port),
        "DROPSERVE_CHECKPOINTS": str(root.absolute()),
        "DROPSERVE_WORKERS": str(workers),
        "DROPSERVE_MAX_BATCH": str(max_batch),
        # nothing is refused: latency is measured, not shedding
        "DROPSERVE_MAX_WAIT": "30",
        "DROPSERVE_MAX_QUEUE": "100000",
        # connections are opened ahead of their use, and wait for their turn
        "DROPSERVE_HEAD_TIMEOUT": "3600",
        "DROPSERVE_KEEP_ALIVE": "3600",
        "DROPSERVE_PRECISION": "float32",  # "auto" is timed at each start, and may differ
        "OMP_NUM_THREADS": "1",
    }
    command = [str(Path(sys.executable).with_name("dropserve")), "serve"]

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).is_success
        except httpx.TransportError:
            return False

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        with on_core(cores[0]):  # starting alone: load comes from where this thread was
            start = stack.enter_context(serving(command, settings, Path(name), answers))
            found = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
            if workers > 1:
                found = [p for p in found if "spawn_main" in " ".join(p.cmdline())]
            for process, core in zip(found, cycle(cores), strict=False):
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {core})
        yield Server(port, found, start, Path(name) / "log")


async def connect(server: Server, each: int) -> Load:
    """Connect to each process as often: the kernel alone might give one of them more."""

    def owns(worker: psutil.Process, port: int) -> bool:
        return any(c.raddr and c.raddr.port == port for c in worker.net_connections("tcp4"))

    load = Load()
    several = len(server.workers) > 1
    await load.open(server.port, each, [partial(owns, w) for w in server.workers if several])
    return load


async def batches_of(server: Server, some: Awaitable[Seen]) -> Row:
    """Measure processor seconds of a server's batches under some load."""
    (count, images), spent = server.batches(), server.processor_seconds()
    seen = await some
    spent = server.processor_seconds() - spent
    more, images_more = server.batches()
    return {
        "batch": (images_more - images) / (more - count),
        "seconds": spent / (more - count),
        "rate": seen.done / seen.seconds,
        "latency": float(np.mean(seen.latencies)),
        "deviation": float(np.std(seen.latencies)),
        "late": float(np.mean(seen.late)) if seen.late else 0.0,
        "generator": seen.generator / len(seen.latencies),
    }


async def service_times(
    server: Server, kind: Kind, pngs: Sequence[bytes], seconds: float
) -> list[Row]:
    """Measure batches, by clients that each wait for an answer."""
    load, requests, rows = await connect(server, max(SIZES)), kind.requests(pngs), []
    for size in SIZES:
        await load.closed(requests, size, seconds / 2)
        rows.append(await batches_of(server, load.closed(requests, size, seconds)))
    load.close()
    return rows


def service(kind: Kind, rows: Sequence[Row]) -> Row:
    """Fit `fixed + each * n` to the rows of `service_times`: least squares of relative errors."""
    fixed, each, error = _line([r["batch"] for r in rows], [r["seconds"] for r in rows])
    alone = rows[0]
    return {
        "label": kind.label,
        "fixed": fixed,
        "each": each,
        "error": error,
        # of a client that asks alone: what is not the server's work, and how much it varies
        "around": max(0.0, alone["latency"] - alone["seconds"]),
        "spread": min(1.0, alone["deviation"] / alone["latency"]),
        "generator": float(np.mean([row["generator"] for row in rows[-3:]])),
        "rows": rows,
    }


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fit a line; return fixed and each, neither below 0, and the largest relative error."""
    n, found = np.array(sizes), np.array(seconds)
    fixed, each = np.linalg.lstsq(np.stack([1 / found, n / found], 1), np.ones(len(n)), rcond=None)[
        0
    ]
    if fixed < 0:
        fixed, each = 0.0, float(np.mean(found / n))
    error = np.max(np.abs((fixed + each * n) / found - 1))
    return float(fixed), float(each), float(error)


def network_times(root: Path, name: str, core: int, seconds: float) -> list[float]:
    """Time one kind's batches in a process of its own: processor seconds by size of batch."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    kind = KINDS[name]
    classifier = Classifier(kind.model, 1, root / kind.model / "1")
    generator, found = np.random.default_rng(0), []
    for size in SIZES[:-1]:
        shape = 1, *classifier.preprocessing.shape
        pixels = [generator.integers(0, 256, shape, np.uint8) for _ in range(size)]
        times: list[float] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 3:
            began = time.thread_time()
            for _ in classifier.run(kind.task, pixels):
                pass
            times.append(time.thread_time() - began)
        found.append(float(np.median(times)))
    return found


def networks(root: Path, seconds: float) -> dict[str, Row]:
    """Time the networks alone, and one of them with the other core busy too: how much slower."""
    found: dict[str, Row] = {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for name in KINDS:
            if not KINDS[name].asgi:
                times = pool.submit(network_times, root, name, 1, seconds).result()
                fixed, each, error = _line(SIZES[:-1], times)
                found[name] = {"fixed": fixed, "each": each, "error": error, "seconds": times}
        both = [pool.submit(network_times, root, HELD, core, 4 * seconds) for core in (0, 1)]
        times = np.mean([future.result() for future in both], 0).tolist()
        found[HELD]["contention"] = float(np.mean(np.divide(times, found[HELD]["seconds"])))
    return found


@contextmanager
def proxied(ports: Sequence[int]) -> Iterator[Server]:
    """Run HAProxy before servers; it goes where the kernel puts it."""
    port = free_port()
    lines = [f"    server r{i} 127.0.0.1:{target}" for i, target in enumerate(ports)]
    haproxy = shutil.which("haproxy") or "/usr/sbin/haproxy"
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "haproxy.cfg"
        file.write_text(_HAPROXY.format(port=port, servers="\n".join(lines)))

        def answers() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
            except httpx.TransportError:
                return False

        before = {child.pid for child in psutil.Process().children(recursive=True)}
        with serving([haproxy, "-db", "-f", str(file)], {}, Path(name), answers) as start:
            found = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
            yield Server(port, found, start, Path(name) / "log")


def proxy_times(server: Server, pngs: Sequence[bytes], seconds: float) -> Row:
    """Measure what HAProxy takes of a request, and how much later its answer is."""
    requests = KINDS["digits"].requests(pngs)

    async def latency_through(at: Server) -> float:
        load = await connect(at, 1)
        seen = await load.closed(requests, 1, seconds)
        load.close()
        return float(np.median(seen.latencies))

    async def spent(proxy: Server, rate: float) -> Row:
        load, before = await connect(proxy, SATURATING), proxy.processor_seconds()
        some = load.poisson(requests, rate, seconds) if rate else load.closed(requests, 16, seconds)
        asked = len((await some).latencies)
        load.close()
        return {"rate": rate, "proxy": (proxy.processor_seconds() - before) / asked}

    with proxied([server.port]) as proxy:
        direct, through = (run(latency_through(at)) for at in (server, proxy))
        together, *at_random = (run(spent(proxy, rate)) for rate in (0, *_PROXY_RATES))
    law = _by_rate(at_random, "proxy")
    return {"together": together["proxy"], **law, "rows": at_random, "later": through - direct}


def processes(root: Path, folder: Path, digits: Sequence[bytes]) -> Row:
    """Measure start, memory and the first requests of a process, and of each model more."""

    async def first(server: Server, kind: Kind) -> list[float]:
        load = await connect(server, 1)
        seen = await load.closed(kind.requests(digits), 1, 0.3)
        load.close()
        return seen.latencies

    found: Row = {"models": {}}
    for model in MODELS:
        sizes: dict[int, tuple[float, int]] = {}
        for count in (1, COPIES + 1):
            copies = folder / f"{model}-{count}"
            publish_copies(root, copies, model, count)
            with served(copies) as server:
                sizes[count] = server.start, server.workers[0].memory_info().rss
                if model == "digits-mlp" and count == 1:
                    # the first request pays for what none has needed before
                    for name in ("digits", "digits-100"):
                        kind = replace(KINDS[name], model="copy-0")
                        times = run(first(server, kind))
                        median = float(np.median(times))
                        found[name] = {"first": times[0], "later": median}
                    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
                    names = [s for s in text.splitlines() if not s.startswith("#")]
                    buckets = sum("_bucket{" in line for line in names)
                    found |= {"series": len(names), "buckets": buckets, "metrics_bytes": len(text)}
                    found["log_bytes"] = _log_bytes(server.log)
        start, memory = sizes[1]
        more = [(b - a) / COPIES for a, b in zip(sizes[1], sizes[COPIES + 1], strict=True)]
        size = sum(f.stat().st_size for f in (root / model / "1").iterdir())
        found["models"][model] = {
            "start": start,
            "memory": memory,
            "start_more": more[0],
            "memory_more": more[1],
            "files": size,
        }
    return found


def _log_bytes(log: Path) -> float:
    """Return bytes of the log line of a request."""
    lines = [line for line in log.read_text().splitlines() if '"milliseconds"' in line]
    return float(np.mean([len(line) + 1 for line in lines]))


@dataclass(frozen=True)
class Setup:
    """What the model is held against."""

    label: str
    processes: int = 1
    workers: int = 1
    proxy: bool = False


SETUPS = (
    Setup("1 worker on a core of its own"),
    Setup("2 workers, a core each, shared with the generator", 2, 2),
    Setup("2 replicas behind HAProxy, on the same cores", 2, 1, True),
)


def batch_times(service: Mapping[str, Any], most: int = MAX_BATCH) -> Floats:
    """Return what a batch of each size takes, from the rows of `service_times`."""
    rows = sorted(service["rows"], key=lambda row: float(row["batch"]))
    sizes, seconds = [r["batch"] for r in rows], [r["seconds"] for r in rows]
    return measured(sizes, seconds, service["each"], most)


def _batches(setup: Setup, parts: Row) -> tuple[Row, Floats]:
    """Return what `held` summarized for a setup, and what a batch of each size takes."""
    found = parts["held"]["shared" if setup.processes > 1 else "own"]
    return found, batch_times(found, HELD_BATCH)


def _others(setup: Setup, parts: Row) -> list[Row]:
    """Return what others take of the cores that two processes run on."""
    if setup.processes == 1:
        return []
    generator = parts["held"]["shared"]["generator"]
    return [generator, parts["proxy"]] if setup.proxy else [generator]


def _by_rate(rows: Sequence[Row], name: str) -> Row:
    """Fit what is taken of a second to `fixed + each * rate`, from seconds of a request."""
    rates = [row["rate"] for row in rows]
    fixed, each, _ = _line(rates, [row["rate"] * row[name] for row in rows])
    return {"fixed": fixed, "each": each}


def _contention(setup: Setup, parts: Row) -> float:
    """Return how much slower the cores of a setup are if all are busy."""
    return float(parts["networks"][HELD]["contention"]) if setup.processes > 1 else 1.0


def predict_throughput(setup: Setup, parts: Row) -> float:
    """Predict requests per second of full batches, from the parts alone."""
    times, _ = _batches(setup, parts)
    each = times["full"] * _contention(setup, parts)
    others = sum(other["together"] for other in _others(setup, parts))
    return float(setup.processes / (each + others))


def predict_random_throughput(setup: Setup, parts: Row) -> float:
    """Predict the most requests per second that can be served if they come at random."""
    (_, batches), others = _batches(setup, parts), _others(setup, parts)
    each = batches[-1] / HELD_BATCH * _contention(setup, parts)
    left = setup.processes - sum(other["fixed"] for other in others)
    return float(left / (each + sum(other["each"] for other in others)))


def predict_latency(setup: Setup, parts: Row, asked: float, full: float) -> float:
    """Predict the mean latency in seconds at `asked` requests/s: the median of simulated runs.

    Batches are scaled to the throughput `full` of the setup: the parts were measured at other
    times and, of two, on one of the cores, when the machine was faster or slower.
    """
    (times, batches), others = _batches(setup, parts), _others(setup, parts)
    contention = _contention(setup, parts)
    each = setup.processes / full - sum(other["together"] for other in others)
    batches *= each / (times["full"] * contention)
    taken = sum(o["fixed"] + o["each"] * asked for o in others) / setup.processes
    stretch, means = 1 / (1 - taken), []
    for seed in range(_RUNS):
        law = Law(batches * stretch, times["spread"], max_wait=30, choices=2 if setup.proxy else 1)
        mean, busy, _ = steady(law, setup.processes, asked, _SLICE, seed)
        # how busy the other is depends on how slow it is
        stretch = (1 + (contention - 1) * busy) / (1 - taken)
        means.append(mean)
    around = times["around"] + times["late"] + (parts["proxy"]["later"] if setup.proxy else 0)
    return float(np.median(means) + around)


Measure = Callable[[Sequence[float]], Awaitable[Row]]
"""Measures something, if it is told the throughput of each process just before."""


@dataclass
class Running:
    """Servers that run, and connections to them.

    The rows have what was measured, and the throughputs before and after it, of each process. Those
    count whose throughputs are about equal. Times in them are for the machine at its mean speed.
    """

    load: Load
    cores: Sequence[int]  # that the generator takes in turns
    clients: int  # that keep each port's process busy
    requests: Iterator[bytes]
    measures: Sequence[Measure]
    rows: list[list[Row]] = field(default_factory=list)

    async def throughput(self) -> list[float]:
        """Return requests per second of each process if all batches are full."""
        seen = await self.load.closed(self.requests, self.clients, _BRIEF, _WARM)
        return [done / seen.seconds for done in seen.each]

    async def turn(self) -> None:
        """Measure everything once."""
        self.rows = self.rows or [[] for _ in self.measures]
        async with generator_on(self.cores):
            before = await self.throughput()
            for measure, rows in zip(self.measures, self.rows, strict=True):
                row = await measure(before)
                after = await self.throughput()
                full = (sum(before) + sum(after)) / 2
                rows.append(row | {"before": before, "after": after, "full": full})
                before = after

    def mean(self) -> float:
        """Return the mean throughput."""
        return float(np.mean([row["full"] for rows in self.rows for row in rows]))

    def counted(self) -> list[list[Row]]:
        """Return the rows that count."""
        mean = self.mean()

        def counts(row: Row) -> bool:
            pairs = zip(row["before"], row["after"], strict=True)
            return all(min(pair) > (1 - STEADY) * max(pair) for pair in pairs)

        def scaled(row: Row) -> Row:
            speed = row["full"] / mean
            times = {name: row[name] * speed for name in _TIMES if name in row}
            return row | times | {name: row[name] / speed for name in _RATES if name in row}

        return [[scaled(row) for row in rows if counts(row)] for rows in self.rows]


_TIMES = "seconds", "latency", "deviation", "late", "generator"
_RATES = "rate", "asked"


async def measure_latency(
    load: Load,
    requests: Iterator[bytes],
    ratio: Callable[[], float],
    share: float,
    full: Sequence[float],
) -> Row:
    """Measure the mean latency of requests that come at random, a share of what can be served.

    That is `ratio` of the throughput of full batches, of which each process has `full`.
    """
    asked, seed = share * ratio() * sum(full), random.getrandbits(32)
    seen = await load.poisson(requests, asked, _SLICE, seed, full)
    return {
        "load": share,
        "asked": asked,
        "latency": float(np.mean(seen.latencies)),
        "late": float(np.mean(seen.late)),
        "generator": seen.generator / len(seen.latencies),
    }


@asynccontextmanager
async def generator_on(cores: Sequence[int]) -> AsyncIterator[None]:
    """Keep this thread on a core, or take as much of each in turns: the kernel would of one."""
    before, others = os.sched_getaffinity(0), cycle(cores)

    async def move() -> None:
        for core in others:
            os.sched_setaffinity(0, {core})
            await asyncio.sleep(_TURN)

    moving = asyncio.create_task(move())
    try:
        yield
    finally:
        moving.cancel()
        os.sched_setaffinity(0, before)


async def parts_running(
    stack: ExitStack, root: Path, requests: Iterator[bytes]
) -> dict[str, Running]:
    """Start a process whose batches are measured, its core shared with the generator or not."""
    server = stack.enter_context(served(root, max_batch=HELD_BATCH))
    load = await connect(server, CONNECTIONS)
    stack.callback(load.close)

    def clients(count: int) -> Measure:
        return lambda _full: batches_of(server, load.closed(requests, count, _BRIEF))

    def at_random(share: float) -> Measure:
        return lambda full: batches_of(server, load.poisson(requests, share * sum(full), _BRIEF))

    measures = [clients(1), *map(at_random, SHARES), clients(SATURATING)]
    return {
        name: Running(load, cores, SATURATING, requests, measures)
        for name, cores in (("own", [0]), ("shared", [1]))
    }


async def setup_running(
    stack: ExitStack, root: Path, requests: Iterator[bytes], setup: Setup, parts: Row
) -> Running:
    """Start a setup; while it is not measured it waits, and takes nothing."""
    cores = [(1,)] if setup.processes == 1 else [(0, 1)] if setup.workers > 1 else [(0,), (1,)]
    servers = [stack.enter_context(served(root, setup.workers, c, HELD_BATCH)) for c in cores]
    ports, front = 1, servers[0]
    if setup.proxy:
        proxy = stack.enter_context(proxied([server.port for server in servers]))
        ports, front = len(servers), proxy
    load = await connect(front, ports * CONNECTIONS)
    stack.callback(load.close)

    def ratio() -> float:
        return predict_random_throughput(setup, parts) / predict_throughput(setup, parts)

    measures = [partial(measure_latency, load, requests, ratio, share) for share in LOADS]
    return Running(load, range(setup.processes), ports * SATURATING, requests, measures)


def held(parts: Running) -> Row:
    """Summarize the batches of a process that have been measured so far."""
    rows = [_medians(rows or all_) for rows, all_ in zip(parts.counted(), parts.rows, strict=True)]
    *rest, full = rows
    _, *at_random = rest
    return service(KINDS[HELD], rest) | {
        "full": full["seconds"] / full["batch"],
        "late": float(np.mean([row["late"] for row in at_random])),
        "generator": {"together": full["generator"], **_by_rate(at_random, "generator")},
    }


def compare(root: Path, result: Row, pngs: Sequence[bytes]) -> None:
    """Measure batches of one process and the setups in turns; then predict, and note both."""
    requests = KINDS[HELD].requests(pngs)

    async def measure() -> tuple[list[Running], list[Running]]:
        with ExitStack() as stack:
            parts = await parts_running(stack, root, requests)
            setups = [await setup_running(stack, root, requests, s, result) for s in SETUPS]
            for _ in follow(range(ROUNDS), "rounds"):
                for each in parts.values():
                    await each.turn()
                result["held"] = {name: held(each) for name, each in parts.items()}
                for each in setups:
                    await each.turn()
        return [*parts.values()], setups

    parts, setups = run(measure())
    counts = [len(rows) for each in (*parts, *setups) for rows in each.counted()]
    if min(counts) < LEAST:
        raise SystemExit(f"{min(counts)} of {ROUNDS} rounds count: is the machine quiet?")
    for setup, each in zip(SETUPS, setups, strict=True):
        full = {"predicted": predict_throughput(setup, result), "measured": each.mean()}
        loads = []
        for counted, rows in zip(each.counted(), each.rows, strict=True):
            row = _medians(counted)
            row["predicted"] = predict_latency(setup, result, row["asked"], full["measured"])
            row |= {"measured": row["latency"], "rounds": len(counted), "all": rows}
            loads.append(row)
        full["rounds"] = sum(map(len, each.rows))
        result["validation"].append({"label": setup.label, "throughput": full, "loads": loads})


def _medians(rows: Sequence[Row]) -> Row:
    single = [key for key in rows[0] if key not in ("before", "after")]
    return {key: float(np.median([row[key] for row in rows])) for key in single}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts, predict, measure the whole, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("DROPSERVE_DATA_DIR", "data"))
    )
    parser.add_argument("--parts", type=Path, help="take the parts from these results")
    parser.add_argument("--json", type=Path, help="file of results, by default bench/results")
    options = parser.parse_args(arguments)
    if not shutil.which("haproxy") and not Path("/usr/sbin/haproxy").exists():
        raise SystemExit("HAProxy is needed: apt-get install --no-install-recommends haproxy")
    root = CACHE / "capacity"
    data = publish(root, options.data_dir)
    pngs = files(data)
    small = files(load_dataset("digits", options.data_dir))

    def images(kind: Kind) -> list[bytes]:
        return small if kind.model == "digits-mlp" else pngs

    console = Console()
    if options.parts:
        result = json.loads(options.parts.read_text())
    else:
        load = round(os.getloadavg()[0], 1)  # of others, while this was not measuring yet
        result = {"load": load, "data": data.name, "networks": networks(root, 0.2)}
        with on_core(0), served(root) as server:
            result["services"] = {
                name: service(kind, run(service_times(server, kind, images(kind), 0.8)))
                for name, kind in follow(KINDS.items(), "service times", len(KINDS))
            }
            result["proxy"] = proxy_times(server, small, 2)
        with tempfile.TemporaryDirectory() as folder, on_core(0):
            result["processes"] = processes(root, Path(folder), small)
    target: Path = options.json or RESULTS
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    result |= {**about, "versions": versions(), "validation": []}
    compare(root, result, pngs)
    target.write_text(json.dumps(result, indent=2) + "\n")
    for shown in tables(result):
        console.print(shown)
    differences = [f.difference for row in result["validation"] for f in compared(row)]
    if (worst := max(differences, key=abs)) and abs(worst) > MOST:
        raise SystemExit(f"a prediction is {worst:+.0%} off: is the machine quiet?")


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Show what was measured and predicted."""
    shown = Table("request", "fixed us", "each us", "error", "around us", "spread", "generator us")
    for row in result["services"].values():
        figures = [1e6 * row["fixed"], 1e6 * row["each"], 100 * row["error"], 1e6 * row["around"]]
        figures += [100 * row["spread"], 1e6 * row["generator"]]
        shown.add_row(row["label"], *(f"{figure:,.0f}" for figure in figures))
    yield shown
    shown = Table("setup", "figure", "predicted", "measured", "difference", "rounds")
    for row in result["validation"]:
        for found in compared(row):
            difference = f"{100 * found.difference:+.1f}%"
            cells = f"{found.predicted:,.2f}", f"{found.measured:,.2f}", difference
            shown.add_row(row["label"], found.name, *cells, str(found.rounds))
    yield shown


@dataclass(frozen=True)
class Compared:
    """A figure as it was predicted and measured, with its unit, by so many rounds."""

    name: str
    predicted: float
    measured: float
    rounds: int

    @property
    def difference(self) -> float:
        """Of what was measured from what was predicted, as a part of it."""
        return self.measured / self.predicted - 1


def compared(row: Mapping[str, Any]) -> Iterator[Compared]:
    """Compare throughput and mean latencies of a setup."""

    def of(name: str, found: Row, unit: float = 1) -> Compared:
        return Compared(name, unit * found["predicted"], unit * found["measured"], found["rounds"])

    yield of("throughput, requests/s", row["throughput"])
    for found in row["loads"]:
        yield of(f"mean latency at {found['load']:.0%}, ms", found, 1e3)


if __name__ == "__main__":
    main()
