"""A version is there whole or not at all: through kills, full disks and rivals."""

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dropserve.models import checkpoint, storage
from dropserve.models.checkpoint import METADATA, WEIGHTS, Metadata, load, save, versions
from dropserve.models.errors import CheckpointNotWritten, CheckpointRefused
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing

# One process imports torch once, and forks for each script it is sent.
FORKER = """
import itertools, json, os, pathlib, resource, signal, sys, tempfile
import torch
from dropserve.models.checkpoint import Metadata, load, save, versions
from dropserve.models.errors import CheckpointError, CheckpointRefused
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing

network = NetworkConfig("mlp", (1, 8, 8), 3, (64,), (0.5,))
about = Metadata("net", network, Preprocessing((8, 8), 1, (0.5,), (0.25,)), ("a", "b", "c"))
module = network.build()
with tempfile.TemporaryDirectory() as folder:  # what it imports when it saves is not to be killed
    load(save(pathlib.Path(folder), module, about))
for line in sys.stdin:
    script, root = json.loads(line)
    root = pathlib.Path(root)
    if os.fork() == 0:
        exec(script)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

# A profiler's hook kills the saver before and after each of its calls to the operating system.
KILLED_EVERYWHERE = """
def touches_files(called):
    home = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
    return home in ("posix", "io", "_io")

def kill_at(moment):
    moments = itertools.count()

    def hook(_frame, event, called):
        if event in ("c_call", "c_return") and touches_files(called) and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(hook)
    save(root / str(moment), module, about)

for moment in itertools.count():
    if os.fork() == 0:
        kill_at(moment)
        os._exit(0)
    status = os.wait()[1]
    if status == 0:
        break
    assert status == signal.SIGKILL
"""

FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    save(root, module, about)
except CheckpointError as error:
    (root / "error").write_text(str(error))
"""

RIVALS = """
for rival in ("one", "other"):
    if os.fork() == 0:
        saved = [int(save(root, module, about).name) for _ in range(10)]
        (root / rival).write_text(json.dumps(saved))
        os._exit(0)
for _ in range(2):
    assert os.wait()[1] == 0
"""

FORGED = """
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, resource.RLIM_INFINITY))
path = save(root, module, about)
values = json.loads((path / "model.json").read_text())
values["network"].update(hidden=[65_536] * 4, dropout=[0.5] * 4)  # 52 GB of weights
(path / "model.json").write_text(json.dumps(values))
(path / "manifest.json").unlink()
try:
    load(path)
except CheckpointRefused as error:
    (root / "error").write_text(error.reason)
"""


@pytest.fixture(scope="module")
def forker():
    """Return a function that runs a script, given a folder, in a fresh fork."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(script, root):
            process.stdin.write(json.dumps([script, str(root)]) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n"

        yield run
        process.stdin.close()


def assert_all_whole(root):
    """Load every version and return how many there are."""
    loaded = [load(root / "net" / str(version))[0] for version in versions(root, "net")]
    for module in loaded:
        pairs = zip(module.parameters(), loaded[0].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    return len(loaded)


@pytest.mark.slow
def test_a_saver_killed_at_any_moment_leaves_a_whole_version_or_none(forker, tmp_path):
    forker(KILLED_EVERYWHERE, tmp_path)
    roots = sorted(tmp_path.iterdir(), key=lambda root: int(root.name))
    found = [assert_all_whole(root) for root in roots]
    assert list((roots[0].parent).glob("*/net/.new-*"))
    assert found == sorted(found)  # none, up to the rename; one from there on
    assert (found[0], found[-1]) == (0, 1)
    assert found.count(0) > 20
    assert found.count(1) > 3


def test_no_space_is_an_error_that_leaves_nothing_behind(forker, tmp_path):
    forker(FULL_DISK, tmp_path)
    error = (tmp_path / "error").read_text()
    assert "cannot write a version" in error
    assert "File too large" in error
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} <= {"error", "net"}


def test_two_processes_that_save_at_once_get_versions_of_their_own(forker, tmp_path):
    forker(RIVALS, tmp_path)
    saved = [json.loads((tmp_path / rival).read_text()) for rival in ("one", "other")]
    assert sorted(saved[0] + saved[1]) == list(range(1, 21))
    assert all(one == sorted(one) for one in saved)
    for version in range(1, 21):
        load(tmp_path / "net" / str(version))
    assert list((tmp_path / "net").glob(".new-*")) == []


def test_a_network_larger_than_its_weights_is_refused_before_it_is_built(forker, tmp_path):
    forker(FORGED, tmp_path)
    assert "tensor" in (tmp_path / "error").read_text()


def small():
    network = NetworkConfig("mlp", (1, 8, 8), 3, (64,), (0.5,))
    about = Metadata("net", network, Preprocessing((8, 8), 1, (0.5,), (0.25,)), ("a", "b", "c"))
    return network.build(), about


def test_a_number_that_is_taken_or_is_taken_meanwhile_is_passed_over(tmp_path, monkeypatch):
    rename = Path.rename

    def rename_late(temporary, target):
        monkeypatch.undo()
        (target / "of a rival").mkdir(parents=True)
        return rename(temporary, target)

    save(tmp_path, *small())
    (tmp_path / "net" / "2").write_text("a file in the way")
    monkeypatch.setattr(Path, "rename", rename_late)
    assert save(tmp_path, *small()).name == "4"


def test_other_users_may_read_a_version(tmp_path):
    assert save(tmp_path, *small()).stat().st_mode & 0o777 == 0o755


def test_a_temporary_folder_is_removed_by_the_next_save_but_not_while_its_owner_writes(tmp_path):
    save(tmp_path, *small())
    killed = tmp_path / "net" / ".new-killed"
    killed.mkdir()
    (killed / WEIGHTS).write_bytes(b"half of it")
    with checkpoint._temporary(tmp_path / "net") as mine:
        assert not killed.exists()
        (mine / WEIGHTS).write_bytes(b"half of it")
        save(tmp_path, *small())
        assert (mine / WEIGHTS).exists()
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["1", "2"]


def test_a_version_that_could_not_be_flushed_under_its_name_is_taken_back(tmp_path, monkeypatch):
    def fail(folder):
        if (folder / "2").exists():
            raise OSError(errno.EIO, "Input/output error")

    save(tmp_path, *small())
    monkeypatch.setattr(storage, "sync_folder", fail)
    with pytest.raises(CheckpointNotWritten, match=r"net: cannot write a version: .*check the dis"):
        save(tmp_path, *small())
    assert [path.name for path in (tmp_path / "net").iterdir()] == ["1"]


@pytest.mark.parametrize("file", [WEIGHTS, METADATA])
def test_a_file_that_is_rewritten_all_the_time_is_loaded_whole_or_refused(tmp_path, file):
    module, about = small()
    path = save(tmp_path, module, about) / file
    whole, stop = path.read_bytes(), threading.Event()

    def rewrite():
        while not stop.is_set():
            path.write_bytes(whole[: len(whole) // 3])
            path.write_bytes(whole)

    writer = threading.Thread(target=rewrite)
    writer.start()
    refusals = 0
    try:
        for _ in range(150):
            try:
                loaded, _ = load(path.parent)
            except CheckpointRefused:
                refusals += 1
            else:
                assert torch.equal(loaded.logits.weight, module.logits.weight)
    finally:
        stop.set()
        writer.join()
    assert refusals > 0
