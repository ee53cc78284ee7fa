"""200 kills of a training, every call that can fail, full disks: ten minutes, by `make soak`."""

import errno
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from tests.reliability.figures import ROOT, SCALE, published
from tests.reliability.training_faults import (
    REMEDIES,
    assert_explained,
    digests,
    forked_trainer,
    train_through_failure,
    train_through_kills,
)

COMMAND = "make soak SOAK=training"
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Has the trainer mount file systems that nobody else sees."""


@pytest.fixture
def trainer(tmp_path):
    with forked_trainer(tmp_path) as trainer:
        yield trainer


@pytest.mark.timeout(600)
def test_200_kills(trainer, tmp_path):
    with published("training-kills", COMMAND) as figures:
        figures["kill -9 of a training"] = kills = int(200 * SCALE)
        figures["versions saved meanwhile"] = train_through_kills(
            trainer, tmp_path / "models", kills, 13
        )


@pytest.mark.timeout(900)
def test_every_call_that_changes_a_file_fails(trainer, tmp_path):
    trainer.unbroken(1)
    moments = trainer(tmp_path / "counted", fail=10**9, errno=0, lasting=False).moments
    with published("training-failures", COMMAND) as figures:
        figures |= {"calls that change a file, in one training": moments}
        ended = Counter()
        for number in range(0, moments, round(1 / SCALE)):
            for code in REMEDIES:
                for lasting in (False, True):
                    root = shutil.copytree(tmp_path / "unbroken 1", tmp_path / "models")
                    failure = {"fail": number, "errno": code, "lasting": lasting}
                    ended[train_through_failure(trainer, root, **failure).status] += 1
                    shutil.rmtree(root)
        figures["failures (ENOSPC, EIO, EROFS; one call, or all from it on)"] = ended.total()
        figures["of them, trainings that ended with an error"] = ended[2]
        figures["of them, trainings that ended well"] = ended[0]


def test_power_failures():
    """The tests of power failures print how many states they replay."""
    tests = "tests/reliability/test_power_failure.py"
    with published("power-failures", COMMAND) as figures:
        command = [sys.executable, "-m", "pytest", "-s", "-k", "not notices", tests]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        replays = re.findall(r"replayed: (\d+) operations, (\d+) states", done.stdout)
        operations, states = zip(*replays, strict=True)
        figures["operations recorded"] = sum(map(int, operations))
        figures["states of the disk replayed"] = sum(map(int, states))


@pytest.fixture
def mounted(tmp_path):
    """A trainer and a folder in which it can mount disks."""
    (tmp_path / "disk").mkdir()
    with forked_trainer(tmp_path, *NAMESPACE) as trainer:
        for seed in (0, 1):
            trainer.unbroken(seed)
        yield trainer, tmp_path / "disk"


def mount(trainer, disk, size):
    """Mount a disk of so many kilobytes that holds one version."""
    trainer.shell(f"mount -t tmpfs -o size={size}k none {disk}")
    trainer.shell(f"cp -r '{trainer.folder}/unbroken 1/.' {disk}")


def assert_resumes(trainer, disk):
    resumed = trainer(disk)
    assert resumed.status == 0, resumed.output
    assert digests(trainer.seen(disk)) == [trainer.unbroken(1), trainer.unbroken(0)]


@pytest.mark.timeout(300)
def test_full_disks(mounted):
    trainer, disk = mounted
    version = sum(-(-p.stat().st_size // 4096) for p in trainer.folder.glob("unbroken 1/*/*/*"))
    with published("training-full-disks", COMMAND) as figures:
        refused = 0
        for pages in range(version, 10 * version):
            mount(trainer, disk, 4 * pages)
            ended = trainer(disk)
            assert_explained(ended, errno.ENOSPC, disk)
            if ended.status == 0:
                break
            refused += 1
            assert digests(trainer.seen(disk)) == [trainer.unbroken(1)]
            trainer.shell(f"mount -o remount,size=9m {disk}")
            assert_resumes(trainer, disk)
            trainer.shell(f"umount {disk}")
        figures["disk sizes, in steps of 4 kB, at which a training ran out of space"] = refused
        assert refused > 3


def test_a_disk_that_becomes_read_only(mounted):
    trainer, disk = mounted
    mount(trainer, disk, 9000)
    assert trainer(disk, kill=300).status == -9
    trainer.shell(f"mount -o remount,ro {disk}")
    ended = trainer(disk)
    assert ended.status == 2
    assert_explained(ended, errno.EROFS, disk)
    assert digests(trainer.seen(disk)) == [trainer.unbroken(1)]
    trainer.shell(f"mount -o remount,rw {disk}")
    assert_resumes(trainer, disk)
