"""A training that is killed, fails, or sees the clock jump: what soak_training.py tries often."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from dropserve.models import checkpoint
from dropserve.service.inference.model_store import ModelStore
from dropserve.service.settings import Settings
from tests.reliability.training_faults import (
    MODEL,
    REMEDIES,
    digests,
    forked_trainer,
    names,
    train_through_failure,
    train_through_kills,
)

CENTURY = 36_525 * 86_400

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    with forked_trainer(tmp_path_factory.mktemp("trainer")) as trainer:
        yield trainer


@pytest.fixture
def root(trainer, tmp_path):
    """A folder that holds a version of another run already."""
    trainer.unbroken(1)
    return shutil.copytree(trainer.folder / "unbroken 1", tmp_path / "models")


def test_a_killed_training_resumes_to_the_same_weights_and_harms_no_version(trainer, tmp_path):
    train_through_kills(trainer, tmp_path, 3, 5)


@pytest.mark.parametrize("kind", range(6))
def test_a_training_that_cannot_write_says_why_and_resumes(trainer, root, tmp_path, kind):
    """Each kind of failure comes at every 32nd call that changes a file, from another one on."""
    moments = trainer(tmp_path / "counted", fail=10**9, errno=0, lasting=False).moments
    failure = {"errno": [*REMEDIES][kind % 3], "lasting": kind < 3}
    ended = []
    for number in range(5 * kind, moments, 32):
        copied = shutil.copytree(root, tmp_path / f"{number}")
        ended.append(train_through_failure(trainer, copied, fail=number, **failure).status)
    assert len(ended) > 1
    assert 2 in ended  # not in all: a training ends well without a lock, say


def test_neither_versions_nor_a_resumed_training_depend_on_the_clock(trainer, root):
    killed = trainer(root, kill=300, clock=[0, CENTURY, -CENTURY])
    assert killed.status == -9
    assert (root / MODEL / ".training" / "state.safetensors").exists()
    set_times(root / MODEL / "1", CENTURY)  # the older version is from the future
    set_times(root / MODEL / ".training", -CENTURY)
    resumed = trainer(root, clock=[-CENTURY])
    assert resumed.status == 0, resumed.output
    assert "epochs done before: " in resumed.output
    set_times(root / MODEL / "2", -CENTURY)
    assert digests(root) == [trainer.unbroken(1), trainer.unbroken(0)]
    assert names(root) == ["1", "2"]
    with ThreadPoolExecutor(1) as loader:
        store = ModelStore(Settings(checkpoints=root), loader)
    assert store.state(MODEL)["version"] == 2


def set_times(folder, off):
    """Have a folder and its files be of another time: seconds from now."""
    for path in (folder, *folder.iterdir()):
        moved = path.stat().st_mtime + off
        os.utime(path, (moved, moved))


def test_a_changed_version_is_noticed_whatever_its_times_are(root):
    """A clock that is set back gives changed files times that are older than the last ones."""
    path = root / MODEL / "1"
    before = checkpoint.mark(path)
    with ThreadPoolExecutor(1) as loader:
        store = ModelStore(Settings(checkpoints=root), loader)
        weights = path / checkpoint.WEIGHTS
        times = weights.stat()
        weights.write_bytes(bytes(times.st_size))
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert checkpoint.mark(path) != before
        loader.submit(store.update).result()
    assert store.state(MODEL)["version"] == 1  # served from memory
    assert "SHA-256" in store.state(MODEL)["changed"][0]["reason"]
