"""What a power failure leaves, wherever it strikes: no version that was saved is lost or damaged.

kill -9 tests no fsync, because the kernel keeps what was written. Here the operations of each
writer are recorded, and every state that a disk may be in after a failure is replayed.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.errors import CheckpointError
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.training import State, earlier_run
from dropserve.service.inference.model_store import ModelStore
from dropserve.service.settings import Settings
from tests.helpers import invoke
from tests.reliability.disk import Flush, Recording, power_failures

PREPROCESSING = Preprocessing((2, 2), 1, (0.5,), (0.5,))
NETWORK = NetworkConfig("mlp", PREPROCESSING.shape, 2, (2,), (0.5,))
ABOUT = checkpoint.Metadata("net", NETWORK, PREPROCESSING, ("a", "b"))
RUN = [
    "train",
    "--epochs",
    2,
    "--hidden",
    4,
    "--dropout",
    0.3,
    "--batch-size",
    512,
    "--samples",
    0,
    "--resume",
]


def module(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORK.build().eval()


WEIGHTS = {seed: module(seed).state_dict() for seed in range(1, 10)}


def save(home, seed):
    return int(checkpoint.save(home / "models", module(seed), ABOUT).name)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def record(home):
    """Record what a block does to the home folder."""
    return lambda: Recording(home).running()


@pytest.fixture
def failures(tmp_path, monkeypatch):
    """Write each state that a power failure can leave to a folder of its own, one after another."""
    numbers = itertools.count()

    def write_each(recording):
        monkeypatch.setattr(os, "fsync", lambda _: None)  # of what follows nothing is recorded
        found = power_failures(recording)
        print(f"replayed: {len(recording.events)} operations, {len(found)} states")
        for failure in found:
            folder = tmp_path / str(next(numbers))
            failure.write(folder)
            yield folder, failure.done

    return write_each


def assert_whole(home, expected):
    """Load all versions that are listed, and compare them; return their numbers."""
    root = home / "models"
    found = checkpoint.versions(root, "net")
    for version in found:
        tensors = checkpoint.read(root / "net" / str(version)).tensors
        assert all(torch.equal(tensors[n], t) for n, t in WEIGHTS[expected[version]].items())
    return found


def served(home):
    """Start the service's model store; return what it serves, and what where none is named."""
    with ThreadPoolExecutor(1) as loader:
        settings = Settings(checkpoints=home / "models", keep_versions=9)
        store = ModelStore(settings, loader, check=False)
    state = store.state("net")
    assert (state["refused"], state["changed"], state["pin_problem"]) == ([], [], None)
    return state["versions"], state["version"]


def assert_next_save_cleans_up(home, there, rest=()):
    """Save one more version; nothing but whole versions is left, and what is named."""
    number = save(home, 9)
    assert number == max(there, default=0) + 1
    names = {path.name for path in (home / "models" / "net").iterdir()}
    assert names == {*map(str, [*there, number]), *rest}


def test_versions_that_were_saved_are_there_and_whole(home, record, failures):
    left = home / "models" / "net" / ".new-killed"
    left.mkdir(parents=True)
    (left / checkpoint.WEIGHTS).write_bytes(b"half of it")
    with record() as recording:
        for seed in (1, 2):
            recording.mark(save(home, seed))
    outcomes = set()
    for folder, saved in failures(recording):
        found = assert_whole(folder, {1: 1, 2: 2})
        assert set(saved) <= {*found}
        if (saved, *found) not in outcomes:
            assert served(folder) == (found, max(found, default=None))
        assert_next_save_cleans_up(folder, found)
        outcomes.add((saved, *found))
    assert outcomes == {((),), ((), 1), ((1,), 1), ((1,), 1, 2), ((1, 2), 1, 2)}


def is_lost(home, saved):
    """Say if a version that was saved is not there, or one that is there is damaged."""
    try:
        return not {*saved} <= {*assert_whole(home, {1: 1})}
    except CheckpointError:
        return True


@pytest.mark.parametrize("number", range(7))
def test_the_replay_notices_if_any_fsync_of_a_save_were_missing(home, record, failures, number):
    with record() as recording:
        recording.mark(save(home, 1))
    assert not any(is_lost(*failure) for failure in failures(recording))
    flushes = [event for event in recording.events if isinstance(event, Flush)]
    assert len(flushes) == 7
    recording.events.remove(flushes[number])
    assert any(is_lost(*failure) for failure in failures(recording))


def test_versions_that_were_removed_are_whole_or_gone(home, record, failures):
    for seed in (1, 2, 3):
        save(home, seed)
    with record() as recording:
        for version in (1, 2):
            assert checkpoint.remove(home / "models", "net", version)
            recording.mark(version)
    for folder, removed in failures(recording):
        found = assert_whole(folder, {1: 1, 2: 2, 3: 3})
        assert found[-1] == 3
        assert not {*removed} & {*found}
        assert_next_save_cleans_up(folder, found)


def test_a_pin_is_the_last_one_or_the_next(home, record, failures):
    for seed in (1, 2):
        save(home, seed)
    pins = [None, 1, 2, None]
    with record() as recording:
        for version in pins[1:]:
            checkpoint.pin(home / "models", "net", version)
            recording.mark(version)
    for folder, done in failures(recording):
        assert checkpoint.pinned(folder / "models", "net") in pins[len(done) :][:2]
        assert assert_whole(folder, {1: 1, 2: 2}) == [1, 2]
        checkpoint.pin(folder / "models", "net", 1)
        assert_next_save_cleans_up(folder, [1, 2], [checkpoint.PIN])


def test_a_manifest_that_is_added_is_there_or_not(home, record, failures):
    save(home, 1)
    path = home / "models" / "net" / "1"
    (path / checkpoint.MANIFEST).unlink()
    with record() as recording:
        recording.mark(checkpoint.add_manifest(checkpoint.read(path)).manifest_sha256)
    for folder, done in failures(recording):
        assert assert_whole(folder, {1: 1}) == [1]
        version = checkpoint.read(folder / "models" / "net" / "1")
        assert version.manifest_sha256 in {*done} or not done
        checkpoint.add_manifest(version)
        assert len(list(version.path.iterdir())) == 3


def epochs(count):
    """Yield the state of a run after each of its epochs; every one has other weights."""
    net = module(1)
    state = State(net, torch.optim.SGD(net.parameters(), momentum=0.9), {"run": "some"})
    for epoch in range(count):
        net(torch.ones(5, 1, 2, 2)).square().mean().backward()
        state.optimizer.step()
        state.finish_epoch(epoch / count, 1.0)
        yield state


def test_the_state_of_a_run_is_that_of_the_last_epoch_or_the_next(home, record, failures):
    where, written = "models/net/.training/state.safetensors", {}
    with record() as recording:
        for state in epochs(3):
            state.write(home / where)
            recording.mark(state.epoch)
            written[state.epoch] = (home / where).read_bytes()
    for folder, done in failures(recording):
        finished = earlier_run(folder / where, resume=True, restart=False)
        assert finished in (len(done), len(done) + 1)
        if finished:
            assert (folder / where).read_bytes() == written[finished]
        state.write(folder / where)
        assert [p.name for p in (folder / where).parent.iterdir()] == ["state.safetensors"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    result = invoke(*RUN, "--checkpoints", root)
    assert result.exit_code == 0, result.output
    return checkpoint.read(root / "digits-mlp" / "1").metadata.sha256


@pytest.mark.slow
def test_a_run_resumes_to_the_same_weights_after_every_power_failure(
    home, record, failures, trained
):
    with record() as recording:
        result = invoke(*RUN, "--checkpoints", home / "models")
        assert result.exit_code == 0, result.output
        recording.mark("trained")
    for folder, done in failures(recording):
        root = folder / "models"
        before = checkpoint.versions(root, "digits-mlp")
        assert before == [1] or not done
        ended = before and not (root / "digits-mlp" / ".training" / "state.safetensors").exists()
        result = invoke(*RUN, "--checkpoints", root)
        assert result.exit_code == 0, result.output
        after = ["1", "2"] if ended else ["1"]  # where none is to be resumed, another run begins
        assert sorted(path.name for path in (root / "digits-mlp").iterdir()) == after
        for version in after:
            assert checkpoint.read(root / "digits-mlp" / version).metadata.sha256 == trained
