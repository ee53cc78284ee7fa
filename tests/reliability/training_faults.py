"""Runs of `dropserve train` that are killed or fail, and what must hold after each."""

import errno
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dropserve.models import checkpoint

ROOT = Path(__file__).parents[2]
MODEL = "digits-mlp"
REMEDIES = {
    errno.ENOSPC: "No space left on device; free some space",
    errno.EIO: "Input/output error; check the disk",
    errno.EROFS: "Read-only file system; make it writable, or choose another folder",
}
TRAIN = [
    *("train", "--epochs", "3", "--hidden", "8", "--dropout", "0.3", "--batch-size", "512"),
    *("--samples", "0", "--resume"),
]


class Ended(NamedTuple):
    """How a run ended."""

    status: int  # negative: the signal that killed it
    moments: int  # at which it could have been disturbed; 0: it was killed
    output: str


class Trainer:
    """Runs `dropserve train --resume` in forks of one process."""

    def __init__(self, process, folder):
        self._process = process
        self._output = folder / "output"
        self.folder = folder
        self._view = Path(f"/proc/{process.pid}/root")

    def __call__(self, root, seed=0, **fault):
        arguments = [*TRAIN, "--seed", str(seed), "--checkpoints", str(root)]
        return Ended(*self._ask(arguments=arguments, fault=fault, output=str(self._output)))

    def shell(self, command):
        """Run a command of the shell where the trainer runs."""
        assert self._ask(shell=command) == 0

    def seen(self, path):
        """Return the path of what the trainer sees under a path, whatever is mounted there."""
        return self._view / path.relative_to("/")

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def unbroken(self, seed=0):
        """Return the SHA-256 of the weights of a run that nothing disturbs."""
        root = self.folder / f"unbroken {seed}"
        if not root.exists():
            assert self(root, seed).status == 0
        return digests(root)[-1]


@contextmanager
def forked_trainer(folder, *inside):
    """Start a trainer; `inside` is a command that runs another one."""
    script = [*inside, sys.executable, "-m", "tests.reliability.forked_trainer"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(script, cwd=ROOT, **pipes) as process:
        yield Trainer(process, folder)
        process.stdin.close()


def digests(root):
    """Load all versions; return the SHA-256 of the weights of each, in order."""
    found = checkpoint.versions(root, MODEL)
    assert found == [*range(1, len(found) + 1)]
    return [checkpoint.read(root / MODEL / str(v)).metadata.sha256 for v in found]


def names(root):
    """List what is in the model's folder."""
    return sorted(path.name for path in (root / MODEL).iterdir())


def train_through_kills(trainer, root, kills, random_seed):
    """Kill runs one after another, each of which resumes the last, until `kills` were killed.

    Half of the kills come while a version or a state is written, half at a random time. When a run
    is done the next one begins, of another seed: a version each.
    """
    rng = np.random.default_rng(random_seed)
    expected = [trainer.unbroken(seed) for seed in range(3)]
    moments = trainer(trainer.folder / "counted", kill=10**9).moments
    state = root / MODEL / ".training" / "state.safetensors"
    seed = killed = 0
    while killed < kills:
        kill = {"kill": int(rng.integers(moments))}
        timed = {"kill_after": rng.uniform(0, 0.4)}
        ended = trainer(root, seed, **(kill if rng.random() < 0.5 else timed))
        assert ended.status in (0, -9), ended.output
        killed += ended.status == -9
        found = digests(root)
        assert found == [expected[number % 3] for number in range(len(found))]
        if ended.status == 0:
            assert names(root) == sorted(map(str, range(1, len(found) + 1)))
        if not state.exists():
            seed = len(found) % 3
    assert trainer(root, seed).status == 0
    found = digests(root)
    assert found == [expected[number % 3] for number in range(len(found))]
    assert names(root) == sorted(map(str, range(1, len(found) + 1)))
    return len(found)


def train_through_failure(trainer, root, **fault):
    """Let a run fail once, then resume it; return how the first ended."""
    before, expected = digests(root), trainer.unbroken()
    ended = trainer(root, **fault)
    assert_explained(ended, fault["errno"], root)
    found = digests(root)
    assert found == [*before, expected] or (ended.status and found == before)
    resumed = trainer(root)
    assert resumed.status == 0, resumed.output
    assert digests(root)[: len(before) + 1] == [*before, expected]
    return ended


def assert_explained(ended, code, root):
    """Check that a run ended well, or with one line that says what to do about the error."""
    assert "Traceback" not in ended.output, ended.output
    if ended.status:
        assert ended.status == 2, ended.output
        (error,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
        assert f"error: {root / MODEL}" in error
        assert REMEDIES[code] in error
