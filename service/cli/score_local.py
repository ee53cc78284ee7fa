"""`dropserve score --engine local`: processes that each load the version, without HTTP.

They are spawned, because PyTorch's locks must not be copied. This process alone writes rows; the
others end with it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from dropserve.models.errors import ModelsError
from dropserve.service.cli.scores import Row, Run, Timings, read_file, text
from dropserve.service.cli.terminal import Refused
from dropserve.service.errors import DropserveError, ServerError
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.cli.scorer import Scorer

_PART = 512
"""Images that a process takes at a time, at most: so many are scored again after a kill."""
_AHEAD = 2
"""Parts for each process that are under way or wait."""
Scored = tuple[list[Row], Timings]
_process: "_Process"
"""What each of the processes has; nothing in this one."""


def score(
    settings: Settings,
    processes: int | None,
    run: Run,
    paths: Sequence[Path],
    done: Callable[[Sequence[Row]], None],
) -> Timings:
    """Score files in processes, by default one a core; `done` takes the rows of a part.

    Raises:
        Refused: the version cannot be loaded, or is not the one that the run began with.
        ServerError: a process was killed.
    """
    count = max(1, min(processes or len(os.sched_getaffinity(0)), len(paths)))
    size = max(1, min(_PART, -(-len(paths) // (4 * count))))
    parts = iter([[*map(str, paths[i : i + size])] for i in range(0, len(paths), size)])
    timings = Timings()
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (run, settings))
    waiting: set[Future[Scored]] = set()
    try:
        while True:
            while len(waiting) < _AHEAD * count and (part := next(parts, None)):
                waiting.add(pool.submit(_score, part))
            if not waiting:
                return timings
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                rows, seconds = future.result()
                timings += seconds
                done(rows)
    except BrokenProcessPool as error:
        reason = "a process was killed, perhaps for its memory; the same command continues"
        raise ServerError(f"{reason}, and takes less with --processes 1") from error
    finally:
        # their parts may take minutes, and without parts their own end takes half a second
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def read(paths: Sequence[str], most: int) -> Iterator[tuple[str, bytes | OSError]]:
    """Read files of `most` bytes one after another; what cannot be read is its error."""
    for path in paths:
        try:
            yield text(path), read_file(path, most)
        except OSError as error:
            yield text(path), error


class _Process:
    """One of the processes: it loads the version for the first part."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self._run, self._settings = run, settings
        self._scorer: Scorer | None = None

    def score(self, paths: Sequence[str]) -> Scored:
        if self._scorer is None:
            from dropserve.service.cli.scorer import Scorer

            self._scorer = Scorer(self._run, self._settings)
        return self._scorer.score(read(paths, self._settings.max_body_bytes))


def _start(run: Run, settings: Settings) -> None:
    """Set up a process: Ctrl-C is for its parent, without which there is nothing to do."""
    global _process
    _process = _Process(run, settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _score(paths: Sequence[str]) -> Scored:
    try:
        return _process.score(paths)
    except (ModelsError, DropserveError) as error:  # some cannot be sent to another process
        raise Refused(str(error)) from None
