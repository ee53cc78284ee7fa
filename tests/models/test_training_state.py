"""The state of an interrupted run: refused where it is another run's, or damaged."""

import hashlib
import os
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from dropserve.models.errors import CheckpointRefused, ConfigError
from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import NetworkConfig
from dropserve.models.processes import launch
from dropserve.models.training import State, claimed, earlier_run, fit

MLP = NetworkConfig("mlp", (1, 8, 8), 10, (16,), (0.3,))
RECIPE = Recipe(epochs=3, batch_size=64)


def start(digits, path, config=MLP, recipe=RECIPE, images=200):
    data = digits.train.take(torch.arange(images))
    normalize = digits.preprocessing.normalize
    return fit(config.build(), data, normalize, recipe, state_path=path, fabric=launch("cpu"))


@pytest.fixture
def path(digits, tmp_path):
    run = start(digits, tmp_path / "state.safetensors")
    list(islice(run, 1))
    run.close()
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1e-3}, {"epochs": 4}, {"seed": 1}, {"flip": True}, {"threads": 2}],
    ids=repr,
)
def test_a_state_of_another_recipe_is_refused_by_the_field_that_differs(digits, path, change):
    ((field, value),) = change.items()
    differs = rf"\({field} was {getattr(RECIPE, field)}, now is {value}\)"
    with pytest.raises(ConfigError, match=f"another network, recipe or data {differs}"):
        next(start(digits, path, recipe=replace(RECIPE, **change)))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"images": 210}, "another data"),
        ({"config": replace(MLP, hidden=(17,))}, "another network"),
        ({"config": replace(MLP, dropout=(0.4,))}, "another network"),
    ],
    ids=["data", "width", "rate"],
)
def test_a_state_of_other_data_or_another_network_is_refused(digits, path, change, differs):
    with pytest.raises(ConfigError, match=rf"another network, recipe or data \({differs}\)"):
        next(start(digits, path, **change))


def stepped():
    """Return a state as it is after one epoch of one step."""
    module = nn.Linear(4, 3)
    state = State(module, torch.optim.AdamW(module.parameters(), fused=True), {"run": "some"})
    module(torch.randn(5, 4)).square().mean().backward()
    state.optimizer.step()
    state.finish_epoch(0.5, 1.0)
    return state


def test_the_best_epoch_has_the_highest_accuracy_and_among_equals_the_lowest_loss():
    module = nn.Linear(1, 1)
    state = State(module, torch.optim.AdamW(module.parameters()), {"run": "some"})
    scores = [(0.5, 3.0), (0.9, 2.0), (0.9, 1.0), (0.9, 1.5), (0.8, 0.1)]
    best = []
    for epoch, score in enumerate(scores, 1):
        module.weight.data.fill_(epoch)
        best.append(state.finish_epoch(*score))
    assert best == [True, True, True, False, False]
    assert not state.exhausted(3)
    assert state.exhausted(2)
    assert state.best["weight"] == 3


def set_tensor(name, value):
    return lambda tensors, _: tensors.update({name: value})


def drop_tensor(name):
    return lambda tensors, _: tensors.pop(name)


def set_number(name, value):
    return lambda _, metadata: metadata.update({name: value})


def drop_number(name):
    return lambda _, metadata: metadata.pop(name)


def write_changed(path, change):
    stepped().write(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors, metadata)
    blank = "0" * 64
    raw = safetensors.torch.save(tensors, {**metadata, "sha256": blank})
    seal = hashlib.sha256(raw).hexdigest()
    path.write_bytes(raw.replace(blank.encode(), seal.encode(), 1))


def test_a_state_that_was_rewritten_unchanged_is_restored(tmp_path):
    write_changed(tmp_path / "state", lambda *_: None)
    state = stepped()
    state.restore(tmp_path / "state")
    assert state.epoch == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(drop_tensor("optimizer.0.exp_avg"), id="a missing moment"),
        pytest.param(drop_tensor("optimizer.0.step"), id="a missing step"),
        pytest.param(set_tensor("optimizer.0.exp_avg", torch.zeros(3)), id="a small moment"),
        pytest.param(set_tensor("optimizer.99.step", torch.ones(())), id="a step too many"),
        pytest.param(set_tensor("optimizer.x.step", torch.ones(())), id="a misnamed step"),
        pytest.param(drop_tensor("module.bias"), id="a missing weight"),
        pytest.param(set_tensor("module.bias", torch.zeros(7)), id="a long weight"),
        pytest.param(drop_tensor("best.bias"), id="a missing best weight"),
        pytest.param(set_tensor("other.x", torch.zeros(1)), id="an unknown part"),
        pytest.param(set_number("epoch", "many"), id="no number of epochs"),
        pytest.param(set_number("epoch", "-1"), id="a negative number of epochs"),
        pytest.param(drop_number("best_score"), id="no best score"),
        pytest.param(drop_number("fingerprint"), id="no fingerprint"),
        pytest.param(set_number("fingerprint", "[]"), id="another fingerprint"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_a_step_is_taken(tmp_path, change):
    write_changed(tmp_path / "state", change)
    with pytest.raises(CheckpointRefused):
        stepped().restore(tmp_path / "state")


@pytest.mark.parametrize("change", [drop_number("epoch"), set_number("epoch", "many")])
def test_a_state_that_does_not_say_how_far_it_is_is_refused(tmp_path, change):
    write_changed(tmp_path / "state", change)
    with pytest.raises(CheckpointRefused, match="no finished epoch"):
        earlier_run(tmp_path / "state", resume=True, restart=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    stepped().write(path)
    return path, path.read_bytes()


@given(st.data())
def test_a_state_with_any_bytes_changed_removed_or_added_is_refused_with_the_remedy(written, data):
    path, raw = written
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
    new = data.draw(st.just(b"") | st.binary(max_size=9))
    changed = raw[:start] + new + raw[data.draw(st.sampled_from([start, end, start + len(new)])) :]
    assume(changed != raw)
    path.write_bytes(changed)
    for refused in (stepped().restore, partial(earlier_run, resume=True, restart=False)):
        with pytest.raises(CheckpointRefused, match="--restart discards it"):
            refused(path)
    assert path.read_bytes() == changed  # nothing is lost unasked


def test_a_state_of_an_earlier_release_is_refused_as_it_has_no_checksum(path):
    tensors = safetensors.torch.load(path.read_bytes())
    path.write_bytes(safetensors.torch.save(tensors, {"epoch": "1"}))
    with pytest.raises(CheckpointRefused, match=r"without a checksum.*earlier release.*--restart"):
        earlier_run(path, resume=True, restart=False)


def test_a_state_behind_a_link_or_that_is_no_file_is_refused(path):
    moved = path.rename(path.with_name("elsewhere"))
    path.symlink_to(moved)
    with pytest.raises(CheckpointRefused, match="cannot be opened"):
        earlier_run(path, resume=True, restart=False)
    for make in (os.mkfifo, os.mkdir):
        path.unlink()
        make(path)
        with pytest.raises(CheckpointRefused, match=r"not a plain file|Is a directory"):
            earlier_run(path, resume=True, restart=False)


def test_an_epoch_leaves_one_state_and_no_half_written_one(digits, path):
    stale = path.with_name(path.name + ".part")
    stale.write_bytes(b"left by a crash")
    before = path.read_bytes()
    run = start(digits, path)
    next(run)
    run.close()
    assert path.read_bytes() != before
    assert list(path.parent.iterdir()) == [path]


def test_an_earlier_run_is_continued_or_discarded_as_asked_and_never_lost(path):
    assert earlier_run(path, resume=True, restart=False) == 1
    with pytest.raises(ConfigError, match=r"interrupted after epoch 1.*--resume.*--restart"):
        earlier_run(path, resume=False, restart=False)
    assert path.exists()
    assert earlier_run(path, resume=False, restart=True) == 0
    assert not path.exists()


@pytest.mark.parametrize(("resume", "restart"), [(True, False), (False, True), (False, False)])
def test_without_an_earlier_run_there_is_nothing_to_continue(tmp_path, resume, restart):
    assert earlier_run(tmp_path / "nowhere", resume=resume, restart=restart) == 0


def test_one_run_of_a_model_at_a_time(tmp_path):
    with (
        claimed(tmp_path / "run"),
        pytest.raises(ConfigError, match="another run"),
        claimed(tmp_path / "run"),
    ):
        pass
    with claimed(tmp_path / "run"):
        pass
