"""Starts a server, waits until it answers, and stops it with all it started.

Frameworks start processes in sessions of their own, which a signal to a process group misses. On
Linux this process adopts such orphans, so that everything below it can be found and ended.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_START_SECONDS, _STOP_SECONDS = 180.0, 10.0


class NotServing(Exception):
    """A server did not come up; quotes the last line that it wrote."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    answers: Callable[[], bool],
) -> Iterator[float]:
    """Run a server in `folder`; yield the seconds it took to answer, and end it afterwards.

    Raises:
        NotServing: it ended by itself, or did not answer in time.
    """
    adopt_orphans()
    log = folder / "log"
    with log.open("wb") as out:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not answers():
                if process.poll() is not None:
                    raise NotServing(f"ended by itself: {_last_words(log)}")
                if time.monotonic() - started > _START_SECONDS:
                    raise NotServing(f"no answer in {_START_SECONDS:g} s: {_last_words(log)}")
                time.sleep(0.1)
            yield time.monotonic() - started
        finally:
            _end(process)


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-500:] if lines else "and not a word"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop; kill whatever is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _STOP_SECONDS
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def adopt_orphans() -> None:
    """Become the parent of processes below this one whose own has ended, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
