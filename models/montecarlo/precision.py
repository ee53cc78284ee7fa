"""float32 or bfloat16: measured where it will run, not assumed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dropserve.models.errors import UnsupportedModule

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


def choose(asked: Precision, at: At, *, native: bool) -> Choice:
    """Settle on a precision and switch to it.

    Args:
        asked: "auto" measures both on the probe where the processor has bfloat16, and takes it only
            if it is faster here and moves no predictive mean by more than `MAX_ERROR`.
        at: of the sampler.
        native: whether the processor has bfloat16 (`is_native`).

    Raises:
        UnsupportedModule: bfloat16 was asked for and the module fails in it.
    """
    if asked == "float32" or (asked == "auto" and not native):
        return Choice("float32")
    exact, exact_time = _measure(at(torch.float32))
    try:
        rough, rough_time = _measure(at(torch.bfloat16))
    except Exception as error:  # a module may fail in any way
        at(torch.float32)
        if asked == "auto":
            return Choice("float32")
        raise UnsupportedModule(f"the module cannot compute in bfloat16: {error}") from error
    speedup = exact_time / rough_time
    gap = float((exact - rough).abs().max())
    if asked == "bfloat16" or (speedup >= _MIN_SPEEDUP and gap <= MAX_ERROR):
        return Choice("bfloat16", speedup, gap)
    at(torch.float32)
    return Choice("float32", speedup, gap)


def is_native(device: torch.device) -> bool:
    """Say if a device multiplies bfloat16 itself.

    Where it does not, a lucky measurement is all that could speak for bfloat16, and the answers of
    two runs would differ by its error.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    found: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001  no public name
    return found


def _measure(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return what a call gives, and the least seconds of a few, the first of them not counted."""
    result = run()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)
