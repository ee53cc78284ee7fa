"""200 kills of a training, every call that can fail, full disks: some minutes, by `make soak`."""

import errno
import shutil

import pytest

from tests.reliability.training_faults import (
    REMEDIES,
    assert_explained,
    digests,
    forked_trainer,
    train_through_failure,
    train_through_kills,
)

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Has the trainer mount file systems that nobody else sees."""


@pytest.fixture
def trainer(tmp_path):
    with forked_trainer(tmp_path) as trainer:
        yield trainer


@pytest.mark.timeout(600)
def test_200_kills(trainer, tmp_path):
    versions = train_through_kills(trainer, tmp_path / "models", 200, 13)
    print(f"200 kills, {versions} versions")


@pytest.mark.timeout(900)
def test_every_call_that_changes_a_file_fails(trainer, tmp_path):
    trainer.unbroken(1)
    start = tmp_path / "unbroken 1"
    moments = trainer(tmp_path / "counted", fail=10**9, errno=0, lasting=False).moments
    refused = 0
    for number in range(moments):
        for code in REMEDIES:
            for lasting in (False, True):
                root = shutil.copytree(start, tmp_path / "models")
                ended = train_through_failure(
                    trainer, root, fail=number, errno=code, lasting=lasting
                )
                refused += ended.status != 0
                shutil.rmtree(root)
    print(f"{moments} calls, {6 * moments} failures, {refused} of them errors of the command")


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
    print(f"{refused} full disks")
    assert refused > version


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
