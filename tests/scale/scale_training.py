"""Training by several processes and machines: the same weights, also after one is killed.

Machines are two `torchrun` on the loopback interface, each with a folder of its own.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from PIL import Image

from dropserve.models import checkpoint
from tests.helpers import eventually, free_port, noise

PROGRAM = Path(sys.executable).with_name("dropserve")
TORCHRUN = Path(sys.executable).with_name("torchrun")
MODEL = "digits-mlp"
SMALL = ["--hidden", "32", "--samples", "0"]
NOISY = [*SMALL, "--dropout", ".3", "--shift", "1", "--epochs", "60", "--batch-size", "32"]
"""A run of some seconds in which all that is random depends on the process."""
EXACT = [*SMALL, "--dropout", "0", "--epochs", "4", "--batch-size", "256"]
"""Twenty steps, in which nothing is random but the order of the images."""
SOON = 60
"""Seconds in which a run must end whose process was killed."""

pytestmark = pytest.mark.timeout(400)


def start(root, *options):
    command = [PROGRAM, "train", "--checkpoints", root, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_machines(folder, *options, second=()):
    """Start a process on each of two machines; the second one's has further options."""
    port, machines = free_port(), []
    for number in (0, 1):
        command = [TORCHRUN, "--nnodes", "2", "--node-rank", f"{number}", "--nproc-per-node", "1"]
        command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
        command += ["--no-python", PROGRAM, "train", "--checkpoints", folder / f"{number}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command += [*options, *(second if number else ())]
        machines.append(subprocess.Popen(command, **pipes))
    return machines


def end(process, timeout=150):
    """Wait for a process; return its exit status, and what it has printed since."""
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def train(root, *options):
    status, stdout, stderr = end(start(root, *options))
    assert status == 0, stderr
    return stdout


def train_on_machines(folder, *options):
    (status, stdout, stderr), (other, silent, _) = map(end, start_machines(folder, *options))
    assert (status, other) == (0, 0), stderr
    assert silent == ""
    assert not (folder / "1").exists()
    return stdout


def weights(root):
    assert checkpoint.versions(root, MODEL) == [1]
    assert [path.name for path in (root / MODEL).iterdir()] == ["1"]
    return safetensors.torch.load_file(root / MODEL / "1" / checkpoint.WEIGHTS)


def assert_close(root, expected, tolerance):
    for name, tensor in weights(root).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance)


def read_until(process, text):
    line = process.stdout.readline()
    while text not in line:
        assert line, process.stderr.read()
        line = process.stdout.readline()


def worker(process, local_rank):
    """Return the process of that rank, which a process has started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("LOCAL_RANK") == str(local_rank):
            return child
    raise LookupError(local_rank)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The weights of a run of two processes that nothing disturbs."""
    root = tmp_path_factory.mktemp("unbroken")
    told = train(root, "--devices", "2", *NOISY)
    assert told.count("epoch 60/60") == 1
    assert "; processes: 2\n" in told
    return weights(root)


def test_processes_machines_and_parts_train_as_one_process_does(tmp_path):
    train(tmp_path / "one", *EXACT)
    expected = weights(tmp_path / "one")
    train(tmp_path / "two", *EXACT, "--devices", "2")
    train(tmp_path / "parts", *EXACT, "--accumulate", "4")
    train(tmp_path / "both", *EXACT, "--devices", "2", "--accumulate", "4")
    train_on_machines(tmp_path / "machines", *EXACT)
    for name in ("two", "parts", "both", "machines/0"):
        assert_close(tmp_path / name, expected, 1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_it_resumes_to_the_same_weights(tmp_path, unbroken, rank):
    process = start(tmp_path, "--devices", "2", *NOISY)
    read_until(process, "epoch 5/60")
    worker(process, rank).kill()
    status, _, stderr = end(process, SOON)
    assert status == 2
    assert f"error: of the processes 0 to 1, {rank} was ended by SIGKILL; " in stderr
    assert "all finished epochs are kept: start it again with --resume" in stderr
    assert "Traceback" not in stderr

    status, _, stderr = end(start(tmp_path, "--resume", *NOISY, "--threads", "1"))
    assert status == 2  # one process now
    assert "[precision, processes] was ['32-true', 2], now is ['32-true', 1]" in stderr

    told = train(tmp_path, "--devices", "2", "--resume", *NOISY)
    assert int(told.partition("epochs done before: ")[2].split()[0]) >= 5
    assert_close(tmp_path, unbroken, 0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_machine_ends_the_run_and_it_resumes_without_a_shared_folder(
    tmp_path, unbroken, victim
):
    machines = start_machines(tmp_path, *NOISY)
    read_until(machines[0], "epoch 5/60")
    worker(machines[victim], 0).kill()
    deadline = time.monotonic() + SOON
    ended = [end(machine, max(1, deadline - time.monotonic())) for machine in machines]
    assert all(status != 0 for status, _, _ in ended)
    survivor = ended[1 - victim][2]
    assert "another process was lost" in survivor
    assert "all finished epochs are kept: start it again with --resume" in survivor
    assert "SIGKILL" in ended[victim][2]

    assert "epochs done before: " in train_on_machines(tmp_path, "--resume", *NOISY)
    assert_close(tmp_path / "0", unbroken, 0)


def test_other_options_on_a_machine_are_refused_on_both(tmp_path):
    ended = [end(machine) for machine in start_machines(tmp_path, *EXACT, second=["--seed", "1"])]
    assert all(status != 0 for status, _, _ in ended)
    assert "error: a process differs from the first: its output says in what" in ended[0][2]
    assert "error: this process differs from the first: seed was 0, now is 1" in ended[1][2]


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGINT, 130, "interrupted: --resume continues"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGKILL, -9, ""),
    ],
    ids=["ctrl-c", "terminated", "killed"],
)
def test_whatever_ends_the_command_ends_its_processes(tmp_path, number, status, told):
    process = start(tmp_path, "--devices", "2", *NOISY)
    read_until(process, "epoch 1/60")
    workers = [worker(process, rank) for rank in (0, 1)]
    process.send_signal(number)
    got, _, stderr = end(process, SOON)
    assert got == status
    assert told in stderr
    eventually(lambda: not any(each.is_running() for each in workers))
    assert (tmp_path / MODEL / ".training" / "state.safetensors").exists()


def test_an_error_of_all_processes_is_shown_once(tmp_path):
    status, stdout, stderr = end(start(tmp_path, "--devices", "2", "--dataset", "none"))
    assert (status, stdout) == (2, "")
    assert stderr.count("no dataset 'none'") == stderr.count("\n") == 1


def test_a_large_folder_takes_little_memory(tmp_path):
    """90 MB of images: in memory, and read as they are needed, by one process and by two."""
    for i, pixels in enumerate(noise(3000, 100, 100, 3)):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    peaks, digests = [], []
    options = ["--dataset", tmp_path / "images", "--size", "100", "--epochs", "1", *SMALL]
    options += ["--dropout", ".3"]
    for limit, devices in (("4096", "1"), ("50", "1"), ("50", "2")):
        root = tmp_path / f"{limit} {devices}"
        command = [PROGRAM, "train", "--checkpoints", root, "--name", "m", "--devices", devices]
        environment = {**os.environ, "DROPSERVE_DATASET_MB": limit}
        process = subprocess.Popen([*command, *options], env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        peaks.append(used.ru_maxrss / 1000)  # MB, of the largest process
        digests.append(checkpoint.read(root / "m" / "1").metadata.sha256)
    assert peaks[1] < peaks[0] - 90
    assert digests[0] == digests[1]
