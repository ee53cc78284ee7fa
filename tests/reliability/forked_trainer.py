"""A process that imports PyTorch once and forks for each run of a command, which it may disturb.

It reads a run's arguments and fault as a line of JSON, and answers with the exit status, negative
for a signal, the number of moments at which the fault could have come, and the output. A fault is

- {"kill": n}: SIGKILL before or after a call of `os` or `io`, the n-th of these moments while a
  version or a state is read, written or removed;
- {"kill_after": seconds}: SIGKILL after a time;
- {"fail": n, "errno": e, "lasting": b}: the n-th call that changes a file fails, and if it is to
  last, all that follow do; on a full disk files can still be removed and renamed;
- {"clock": [seconds, ...]}: the wall clock is off by one after another, call by call.

A line with "shell" instead is a command to run as it is.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from errno import ENOSPC
from pathlib import Path

import torch

from dropserve.service.cli.main import app
from tests.reliability.disk import calls_the_system

CHANGES = {
    *("mkdir", "open", "write", "fsync", "chmod", "rename", "replace", "unlink", "remove"),
    *("rmdir", "flock"),
}
NEED_NO_SPACE = {"os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock"}
AUDITED = NEED_NO_SPACE | {"os.mkdir"}
SAVERS = ("models/storage.py", "models/checkpoint.py")


def watch(react):
    """Call a function before and after each call of the operating system; return their count."""
    moments = itertools.count()

    def hook(frame, event, called):
        if event in ("c_call", "c_return") and calls_the_system(called) and is_saving(frame):
            react(next(moments), event, called)

    sys.setprofile(hook)
    return moments


def kill_at(number):
    def react(moment, *_):
        if moment == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch(react)


def is_saving(frame):
    """Say if a function of the modules that write versions and states is at work."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(SAVERS) or frame.f_code.co_name == "discard":
            return True
        frame = frame.f_back
    return False


def fail_from(number, code, *, lasting):
    changes, failed = itertools.count(), []

    def error():
        return OSError(code, os.strerror(code))

    def react(_moment, event, called):
        if event == "c_call" and called.__name__ in CHANGES and next(changes) == number:
            failed.append(called.__name__)
            raise error()  # a hook that raises is not called again

    def audit(event, arguments):
        if not failed or not lasting:
            return
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in AUDITED - (NEED_NO_SPACE if code == ENOSPC else set()):
            raise error()

    def flush(descriptor, fsync=os.fsync):
        if failed and lasting:
            raise error()
        fsync(descriptor)

    watch(react)
    sys.addaudithook(audit)
    os.fsync = flush
    return changes


def run(arguments, fault):
    """Run the command in this process; return its exit status and the number of moments."""
    moments = itertools.count()
    if "kill" in fault:
        moments = kill_at(fault["kill"])
    if "fail" in fault:
        moments = fail_from(fault["fail"], fault["errno"], lasting=fault["lasting"])
    if "clock" in fault:
        now, off = time.time, itertools.cycle(fault["clock"])
        time.time = lambda: now() + next(off)
    try:
        app(arguments)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.setprofile(None)
    sys.stdout.flush()
    sys.stderr.flush()
    return status, next(moments)


def fork(arguments, fault, output):
    """Run the command in a child; return its exit status and the number of moments."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status, moments = run(arguments, fault)
        os.write(writer, str(moments).encode())
        os._exit(status)
    os.close(writer)
    if "kill_after" in fault:
        time.sleep(fault["kill_after"])
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as counted:
        return status, int(counted.read() or 0)


def main():
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:  # what a run imports is not to be disturbed
        command = ["train", "--epochs", "1", "--samples", "0", "--checkpoints", folder]
        assert run(command, {})[0] == 0
    for line in sys.stdin:
        request = json.loads(line)
        if shell := request.get("shell"):
            print(subprocess.run(["sh", "-c", shell]).returncode, file=answers, flush=True)
            continue
        output = Path(request["output"])
        status, moments = fork(request["arguments"], request["fault"], output)
        print(json.dumps([status, moments, output.read_text()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
