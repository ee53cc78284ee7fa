"""float32 or bfloat16: measured where it will run, not assumed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16", "auto"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MAX_ERROR = 0.002
"""Most that "auto" lets any predictive mean move."""

_MIN_SPEEDUP = 1.2
"""Least gain for which "auto" gives up digits: less may be the noise of one measurement."""

_REPEATS = 3

At = Callable[[torch.dtype], Callable[[], Tensor]]
"""Switches a sampler to a precision; returns a call that gives predictive means on a probe."""


@dataclass(frozen=True)
class Choice:
    """What a sampler computes in.

    Attributes:
        dtype: "float32" or "bfloat16".
        speedup: of bfloat16 over float32 on the probe; None where it was not measured.
        error: most that bfloat16 moved a predictive mean on the probe; None likewise.
    """

    dtype: Literal["float32", "bfloat16"]
    speedup: float | None = None
    error: float | None = None


def choose(asked: Precision, at: At) -> Choice:
    """Settle on a precision and switch to it.

    Args:
        asked: "auto" measures both on the probe, and takes bfloat16 only if it is faster here and
            moves no predictive mean by more than `MAX_ERROR`.
        at: of the sampler.
    """
    if asked == "float32":
        return Choice("float32")
    exact, exact_time = _measure(at(torch.float32))
    rough, rough_time = _measure(at(torch.bfloat16))
    speedup = exact_time / rough_time
    error = float((exact - rough).abs().max())
    if asked == "bfloat16" or (speedup >= _MIN_SPEEDUP and error <= MAX_ERROR):
        return Choice("bfloat16", speedup, error)
    at(torch.float32)
    return Choice("float32", speedup, error)


def _measure(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return what a call gives, and the least seconds of a few, the first of them not counted."""
    result = run()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)
