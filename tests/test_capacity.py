"""The simulated cluster, against closed forms of queueing theory."""

import numpy as np
import pytest

from bench.cluster import Law, steady

FREE = {"max_wait": 1e9, "max_queue": 4096, "max_batch": 4096}


def linear_batches(fixed, each, rate):
    """Mean latency where a batch always follows a batch, which is so under load.

    A batch of n takes fixed + each * n seconds, and n is Poisson in the length of the one before:
    its length T has mean m = fixed / (1 - rate * each) and variance v = each**2 * rate * m / (1 -
    (rate * each)**2). A request comes, more probably into a long one, waits for half of it on
    average, and shares the next with all that came in it, itself too.
    """
    load = rate * each
    mean = fixed / (1 - load)
    length = mean + each**2 * rate / (1 - load**2)  # of the one in which it comes
    return length / 2 + fixed + each * (1 + rate * length)


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
        (Law(0, 0.1, spread=1, **{**FREE, "max_batch": 1}), 1, 7, 0.1 / (1 - 0.7)),  # M/M/1
        (Law(0, 0.1, **{**FREE, "max_batch": 1}), 1, 7, 0.1 * (1 + 0.7 / 2 / (1 - 0.7))),  # M/D/1
        (Law(0.1, 0, **FREE), 1, 15, batches_of_one_length(0.1, 15)),
        (Law(0.1, 0.01, **FREE), 1, 80, linear_batches(0.1, 0.01, 80)),
        (Law(0, 0.1, 1, choices=2, **{**FREE, "max_batch": 1}), 60, 480, two_choices(8, 0.1)),
    ],
    ids=["M/M/1", "M/D/1", "batches of one length", "linear batches", "two choices"],
)
def test_mean_latency_is_that_of_the_closed_form(law, count, rate, expected):
    seconds = 60_000 // rate
    mean, _, _ = steady(law, count, rate, seconds)
    assert mean == pytest.approx(expected, rel=0.06)
