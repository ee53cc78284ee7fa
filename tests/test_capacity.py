"""The simulated cluster, against closed forms of queueing theory, and the page of its figures."""

import json

import numpy as np
import pytest

from bench import capacity, scaling, simulation
from bench.cluster import Law, linear, mean_latency, percentile, steady

FREE = {"max_wait": 1e9, "max_queue": 4096}
SINGLE = linear(0, 0.1, most=1)


def batches_of_one_length(fixed, rate):
    """Mean latency if a batch takes as long, however large: a busy server has half of it left."""
    idle = np.exp(-rate * fixed) / rate
    return fixed + fixed / 2 * fixed / (fixed + idle)


def two_choices(rate, service):
    """Mean time in many M/M/1 queues, the shorter of two chosen (Mitzenmacher, 2001)."""
    return service * sum((rate * service) ** (2**i - 2) for i in range(1, 12))


@pytest.mark.parametrize(
    ("law", "count", "rate", "expected"),
    [
        (Law(SINGLE, spread=1, **FREE), 1, 7, 0.1 / (1 - 0.7)),  # M/M/1
        (Law(SINGLE, **FREE), 1, 7, 0.1 * (1 + 0.7 / 2 / (1 - 0.7))),  # M/D/1
        (Law(linear(0.1, 0), **FREE), 1, 15, batches_of_one_length(0.1, 15)),
        (Law(linear(0.1, 0.01), **FREE), 1, 60, mean_latency(0.1, 0.01, 60)),
        (Law(SINGLE, spread=1, choices=2, **FREE), 60, 480, two_choices(8, 0.1)),
    ],
    ids=["M/M/1", "M/D/1", "batches of one length", "linear batches", "two choices"],
)
def test_mean_latency_is_that_of_the_closed_form(law, count, rate, expected):
    seconds = 50_000 // rate
    mean, _, _ = steady(law, count, rate, seconds)
    assert mean == pytest.approx(expected, rel=0.06)


def test_what_would_wait_too_long_is_refused_and_no_more():
    law = Law(linear(0, 0.01, most=1), max_wait=1.0)
    _, busy, found = steady(law, 1, 200, 100)  # twice what it can do
    refused, served = found.refused.sum(), found.latencies.sum()
    assert busy == pytest.approx(1, abs=0.02)
    assert refused / (refused + served) == pytest.approx(1 - 1 / (200 * (0.01 + 40e-6)), abs=0.02)
    assert percentile(found.latencies, 99) == pytest.approx(0.75 * law.max_wait, rel=0.05)


def test_the_page_has_every_figure_that_was_measured():
    parts, simulated = (
        json.loads(path.read_text()) for path in (capacity.RESULTS, simulation.RESULTS)
    )
    page = scaling.PAGE.read_text()
    assert page == scaling.write(page, parts, simulated)
    assert len(parts["validation"]) == len(capacity.SETUPS)
    for row in parts["validation"]:
        for found in capacity.compared(row):
            assert abs(found.difference) <= capacity.MOST, (row["label"], found)
