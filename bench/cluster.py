"""A discrete-event simulation of replicas that serve in batches, as `service/inference/batcher.py`.

A batch is what waits, up to `max_batch`, and takes as long as one of its size was measured to. What
would wait too long, by the estimate that the batcher makes, is refused. A request goes to the one
with the fewest requests among `choices` replicas chosen at random: 1 is random balancing, as many
as there are is least connections. Only the replicas that were chosen are brought up to date when a
request arrives: nothing else is asked of the others, so there is no list of events to keep.

`run` is plain Python over arrays, which numba can compile: then a request takes a tenth of a
microsecond.
"""

from collections.abc import Sequence
from math import ceil, inf, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dropserve.service.inference.batcher import SURE

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
LEAST, WIDTH = 1e-5, 0.02
"""Of the histogram of latencies: seconds of its first bin, and how much wider each is."""
BINS = int(log(1e3 / LEAST) / WIDTH)
_DECAY = 0.8  # of the batcher's mean cost of a request


class Law(NamedTuple):
    """What a replica does with requests; times in seconds.

    Attributes:
        times: of a batch, by its number of requests, up to the most; of none 0.
        spread: part of a batch's time that is exponentially distributed, not fixed; it is also the
            coefficient of variation.
        max_queue: requests.
        max_wait: that a request may wait.
        refusal: that refusing one takes.
        choices: replicas between which one is chosen.
    """

    times: Floats
    spread: float = 0.0
    max_queue: int = 1024
    max_wait: float = 2.0
    refusal: float = 40e-6
    choices: int = 1


def linear(fixed: float, each: float, most: int = 64) -> Floats:
    """Return times of batches that take `fixed + each * n` seconds."""
    times: Floats = fixed + each * np.arange(most + 1.0)
    times[0] = 0
    return times


def measured(
    sizes: Sequence[float], seconds: Sequence[float], each: float, most: int = 64
) -> Floats:
    """Return times of batches between sizes that were measured; beyond, `each` for one more."""
    n = np.arange(most + 1.0)
    times: Floats = np.interp(n, [0, *sizes], [0, *seconds])
    times[1:] = np.maximum.accumulate(times[1:]) + each * np.maximum(0, n[1:] - max(sizes))
    return times


class Replicas(NamedTuple):
    """The state of N replicas.

    Attributes:
        queue: times of arrival, a ring [N, max_queue].
        head, waiting: where its first is, and how many wait [N].
        last: requests of the last batch that they make up [N].
        served: requests of the batch under way, or of the last one [N].
        begun, free: when it began, and ends; inf: the replica is dead [N].
        busy: seconds that all batches took [N].
        debt: seconds that the next one takes more [N].
        cost, units: decayed seconds and requests of batches, for the mean cost [N].
    """

    queue: Floats
    head: Counts
    waiting: Counts
    last: Counts
    served: Counts
    begun: Floats
    free: Floats
    busy: Floats
    debt: Floats
    cost: Floats
    units: Floats


class Record(NamedTuple):
    """What became of requests, by the second in which they arrived.

    Attributes:
        latencies: histogram [seconds, BINS].
        refused, lost: counts [seconds].
        total: seconds of all latencies [1].
    """

    latencies: Counts
    refused: Counts
    lost: Counts
    total: Floats


def replicas(count: int, law: Law) -> Replicas:
    """Make so many, idle, of which each has run batches of one."""
    head, waiting, last, served = np.zeros((4, count), np.int64)
    begun, free, busy, debt = np.zeros((4, count))
    cost, units = np.full(count, law.times[1]), np.ones(count)
    queue = np.zeros((count, law.max_queue))
    return Replicas(queue, head, waiting, last, served, begun, free, busy, debt, cost, units)


def record(seconds: int) -> Record:
    """Make one of so many seconds."""
    refused, lost = np.zeros((2, seconds), np.int64)
    return Record(np.zeros((seconds, BINS), np.int64), refused, lost, np.zeros(1))


def run(  # noqa: C901  numba compiles a function with its own inner ones, and no others
    all_: Replicas,
    law: Law,
    ready: Counts,
    random: np.random.Generator,
    start: float,
    end: float,
    rate: float,
    found: Record,
) -> None:
    """Send `rate` requests a second, a Poisson process, to those that are `ready`; to `end`."""
    size, max_batch = all_.queue.shape[1], len(law.times) - 1

    def advance(i: int, now: float) -> None:
        """Run the batches that begin until now."""
        while all_.waiting[i] > 0:
            head = all_.head[i]
            begin = max(all_.free[i], all_.queue[i, head])
            if begin > now:
                break
            n = 0
            while (
                n < all_.waiting[i] and n < max_batch and all_.queue[i, (head + n) % size] <= begin
            ):
                n += 1
            seconds = law.times[n]
            if law.spread > 0:
                seconds *= 1 - law.spread + law.spread * random.exponential()
            all_.cost[i] = _DECAY * all_.cost[i] + seconds
            all_.units[i] = _DECAY * all_.units[i] + n
            seconds += all_.debt[i]
            all_.debt[i] = 0.0
            for k in range(n):
                arrived = all_.queue[i, (head + k) % size]
                latency = begin + seconds - arrived
                column = min(max(int(log(latency / LEAST) / WIDTH), 0), BINS - 1)
                found.latencies[int(arrived), column] += 1
                found.total[0] += latency
            all_.head[i] = (head + n) % size
            all_.waiting[i] -= n
            all_.served[i] = n
            all_.begun[i], all_.free[i] = begin, begin + seconds
            all_.busy[i] += seconds

    now, count = start, len(ready)
    while True:
        now += random.exponential() / rate
        if now >= end:
            break
        best, least = -1, 0
        for k in range(min(law.choices, count)):
            # all of them in turn, from a random one on, or some at random
            if k == 0 or law.choices < count:
                place = int(random.random() * count)
            else:
                place = (place + 1) % count
            i = ready[place]
            if all_.free[i] < inf:
                advance(i, now)
            held = all_.waiting[i] + (all_.served[i] if all_.free[i] > now else 0)
            if best < 0 or held < least:
                best, least = i, held
        if all_.free[best] == inf:  # nobody answers
            found.lost[int(now)] += 1
            all_.served[best] += 1
            continue
        if least > 0:
            unit = all_.cost[best] / all_.units[best]
            waiting = all_.waiting[best]
            rest = 0.0
            if all_.free[best] > now:
                rest = abs(all_.served[best] * unit - (now - all_.begun[best]))
            shared = min(all_.last[best], waiting)
            if shared >= max_batch:
                shared = 0
            expected = rest + (waiting - shared) * unit
            if waiting >= law.max_queue or expected > SURE * law.max_wait:
                found.refused[int(now)] += 1
                all_.debt[best] += law.refusal
                continue
        if all_.waiting[best] == 0 or all_.last[best] >= max_batch:
            all_.last[best] = 0
        all_.last[best] += 1
        all_.queue[best, (all_.head[best] + all_.waiting[best]) % size] = now
        all_.waiting[best] += 1
    for i in range(len(all_.free)):  # of those that are not ready, too: they finish
        if all_.free[i] < inf:
            advance(i, end)


def steady(
    law: Law, count: int, rate: float, seconds: float, seed: int = 0
) -> tuple[float, float, Record]:
    """Simulate a steady rate; return the mean latency, and the part of time that one is busy."""
    random, found = np.random.default_rng(seed), record(ceil(seconds))
    all_, ready = replicas(count, law), np.arange(count)
    run(all_, law, ready, random, 0.0, seconds, rate, found)
    mean = found.total[0] / found.latencies.sum()
    return float(mean), float(all_.busy.sum() / count / seconds), found


def mean_latency(fixed: float, each: float, rate: float) -> float:
    """Return the mean latency of one replica where a batch follows a batch; else it is less.

    A batch is as long as the one before it made it: n is Poisson in that length, whose mean and
    variance follow from `fixed + each * n`. A request comes, more probably into a long one, waits
    for half of it on average, and shares the next with all that came in it, itself too. This is
    the upper bound of Inoue (2021), Queueing analysis of GPU-based inference servers with dynamic
    batching.
    """
    load = rate * each
    mean = fixed / (1 - load)
    length = mean + each**2 * rate / (1 - load**2)
    return length / 2 + fixed + each * (1 + rate * length)


def percentile(latencies: Counts, percent: float) -> float:
    """Return a percentile of histograms [..., BINS], in seconds; 0: there was no request."""
    sums = latencies.reshape(-1, BINS).sum(0).cumsum()
    if not sums[-1]:
        return 0.0
    found = np.searchsorted(sums, percent / 100 * sums[-1])
    return float(LEAST * np.exp((found + 0.5) * WIDTH))
