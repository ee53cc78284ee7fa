"""The commands that keep versions in order, on real folders: manifest, pin, rollback, prune."""

import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.service.settings import environment_name
from tests.helpers import dropserve, invoke

PREPROCESSING = Preprocessing((8, 8), 1, (0.3,), (0.4,))
NETWORK = NetworkConfig("mlp", PREPROCESSING.shape, 3, (6,), (0.5,))


@pytest.fixture
def root(tmp_path):
    """A folder of five versions of a model, the third of them damaged."""
    for _ in range(5):
        with torch.random.fork_rng(devices=[]):
            about = checkpoint.Metadata("m", NETWORK, PREPROCESSING, ("a", "b", "c"))
            checkpoint.save(tmp_path, NETWORK.build(), about)
    damage(tmp_path, 3)
    return tmp_path


def damage(root, version):
    weights = root / "m" / str(version) / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])


def done(root, *arguments):
    return dropserve(*arguments, "--checkpoints", root)


def refused(root, *arguments):
    result = invoke(*arguments, "--checkpoints", root)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr


def test_manifests_are_written_where_none_is_and_verified_where_one_is(root):
    manifests = {v: root / "m" / str(v) / checkpoint.MANIFEST for v in (1, 2, 3)}
    before = manifests[1].read_bytes()
    manifests[1].unlink()
    manifests[3].unlink()
    result = invoke("manifest", "m", "--checkpoints", root)
    assert manifests[1].read_bytes() == before
    lines = result.stdout.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "m 1: manifest written", "m 2: verified", "m 4: verified", "m 5: verified"
    ]  # fmt: skip
    assert result.exit_code == 2
    assert "3/model.safetensors: invalid safetensors" in result.stderr
    assert not manifests[3].exists()
    assert "m 2: verified" in done(root, "manifest", "m", "--version", 2)


def test_a_pin_stays_until_the_next_one(root):
    assert "version 2 is pinned" in done(root, "pin", "m", 2)
    done(root, "pin", "m", 4)
    assert checkpoint.pinned(root, "m") == 4
    assert "no version is pinned" in done(root, "pin", "m", "latest")
    assert checkpoint.pinned(root, "m") is None
    assert {path.name for path in (root / "m").iterdir()} == set("12345")
    done(root, "pin", "m", "latest")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (9, "no version 9 of 'm'"),
        (0, "no version 0 of 'm'"),
        (3, "3/model.safetensors: damaged"),
        ("newest", "give the number of a version, or latest"),
    ],
)
def test_a_version_that_could_not_answer_is_not_pinned(root, version, reason):
    assert reason in refused(root, "pin", "m", version)
    assert checkpoint.pinned(root, "m") is None


def test_a_damaged_pin_is_refused_and_can_be_replaced(root):
    (root / "m" / checkpoint.PIN).write_text("{}")
    for command in (["rollback", "m"], ["prune", "m", "--keep", 1]):
        assert "m/pin.json: " in refused(root, *command)
    assert checkpoint.versions(root, "m") == [1, 2, 3, 4, 5]
    done(root, "pin", "m", 2)
    assert checkpoint.pinned(root, "m") == 2


def test_a_rollback_goes_to_the_version_before_that_can_be_served(root):
    damage(root, 5)  # so that 4 answers
    result = invoke("rollback", "m", "--checkpoints", root)
    assert "version 5 is not served" in result.stderr
    assert "version 3 is not served" in result.stderr
    assert result.stdout.startswith("m: version 2 is pinned; services that read ")
    assert result.stdout.endswith("version 4 answered until now\n")
    assert checkpoint.pinned(root, "m") == 2
    done(root, "rollback", "m")
    assert checkpoint.pinned(root, "m") == 1
    assert "version 1 answers, and none before it" in refused(root, "rollback", "m")
    assert checkpoint.pinned(root, "m") == 1


def test_a_pin_that_a_setting_would_undo_is_refused(root, monkeypatch):
    monkeypatch.setenv(environment_name("default_version"), "5")
    for command in (["rollback", "m"], ["pin", "m", 1]):
        assert "DROPSERVE_DEFAULT_VERSION is 5 and wins over a pin" in refused(root, *command)
    assert checkpoint.pinned(root, "m") is None
    monkeypatch.setenv(environment_name("default_version"), "3")  # which is damaged: 5 answers
    assert "m: would keep 3, 5" in done(root, "prune", "m", "--keep", 1, "--dry-run")
    monkeypatch.setenv(environment_name("default_model"), "other")
    done(root, "rollback", "m")


def test_old_versions_are_pruned_but_none_that_answers_is_pinned_or_the_newest(root):
    done(root, "pin", "m", 1)
    dry = done(root, "prune", "m", "--keep", 2, "--dry-run")
    assert dry.splitlines() == [
        f"would remove {root}/m/2", f"would remove {root}/m/3", "m: would keep 1, 4, 5"
    ]  # fmt: skip
    assert checkpoint.versions(root, "m") == [1, 2, 3, 4, 5]
    (root / "m" / ".removed-0").mkdir()  # left by a prune that was killed
    moved = (root / "m" / "2").rename(root / "elsewhere")
    (root / "m" / "2").symlink_to(moved)
    assert "m: has 1, 4, 5" in done(root, "prune", "m", "--keep", 2)
    assert {path.name for path in (root / "m").iterdir()} == {"1", "4", "5", "pin.json"}
    assert len(list(moved.iterdir())) == 3
    done(root, "pin", "m", "latest")
    damage(root, 5)  # so that 4 answers
    assert "m: has 4, 5" in done(root, "prune", "m", "--keep", 1)
    assert "m: has 4, 5" in done(root, "prune", "m", "--keep", 1)


def test_nothing_is_pruned_where_it_is_not_known_which_version_answers(root):
    for version in (1, 2, 4, 5):
        damage(root, version)
    assert "no version can be served; nothing was changed" in refused(
        root, "prune", "m", "--keep", 1
    )
    assert checkpoint.versions(root, "m") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "command", [["manifest"], ["pin", 1], ["pin", "latest"], ["rollback"], ["prune", "--keep", 1]]
)
def test_a_model_that_is_not_there_is_named(root, command):
    name, *rest = command
    assert "no model 'other'" in refused(root, name, "other", *rest)
    assert not (root / "other").exists()
