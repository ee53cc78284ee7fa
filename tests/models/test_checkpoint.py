"""Checkpoints: what is saved comes back to the bit; what was tampered with is refused."""

import hashlib
import json
import os
import pickle
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropserve.models import examples
from dropserve.models.checkpoint import (
    MANIFEST,
    METADATA,
    PIN,
    WEIGHTS,
    Metadata,
    add_manifest,
    default_name,
    is_name,
    load,
    load_weights,
    mark,
    names,
    pin,
    pinned,
    read,
    remove,
    save,
    versions,
)
from dropserve.models.data import Split
from dropserve.models.errors import CheckpointError, CheckpointNotFound, CheckpointRefused
from dropserve.models.examples import Example
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.repository import Folder

INPUT = Preprocessing((8, 8), 1, (0.5,), (0.25,))
MLP = NetworkConfig("mlp", (1, 8, 8), 3, (6,), (0.5,))
CNN = NetworkConfig("cnn", (1, 8, 8), 3, (6,), (0.5,), (4, 4), 0.2)
FACTORY = NetworkConfig(
    "torch.nn:Linear", (1, 8, 8), 3, arguments={"in_features": 8, "out_features": 3}
)


def metadata(network=MLP, name="net"):
    return Metadata(
        name, network, INPUT, ("a", "b", "c"), {"epochs": 3}, {"digest": "d"}, {"accuracy": 0.5}
    )


@pytest.fixture
def path(tmp_path):
    return save(tmp_path, MLP.build(), metadata())


def digest(raw):
    return hashlib.sha256(raw).hexdigest()


def forge(path, file, raw):
    """Write a file of a version anew, and a manifest that fits, as a forger would."""
    (path / file).write_bytes(raw)
    found = {name: (path / name).read_bytes() for name in (METADATA, WEIGHTS)}
    files = {name: {"bytes": len(raw), "sha256": digest(raw)} for name, raw in found.items()}
    (path / MANIFEST).write_text(json.dumps({"files": files}))


def change_json(path, **changes):
    values = json.loads((path / METADATA).read_text())
    forge(path, METADATA, json.dumps({**values, **changes}).encode())


def change_weights(path, raw):
    (path / WEIGHTS).write_bytes(raw)
    change_json(path, sha256=digest(raw))


def tensors(path):
    return safetensors.torch.load((path / WEIGHTS).read_bytes())


def refused(path, reason, file=WEIGHTS):
    with pytest.raises(CheckpointRefused, match=reason) as caught:
        load(path)
    assert caught.value.path == path / file
    assert caught.value.reason in str(caught.value)


@pytest.mark.parametrize("network", [MLP, CNN, FACTORY], ids=lambda n: n.kind)
def test_a_module_comes_back_to_the_bit_and_in_eval_mode(tmp_path, network):
    module, x = network.build(), torch.randn(5, 1, 8, 8)
    module(x)  # batch norms have something to remember
    path = save(tmp_path / "new" / "root", module, metadata(network))
    again, about = load(path, factories={"torch.nn:Linear"})
    assert path == tmp_path / "new" / "root" / "net" / "1"
    assert not any(m.training for m in again.modules())
    with torch.inference_mode():
        assert torch.equal(again(x), module.eval()(x))
    sha256 = digest((path / WEIGHTS).read_bytes())
    assert about == replace(metadata(network), sha256=sha256, torch_version=torch.__version__)


def test_a_version_holds_three_files_and_no_pickle(path):
    assert sorted(p.name for p in path.iterdir()) == [MANIFEST, METADATA, WEIGHTS]
    assert sorted(p.name for p in path.parent.iterdir()) == ["1"]
    assert json.loads((path / METADATA).read_text())["name"] == "net"
    assert tensors(path).keys() == MLP.build().state_dict().keys()


def test_loading_draws_nothing_from_the_global_generator(path):
    before = torch.random.get_rng_state()
    load(path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_next_version_follows_the_highest(tmp_path):
    saved = []
    for _ in range(4):
        saved.append(save(tmp_path, MLP.build(), metadata()).name)
        (tmp_path / "net" / "9").mkdir(exist_ok=True)
    assert saved == ["1", "10", "11", "12"]


def test_versions_are_numbers_in_numerical_order(tmp_path):
    for name in ("10", "9", "2", "0", "03", "-1", "x", ".new-abc", "1e3", "9999999999"):
        (tmp_path / "net" / name).mkdir(parents=True)
    (tmp_path / "net" / "5").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden" / "1").mkdir(parents=True)
    assert versions(tmp_path, "net") == [2, 9, 10]
    assert versions(tmp_path / "net", "../net") == []
    assert names(tmp_path) == ["empty", "net"]
    assert names(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["a", "digits-mlp", "Net_2.1", "x" * 64])
def test_a_name_is_a_name(name):
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a\\b", "a b", "é", "x" * 65, "a\n"])
def test_what_could_leave_the_folder_is_no_name(tmp_path, name):
    assert not is_name(name)
    assert versions(tmp_path, name) == []
    with pytest.raises(CheckpointError, match="cannot name a model: use 1 to 64"):
        save(tmp_path, MLP.build(), metadata(name=name))
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_memory_are_saved_and_loaded(tmp_path):
    square = replace(MLP, hidden=(64, 64), dropout=(0.5, 0.5))
    module = square.build()
    module.hidden2.weight = module.hidden1.weight
    module.logits.weight.data = module.hidden1.weight.data[:3]  # a view of another tensor
    again, _ = load(save(tmp_path, module, metadata(square)))
    assert torch.equal(again.hidden2.weight, module.hidden1.weight)
    assert torch.equal(again.logits.weight, module.logits.weight)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "net").write_text("a file")
    with pytest.raises(CheckpointError, match="net: cannot write a version: "):
        save(tmp_path, MLP.build(), metadata())


def test_a_factory_gets_only_tensors_that_fit(tmp_path):
    path = save(tmp_path, FACTORY.build(), metadata(FACTORY))
    change_weights(
        path, safetensors.torch.save({"weight": torch.zeros(3, 9), "bias": torch.ones(3)})
    )
    with pytest.raises(CheckpointRefused, match=r"'weight' .*\[3, 9\].*\[3, 8\]$"):
        load(path, None)


def test_a_missing_version_is_not_found(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no such checkpoint"):
        load(tmp_path / "net" / "1")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-1], "invalid safetensors"),
        (lambda _: pickle.dumps(MLP.build().state_dict()), "not safetensors"),
    ],
    ids=["truncated", "a renamed pickle"],
)
def test_damaged_weights_are_refused_even_if_their_sha_was_forged(path, damage, reason):
    change_weights(path, damage((path / WEIGHTS).read_bytes()))
    refused(path, reason)


def test_weights_of_another_version_are_refused_even_if_the_manifest_was_forged(path):
    raw = bytearray((path / WEIGHTS).read_bytes())
    raw[-3] ^= 1
    forge(path, WEIGHTS, raw)
    refused(path, rf"exchanged: SHA-256 is {digest(raw)}, model.json says [0-9a-f]{{64}}")


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_removed_or_added_bytes_of_any_file_are_refused(path, data):
    file = path / data.draw(st.sampled_from([MANIFEST, METADATA, WEIGHTS]))
    raw = file.read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
    new = data.draw(st.binary(max_size=9) | st.just(b"") | st.just(raw[start : end + 1]))
    changed = raw[:start] + new + raw[data.draw(st.sampled_from([start, end, start + 1])) :]
    file.write_bytes(changed)
    try:
        # white space is the only thing in a manifest that says nothing
        if changed != raw and (file.name != MANIFEST or json_or_none(changed) != json.loads(raw)):
            with pytest.raises(CheckpointRefused):
                load(path)
    finally:
        file.write_bytes(raw)
    assert load(path)[1].name == "net"


def json_or_none(raw):
    try:
        return json.loads(raw)
    except ValueError:
        return None


def test_metadata_that_were_edited_are_refused_although_they_make_sense(path):
    raw = (path / METADATA).read_bytes()
    edited = raw.replace(b'"accuracy": 0.5', b'"accuracy": 0.9')
    (path / METADATA).write_bytes(edited)
    has = f"edited or exchanged: it has {len(raw)} bytes and SHA-256 {digest(edited)}, manifest"
    refused(path, has, METADATA)
    (path / MANIFEST).unlink()
    assert load(path)[1].evaluation == {"accuracy": 0.9}  # integrity, not authenticity


@pytest.mark.parametrize(
    "files",
    [{}, [], None, {METADATA: {}}, {METADATA: {}, WEIGHTS: {}, "notes": {}}],
    ids=["none", "a list", "null", "one", "three"],
)
def test_a_manifest_names_both_files_and_no_other(path, files):
    (path / MANIFEST).write_text(json.dumps({"files": files}))
    refused(path, "must name model.json and model.safetensors alone", MANIFEST)


def test_files_that_the_manifest_does_not_name_are_never_read(path):
    os.mkfifo(path / "notes")
    (path / "state.safetensors").write_bytes(b"damaged")
    assert load(path)[1].name == "net"


def test_a_version_without_a_manifest_is_loaded_with_the_command_that_writes_one(path, caplog):
    digests = {name: digest((path / name).read_bytes()) for name in (METADATA, WEIGHTS)}
    sealed = read(path)
    assert sealed.manifest_sha256 == digest((path / MANIFEST).read_bytes())
    load(path)
    assert caplog.messages == []
    (path / MANIFEST).unlink()
    load(path)
    (message,) = caplog.messages
    assert message.endswith("dropserve manifest net --version 1")
    found = read(path)
    assert found.manifest_sha256 is None
    assert add_manifest(found).manifest_sha256 == sealed.manifest_sha256
    files = json.loads((path / MANIFEST).read_text())["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == digests


def other(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("logits.bias"), "'logits.bias' is missing"),
        (other("extra", torch.zeros(1)), "'extra' belongs to no layer"),
        (other("logits.bias", torch.zeros(4)), r"'logits.bias' is torch.float32 \[4\].*\[3\]"),
        (other("logits.bias", torch.zeros(3, 1)), r"\[3, 1\], the network needs torch.float32"),
        (other("logits.bias", torch.zeros(3).double()), "float64 .*needs torch.float32"),
        (other("logits.bias", torch.zeros(3).half()), "float16 .*needs torch.float32"),
        (other("logits.bias", torch.tensor([0, torch.nan, 0])), "'logits.bias' holds NaN or inf"),
        (other("logits.bias", torch.tensor([0, -torch.inf, 0])), "'logits.bias' holds NaN or inf"),
    ],
    ids=["missing", "extra", "shape", "rank", "float64", "float16", "nan", "infinity"],
)
def test_tensors_that_are_not_the_networks_are_refused_by_name(path, change, reason):
    weights = tensors(path)
    change(weights)
    change_weights(path, safetensors.torch.save(weights))
    refused(path, reason)


def test_more_weights_than_8_gib_are_refused_unread(path):
    os.truncate(path / WEIGHTS, 2**33 + 1)  # a sparse file
    refused(path, "8589934593 bytes, more than 8589934592")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("file", [WEIGHTS, METADATA, MANIFEST])
def test_only_plain_files_are_read_and_none_hangs(path, file):
    (path / file).rename(path / "elsewhere")
    if file != MANIFEST:
        refused(path, "cannot be opened: No such file", file)
    (path / file).symlink_to("elsewhere")
    refused(path, "cannot be opened: a symbolic link", file)
    (path / file).unlink()
    os.mkfifo(path / file)
    refused(path, "not a plain file", file)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"name": "a", "name": "b"}', "duplicate name"),
        (b"{}", "missing|KeyError"),
        (b"{" + b" " * 1_000_001 + b"}", "more than 1000000"),
    ],
    ids=["a duplicate name", "no values", "too long"],
)
def test_metadata_that_are_no_metadata_are_refused(path, raw, reason):
    forge(path, METADATA, raw)
    refused(path, reason, METADATA)


INFINITE = {**INPUT.to_json(), "channels": float("inf")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"surprise": 1}, "unknown fields: surprise"),
        ({"classes": ["a", "b"]}, "one class name a logit"),
        ({"classes": 3}, "TypeError"),
        ({"recipe": "fast"}, "ValueError"),
        ({"network": "mlp"}, "network"),
        ({"network": {**MLP.to_json(), "input": [1, 8, 9]}}, "disagree on the input's shape"),
        ({"network": {**MLP.to_json(), "dropout": [1.5]}}, r"\[0, 1\)"),
        ({"network": FACTORY.to_json()}, "'torch.nn:Linear' is not trusted"),
        ({"preprocessing": INFINITE}, "preprocessing"),
        ({"preprocessing": {**INPUT.to_json(), "std": [0.0]}}, "above 0"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value) if isinstance(value, str) else "",
)
def test_metadata_that_make_no_sense_are_refused(path, changes, reason):
    change_json(path, **changes)
    refused(path, reason, METADATA)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recipe": {"notes": "x" * 1_000_000}}, r"model\.json would have \d+ bytes, more than"),
        ({"classes": ("a", "b")}, "one class name a logit"),
        ({"preprocessing": replace(INPUT, size=(8, 9))}, "disagree on the input's shape"),
        ({"examples": (Example(0, "no picture"),)}, r"examples\[0\]\.png"),
        ({"recipe": {1: "a number", "1": "the same as text"}}, "duplicate name"),
        ({"recipe": {"seed": object()}}, "net: not for JSON"),
        ({"evaluation": {"nll": float("nan")}}, "net: not for JSON"),
    ],
    ids=["too long", "classes", "shape", "example", "twice", "no JSON", "nan"],
)
def test_metadata_that_could_not_be_read_again_are_not_saved(tmp_path, change, reason):
    with pytest.raises(CheckpointError, match=reason):
        save(tmp_path, MLP.build(), replace(metadata(), **change))
    assert list(tmp_path.rglob("*")) == []


def test_examples_stay_out_where_the_metadata_would_become_too_long(tmp_path):
    split = Split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3))
    about = replace(metadata(), recipe={"notes": ""}, examples=examples.choose(split, 3, INPUT))
    path = save(tmp_path, MLP.build(), about)
    assert load(path)[1].examples == about.examples
    notes = {"notes": "x" * (1_000_000 - (path / METADATA).stat().st_size)}
    path = save(tmp_path, MLP.build(), replace(about, recipe=notes))  # as long as may be
    assert load(path)[1].examples == about.examples
    notes["notes"] += "x"
    again = load(save(tmp_path, MLP.build(), replace(about, recipe=notes)))[1]
    assert (again.recipe, again.examples) == (notes, ())


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    module = MLP.build()
    with torch.no_grad():
        module.logits.bias[1] = torch.nan
    with pytest.raises(CheckpointError, match=r"logits\.bias.*NaN or infinity"):
        save(tmp_path, module, metadata())
    assert list(tmp_path.rglob("*")) == []


class Tied(torch.nn.Module):
    """Two layers with one weight, as language models have."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight


def loads_nothing(path, module):
    with pytest.raises(CheckpointRefused, match="pickle, which is never read") as caught:
        load_weights(path, module)
    return caught.value


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_with_the_lines_that_turn_it_into_weights(
    tmp_path, monkeypatch, zipped
):
    monkeypatch.chdir(tmp_path)
    trained = Tied()
    torch.save(trained.state_dict(), "net.pth", _use_new_zipfile_serialization=zipped)
    notes = loads_nothing(Path("net.pth"), Tied()).__notes__
    exec(notes[0].replace("\n  ", "\n").strip(), {})  # noqa: S102  our own lines
    again = Tied()
    Path("link").symlink_to("net.safetensors")
    load_weights(Path("link"), again)
    assert torch.equal(again.second.weight, trained.first.weight)
    assert torch.equal(again.second.bias, trained.second.bias)
    Path("plain.pkl").write_bytes(pickle.dumps(trained.state_dict(), 4))
    loads_nothing(Path("plain.pkl"), Tied())


def test_weights_of_another_network_are_refused_by_a_tensor_and_change_nothing(tmp_path):
    module, state = MLP.build(), MLP.build().state_dict()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    path = tmp_path / "w.safetensors"
    for other, reason in (
        ({f"module.{n}": x for n, x in state.items()}, "'hidden1.bias' is missing, .*'module.h"),
        ({n: x * float("nan") for n, x in state.items()}, "holds NaN or infinity"),
    ):
        path.write_bytes(safetensors.torch.save(other))
        with pytest.raises(CheckpointRefused, match=rf"w\.safetensors: tensor .*{reason}"):
            load_weights(path, module)
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())


def test_a_pin_is_kept_replaced_and_taken_away(tmp_path):
    (tmp_path / "net").mkdir()
    for version in (None, 3, 999_999_999, None):
        pin(tmp_path, "net", version)
        assert pinned(tmp_path, "net") == version
        assert [p.name for p in (tmp_path / "net").iterdir()] == ([PIN] if version else [])


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b"3", b'{"version": 0}', b'{"version": true}', b'{"version": "3"}',
     b'{"version": 3.0}', b'{"version": 1000000000}', b'{"version": 3}'.ljust(1001)],
)  # fmt: skip
def test_a_pin_that_is_none_is_refused(tmp_path, raw):
    path = tmp_path / "net" / PIN
    path.parent.mkdir()
    path.write_bytes(b'{"version": 3}'.ljust(1000))
    assert pinned(tmp_path, "net") == 3
    path.write_bytes(raw)
    with pytest.raises(CheckpointRefused) as caught:
        remove(tmp_path, "net", 3)
    assert caught.value.path == path


def test_the_latest_version_is_chosen_or_the_one_asked_for_or_the_error_says_what_there_is(
    tmp_path,
):
    there = Folder(tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"no model 'net' in .*: there is none$"):
        there.choose("net")
    for name in ("net/2", "net/10", "nest/1", "empty", "none/x"):
        (tmp_path / name).mkdir(parents=True)
    assert (there.choose("net"), there.choose("net", 2)) == (10, 2)
    with pytest.raises(CheckpointNotFound, match=r"no version 3 of 'net' in .*: there are 2, 10$"):
        there.choose("net", 3)
    known = r"no model 'nets' in .*: there are nest, net; did you mean net\?$"
    with pytest.raises(CheckpointNotFound, match=known):
        there.choose("nets")


def test_a_version_is_removed_with_what_earlier_removals_left_unless_it_is_pinned(tmp_path):
    for name in ("1", "2", ".removed-7/x", "kept"):
        (tmp_path / "net" / name).mkdir(parents=True)
    (tmp_path / "net" / ".removed-8").symlink_to("kept")
    pin(tmp_path, "net", 2)
    assert remove(tmp_path, "net", 2) is False
    assert remove(tmp_path, "net", 1)
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["2", "kept", PIN]


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(file.read_bytes()),
        lambda file: file.chmod(0o600),
        lambda file: file.rename(file.with_name("other")),
        lambda file: file.write_bytes(b""),
        lambda file: file.with_name("another").write_bytes(b""),
        lambda file: file.unlink(),
    ],
)
def test_a_mark_changes_with_any_file_of_a_version_and_only_then(path, change):
    before = mark(path)
    time.sleep(0.02)  # of the file system's clock
    assert mark(path) == before
    assert [entry[0] for entry in before] == [MANIFEST, METADATA, WEIGHTS]
    change(path / METADATA)
    assert mark(path) != before
    assert mark(path / "nowhere") is None


@pytest.mark.parametrize(
    ("dataset", "network", "name"),
    [("digits", "mlp", "digits-mlp"), ("/data/my photos/", "nets.own:Net", "my-photos-Net"),
     (".hidden", "a/b.py:f", "hidden-f"), ("x" * 70, "mlp", "x" * 64)],
)  # fmt: skip
def test_a_model_is_named_after_its_data_and_network(dataset, network, name):
    assert default_name(dataset, network) == name
    assert is_name(name)
