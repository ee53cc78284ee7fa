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
    _adopt_orphans()
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
    while (left := _descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants(root: int) -> list[int]:
    """Find every process below `root`: Linux alone, elsewhere the process group has to do."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # the name, in brackets, may hold anything; state and parent follow it
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, wave = [], [root]
    while wave:
        wave = [child for pid in wave for child in children.get(pid, [])]
        found += wave
    return found
