"""Ends the process when it can no longer answer, so that its supervisor starts another."""

import asyncio
import faulthandler
import logging
import os
from collections.abc import Callable
from time import monotonic

from dropserve.service.observability.logs import FIELDS

_STDERR = 2
_PERIOD = 1.0
"""Most seconds between two looks."""
_PATIENCE = 1 / 3
"""Part of the limit that the inference thread may be stalled: it takes half of it to notice a step
of a kind that has never ended."""
_log = logging.getLogger(__name__)


async def watch(stalled: Callable[[], str | None], limit: float) -> None:
    """End the process, with status 1 and all tracebacks on stderr, if it does not work any more.

    That is if the event loop does not run for `limit` seconds, or if `stalled` keeps on naming a
    problem of the inference thread. It returns at once if the limit is 0, and never otherwise.
    """
    if not limit:
        return
    period, healthy = min(_PERIOD, limit / 10), monotonic()
    try:
        while True:
            # a thread of C, which needs neither the event loop nor the interpreter's lock
            faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
            problem = stalled()
            if problem is None:
                healthy = monotonic()
            elif monotonic() - healthy >= limit * _PATIENCE:
                _end(problem)
            await asyncio.sleep(period)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end(problem: str) -> None:
    _log.critical("the watchdog ends the process", extra={FIELDS: {"reason": problem}})
    faulthandler.dump_traceback(file=_STDERR)
    os._exit(1)  # an orderly exit would wait for the thread
