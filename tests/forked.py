"""Processes of Python that need not import PyTorch first: most of the time that a server takes.

One process imports what a server imports, starts no thread, and forks for each command.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_PARENT = """
import json, os, sys
import dropserve.service.app, dropserve.service.server, dropserve.service.inference.inference

while line := sys.stdin.readline():
    asked = json.loads(line)
    if isinstance(asked, int):  # a child that has ended
        print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        break
else:
    sys.exit()
os.sched_setaffinity(0, asked["cores"])
os.environ.clear()
os.environ.update(asked["environment"])
sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
for number, name in enumerate((os.devnull, *asked["files"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0), 0o600), number)
sys.stdin = open(0, closefd=False)
exec(asked["command"])
"""


@cache
def _parent() -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", _PARENT], env=environment, **pipes)


def _ask(asked: object) -> int:
    parent = _parent()
    print(json.dumps(asked), file=parent.stdin, flush=True)
    return int(parent.stdout.readline())


class Process:
    """A command's process: as of `subprocess.Popen`, what tests use of it."""

    def __init__(
        self, command: str, environment: Mapping[str, str], out: Path, errors: Path
    ) -> None:
        files = str(out), str(errors)
        for file in (out, errors):
            file.touch()
        cores = [*os.sched_getaffinity(0)]
        asked = {"command": command, "cores": cores, "environment": {**environment}, "files": files}
        self.pid = _ask(asked)
        self._ended = os.pidfd_open(self.pid)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit status, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout or 0.0)
            self.returncode = _ask(self.pid)
            os.close(self._ended)
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit status, or None if it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
