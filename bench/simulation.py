"""Simulates clusters of measured replicas: `python -m bench.simulation`.

Bursts, deaths, rolling updates and Kubernetes' autoscaler, at 10, 100 and 1,000 replicas, every
request of them. What a batch takes, how long a process starts and what its first request costs are
those of results/scaling/capacity.json; writes results/scaling/simulation.json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from math import ceil, inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numba import njit
from rich.console import Console
from rich.table import Table

from bench import capacity
from bench.cluster import Law, percentile, record, replicas, run
from bench.progress import follow
from dropserve.lab.machine import machine

RESULTS = Path(__file__).parent / "results" / "scaling" / "simulation.json"
KIND = "cnn"
SIZES = (10, 100, 1000)
SHARE = 0.4
"""Of a replica's throughput with full batches, that it is asked for before anything happens."""
POD = 5.0
"""Seconds from the order for a pod on a node that has the image to the start of its process, and
from there to the probe that finds it ready, without what the process takes to start."""
DETECTION = 6
"""Seconds until nothing more is sent to a dead machine: three checks of a proxy, 2 s apart."""
SYNC = 15
"""Seconds between two looks of the autoscaler, and between two scrapes of a metric."""
TOLERANCE = 0.1
"""Of the autoscaler: a metric that is so near to its target changes nothing."""
STABILIZATION = 300
"""Seconds of which the autoscaler takes the largest number that it has wanted, before it removes
replicas."""
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
BURSTS = (1.5, 2.0, 3.0, 5.0)
PERCENTILES = (50, 99, 99.9)

Row = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What was measured of a replica: its law, seconds to be ready, seconds of a cold start."""

    law: Law
    start: float
    cold: float

    @property
    def capacity(self) -> float:
        """Return requests per second of a replica with full batches."""
        return float((len(self.law.times) - 1) / self.law.times[-1])


def read_parts(path: Path, kind: str = KIND) -> Parts:
    """Read what `make bench-capacity` measured."""
    result = json.loads(path.read_text())
    times = result["services"][kind]
    first = result["processes"]["digits"]
    law = Law(capacity.batch_times(times), times["spread"])
    start = result["processes"]["models"][capacity.KINDS[kind].model]["start"]
    return Parts(law, POD + start, max(0.0, first["first"] - first["later"]))


class Cluster:
    """Replicas that come and go, and the seconds of a simulation."""

    def __init__(self, parts: Parts, count: int, most: int, seconds: int, choices: int) -> None:
        self.law, self._parts = parts.law._replace(choices=choices), parts
        self.all = replicas(most, self.law)
        self.found = record(seconds + 1)
        self.ready = list(range(count))
        self.starting: list[tuple[float, int]] = []
        self._spare = list(range(count, most))
        self._random = np.random.default_rng(0)
        self._run = _compiled()
        self.now = 0
        self.sizes: list[int] = []
        self.asked: list[float] = []

    @property
    def size(self) -> int:
        """Return how many there are, ready or not."""
        return len(self.ready) + len(self.starting)

    def second(self, rate: float) -> None:
        """Simulate one second at a rate of all requests."""
        started = [slot for at, slot in self.starting if at <= self.now]
        self.starting = [(at, slot) for at, slot in self.starting if at > self.now]
        self.ready += started
        slots = np.array(self.ready)
        times = float(self.now), float(self.now + 1)
        self._run(self.all, self.law, slots, self._random, *times, rate, self.found)
        self.sizes.append(len(self.ready))
        self.asked.append(rate)
        self.now += 1

    def add(self, count: int) -> None:
        """Order replicas; they are ready when they have started, and their first batch is cold."""
        for _ in range(min(count, len(self._spare))):
            slot = self._spare.pop(0)
            self.all.free[slot] = 0.0
            self.all.debt[slot] = self._parts.cold
            self.starting.append((self.now + self._parts.start, slot))

    def remove(self, count: int) -> None:
        """Send nothing more to the oldest replicas: they finish what they have."""
        while count and self.starting:
            self._spare.append(self.starting.pop()[1])
            count -= 1
        for slot in self.ready[:count]:
            self._spare.append(slot)
        del self.ready[:count]

    def kill(self, count: int) -> list[int]:
        """End replicas in the middle of their work: it is lost, and so is what they get."""
        dead = self.ready[:count]
        for slot in dead:
            self.found.lost[self.now] += self.all.waiting[slot]
            if self.all.free[slot] > self.now:
                self.found.lost[self.now] += self.all.served[slot]
            self.all.waiting[slot], self.all.free[slot] = 0, inf
        return dead

    def forget(self, dead: Sequence[int]) -> None:
        """Send nothing more to replicas."""
        self.ready = [slot for slot in self.ready if slot not in dead]

    def summary(self, start: int, end: int) -> Row:
        """Return percentiles in milliseconds and parts of requests, of so many seconds."""
        of = slice(start, end)
        latencies, refused, lost = (field_[of] for field_ in self.found[:3])
        all_ = int(latencies.sum() + refused.sum() + lost.sum())
        row = {f"p{p:g}": 1000 * percentile(latencies, p) for p in PERCENTILES}
        counts = {"refused": int(refused.sum()), "lost": int(lost.sum())}
        return {**row, **counts, "requests": all_, "replicas": max(self.sizes[of])}

    def timeline(self) -> Row:
        """Return figures of each second."""
        rows = [self.summary(i, i + 1) for i in range(self.now)]
        kept = {k: [round(row[k], 3) for row in rows] for k in ("p50", "p99", "p99.9", "refused")}
        return {
            **kept,
            "lost": [r["lost"] for r in rows],
            "replicas": self.sizes,
            "rate": self.asked,
        }


@cache
def _compiled() -> Callable[..., None]:
    """Compile the simulation, once a process: it is a hundred times as fast."""
    compiled: Callable[..., None] = njit()(run)
    return compiled


class Targets(TypedDict, total=False):
    """What an autoscaler aims at, on average over replicas; what is absent is not looked at.

    Attributes:
        cpu: part of time in which a replica is busy.
        queue: images that wait.
        rate: requests answered a second.
    """

    cpu: float
    queue: float
    rate: float


@dataclass
class Autoscaler:
    """Kubernetes' HorizontalPodAutoscaler, with its defaults.

    Metrics are as old as they are in a cluster: a scrape says what the last `SYNC` seconds were,
    and is looked at up to `SYNC` seconds later. Replicas that are not ready count as idle.

    Attributes:
        cluster: what is scaled.
        least: replicas.
        targets: of its metrics; the one that wants the most replicas decides.
        window: seconds of stabilization before replicas are removed.
        changes: of the number of replicas.
    """

    cluster: Cluster
    least: int
    targets: Targets
    window: int = STABILIZATION
    changes: int = field(default=0, init=False)
    _busy: float = field(default=0.0, init=False)
    _answered: float = field(default=0.0, init=False)
    _usage: list[tuple[float, float]] = field(default_factory=list, init=False)  # sum, target
    _wanted: list[tuple[int, int]] = field(default_factory=list, init=False)

    def look(self) -> None:
        """Scrape, and change the number of replicas, when it is time to; call it each second."""
        now = self.cluster.now
        if now % SYNC == SYNC // 2:
            self._scrape()
        if now % SYNC == 0 and self._usage:
            self._scale(now)

    def _scrape(self) -> None:
        cluster = self.cluster
        busy, answered = cluster.all.busy.sum(), cluster.found.latencies.sum()
        waiting = cluster.all.waiting[cluster.ready].sum()
        found = [
            ((busy - self._busy) / SYNC, self.targets.get("cpu")),
            (float(waiting), self.targets.get("queue")),
            ((answered - self._answered) / SYNC, self.targets.get("rate")),
        ]
        first, self._busy, self._answered = self._busy == 0, busy, answered
        self._usage = [] if first else [(used, goal) for used, goal in found if goal]

    def _scale(self, now: int) -> None:
        cluster = self.cluster
        size = cluster.size
        ratios = [usage / target / size for usage, target in self._usage]
        wanted = size
        if abs(max(ratios) - 1) > TOLERANCE:
            wanted = max(self.least, ceil(max(ratios) * size))
        self._wanted = [each for each in self._wanted if each[0] > now - self.window]
        self._wanted.append((now, wanted))
        wanted = min(wanted, max(2 * size, size + 4))
        if wanted < size:
            wanted = min(size, max(number for _, number in self._wanted))
        self.changes += wanted != size
        if wanted > size:
            cluster.add(wanted - size)
        else:
            cluster.remove(size - wanted)


def burst(parts: Parts, size: int, choices: int, times: float) -> Row:
    """Ask for `times` as much for 20 of 60 seconds; nothing scales."""
    cluster = Cluster(parts, size, size, 60, choices)
    for second in range(60):
        in_burst = 20 <= second < 40
        cluster.second(SHARE * parts.capacity * size * (times if in_burst else 1))
    about = {"size": size, "choices": choices, "times": times}
    return {
        **about,
        "before": cluster.summary(5, 20),
        "within": cluster.summary(20, 40),
        "timeline": cluster.timeline(),
    }


def death(parts: Parts, size: int, choices: int, share: float) -> Row:
    """Kill one replica, or a share of them, after 10 of 40 seconds; they are replaced."""
    count = max(1, round(share * size))
    cluster = Cluster(parts, size, size + count, 40, choices)
    dead: list[int] = []
    for second in range(40):
        if second == 10:
            dead = cluster.kill(count)
        if second == 10 + DETECTION:
            cluster.forget(dead)
            cluster.add(count)
        cluster.second(SHARE * parts.capacity * size)
    about = {"size": size, "choices": choices, "killed": count}
    return {
        **about,
        "before": cluster.summary(5, 10),
        "within": cluster.summary(10, 40),
        "timeline": cluster.timeline(),
    }


def update(parts: Parts, size: int, choices: int, surge: float, unavailable: float) -> Row:
    """Replace all replicas, as a Deployment does; the rate stays the same."""
    most, least = size + ceil(surge * size), size - int(unavailable * size)
    seconds = 120
    cluster = Cluster(parts, size, 2 * most, seconds, choices)
    old, ended = size, 0
    for second in range(seconds):
        if second >= 10:
            new = cluster.size - old
            gone = min(old, max(0, len(cluster.ready) - least))
            cluster.ready = cluster.ready[gone:]
            old -= gone
            cluster.add(min(size - new, most - cluster.size))
            if not old and not cluster.starting and not ended:
                ended = second
        cluster.second(SHARE * parts.capacity * size)
    about = {"size": size, "choices": choices, "surge": surge, "unavailable": unavailable}
    return {
        **about,
        "seconds": ended - 10,
        "least": min(cluster.sizes),
        "before": cluster.summary(5, 10),
        "within": cluster.summary(10, ended or seconds),
        "timeline": cluster.timeline(),
    }


def scale(parts: Parts, size: int, times: float, targets: Targets, seconds: int = 150) -> Row:
    """Ask for `times` as much after 60 seconds, of replicas that the targets have settled."""
    settled = settle(parts, targets)
    cluster = Cluster(parts, size, 12 * size, 60 + seconds, 1)
    scaler = Autoscaler(cluster, size, targets)
    for second in range(60 + seconds):
        scaler.look()
        cluster.second(settled * size * (times if second >= 60 else 1))
    about = {"size": size, "times": times, "targets": targets, "rate": settled}
    return {
        **about,
        "before": cluster.summary(15, 60),
        "within": cluster.summary(60, 120),
        "after": cluster.summary(cluster.now - 30, cluster.now),
        "timeline": cluster.timeline(),
    }


def settle(parts: Parts, targets: Targets) -> float:
    """Find requests per second of a replica that is at a target of its CPU; or its rate itself."""
    if "cpu" not in targets:
        return targets.get("rate", SHARE * parts.capacity)
    low, high, wanted = 0.0, parts.capacity, targets["cpu"]
    for _ in range(12):
        middle = (low + high) / 2
        cluster = Cluster(parts, 4, 4, 5, 1)
        for _ in range(5):
            cluster.second(4 * middle)
        is_less = cluster.all.busy.sum() / 20 < wanted
        low, high = (middle, high) if is_less else (low, middle)
    return low


def flapping(parts: Parts, size: int, window: int) -> Row:
    """Ask for a quarter more and less, in turns of two minutes, for twenty."""
    targets: Targets = {"cpu": 0.7}
    settled = settle(parts, targets)
    cluster = Cluster(parts, size, 4 * size, 1200, 1)
    scaler = Autoscaler(cluster, 1, targets, window)
    for second in range(1200):
        scaler.look()
        cluster.second(settled * size * (1.25 if second // 120 % 2 else 0.75))
    mean = float(np.mean(cluster.sizes))
    return {"window": window, "changes": scaler.changes, "mean": mean} | cluster.summary(60, 1200)


def utilisation(parts: Parts, share: float) -> Row:
    """Ask ten replicas for a share of what they can do, for 20 seconds."""
    cluster = Cluster(parts, 10, 10, 20, 1)
    for _ in range(20):
        cluster.second(share * parts.capacity * 10)
    busy = float(cluster.all.busy.sum() / 200)
    return {"share": share, "rate": share * parts.capacity, "busy": busy} | cluster.summary(2, 20)


def plan(
    parts: Parts, sizes: Sequence[int]
) -> list[tuple[str, Callable[..., Row], tuple[Any, ...]]]:
    """List what is simulated: the list that its row joins, the function, its arguments."""
    found: list[tuple[str, Callable[..., Row], tuple[Any, ...]]] = []
    for size in reversed(sizes):
        for choices in (1, 2):
            found += [("bursts", burst, (parts, size, choices, times)) for times in (2.0, 3.0)]
            found += [("deaths", death, (parts, size, choices, share)) for share in (0.0, 1 / 3)]
        for surge, unavailable in ((0.25, 0.0), (0.0, 0.25)):
            found.append(("updates", update, (parts, size, 2, surge, unavailable)))
    found.append(("scaled", scale, (parts, max(sizes), 3.0, {"cpu": 0.7}, 90)))
    for target in TARGETS:
        for times in BURSTS:
            found.append(("targets", scale, (parts, 20, times, {"cpu": target})))
    for times in BURSTS:
        found.append(("targets", scale, (parts, 20, times, {"queue": 8.0})))
        found.append(("targets", scale, (parts, 20, times, {"cpu": 0.7, "queue": 8.0})))
        found.append(("targets", scale, (parts, 20, times, {"rate": SHARE * parts.capacity})))
    found += [("flapping", flapping, (parts, 20, window)) for window in (0, STABILIZATION)]
    shares = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    found += [("utilisation", utilisation, (parts, share)) for share in shares]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capacity", type=Path, default=capacity.RESULTS, help="measured parts")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="of clusters")
    parser.add_argument("--json", type=Path, help="file of results, by default bench/results")
    options = parser.parse_args(arguments)
    if options.json is None and options.sizes != list(SIZES):
        parser.error("a part would overwrite the results of the whole: name a file with --json")
    if not options.capacity.exists():
        raise SystemExit(f"there is no {options.capacity}: make bench-capacity measures it")
    parts = read_parts(options.capacity)
    result: Row = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "kind": capacity.KINDS[KIND].label,
        "spread": parts.law.spread,
        "capacity": parts.capacity,
        "start": parts.start,
        "cold": parts.cold,
        "share": SHARE,
    }
    planned = plan(parts, options.sizes)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = [pool.submit(function, *given) for _, function, given in planned]
        for (name, _, _), future in follow(
            zip(planned, running, strict=True), "simulation", len(planned)
        ):
            result.setdefault(name, []).append(future.result())
    for name in ("bursts", "deaths", "updates", "targets"):
        for row in result[name]:
            if name == "targets" or row["size"] < max(options.sizes):
                del row["timeline"]  # only those of the largest are drawn
    target: Path = options.json or RESULTS
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result) + "\n")
    console = Console()
    for name in ("utilisation", "bursts", "deaths", "updates", "scaled", "targets", "flapping"):
        console.print(table(name, result[name]))


def table(title: str, rows: Sequence[Row]) -> Table:
    """Show rows: what was asked, and the figures of the time in question."""
    figures = ("p50", "p99", "p99.9", "refused", "lost", "requests", "replicas")
    about = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    about = [key for key in about if key not in figures] + ["targets"] * ("targets" in rows[0])
    shown = Table(*about, *figures, title=title)
    for row in rows:
        cells = [f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in about]
        shown.add_row(*cells, *(f"{row.get('within', row)[k]:,.4g}" for k in figures))
    return shown


if __name__ == "__main__":
    main()
