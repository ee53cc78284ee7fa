"""Networks: they are what their description says, and whose code a factory runs."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dropserve.models.dropout import InvertedDropout, SpatialDropout
from dropserve.models.errors import ConfigError
from dropserve.models.factories import call_factory, trusted
from dropserve.models.networks import NetworkConfig, default_config
from dropserve.models.sequential import compile_for_inference

MLP = NetworkConfig("mlp", (1, 8, 8), 10)
CNN = NetworkConfig("cnn", (3, 28, 20), 7, (64,), (0.3,), (8, 16), 0.1)
FACTORY = NetworkConfig(
    "torch.nn:Linear", (1, 1, 4), 3, arguments={"in_features": 4, "out_features": 3}
)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("config", [MLP, CNN, FACTORY], ids=lambda c: c.kind)
def test_a_description_survives_json(config):
    assert NetworkConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_default_mlp_has_the_layers_and_size_it_is_known_by():
    module = default_config("mlp", (1, 28, 28), 10).build()
    assert [name for name, _ in module.named_children()] == [
        "flatten", "hidden1", "hidden1_relu", "dropout1",
        "hidden2", "hidden2_relu", "dropout2", "logits",
    ]  # fmt: skip
    assert [m.p for m in module if isinstance(m, InvertedDropout)] == [0.2, 0.5]
    assert size(module) == 269_322


def test_the_default_cnn_has_the_layers_and_size_it_is_known_by():
    module = default_config("cnn", (1, 28, 28), 10).build()
    blocks = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "norm", "relu", "pool")]
    head = ["flatten", "hidden1", "hidden1_relu", "dropout1", "logits"]
    assert [name for name, _ in module.named_children()] == blocks + head
    kernels = 9 * (1 * 32 + 32 * 64 + 64 * 128)
    norms = 2 * (32 + 64 + 128)
    assert size(module) == kernels + norms + (3 * 3 * 128 + 1) * 128 + 129 * 10


@pytest.mark.parametrize("side", [2, 3, 8, 28, 32, 33])
def test_the_default_cnn_fits_any_image(side):
    module = default_config("cnn", (3, side, side), 5).build().eval()
    assert module(torch.zeros(2, 3, side, side)).shape == (2, 5)


def test_an_mlp_computes_what_numpy_does_by_hand():
    module = replace(MLP, hidden=(6, 5), dropout=(0.2, 0.5)).build().eval()
    w = {name: t.double().numpy() for name, t in module.state_dict().items()}
    x = torch.randn(4, 1, 8, 8)
    h = x.double().numpy().reshape(4, 64)
    for layer in ("hidden1", "hidden2"):
        h = np.maximum(h @ w[f"{layer}.weight"].T + w[f"{layer}.bias"], 0)
    expected = h @ w["logits.weight"].T + w["logits.bias"]
    np.testing.assert_allclose(module(x).detach().numpy(), expected, atol=1e-6)


def test_a_cnn_drops_channels_between_its_blocks_only():
    module = CNN.build()
    assert [n for n, m in module.named_children() if isinstance(m, SpatialDropout)] == [
        "spatial_dropout1"
    ]
    assert module.spatial_dropout1.p == 0.1
    assert module(torch.zeros(2, 3, 28, 20)).shape == (2, 7)


def test_a_compiled_network_does_not_overwrite_its_input():
    x = torch.full((2, 3), -1.0)
    layers = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(3, 2)).eval()
    assert compile_for_inference(layers, x) is not layers
    compile_for_inference(layers, x)(x)
    assert (x == -1).all()


def test_a_zero_rate_makes_no_dropout_layer():
    module = replace(MLP, dropout=(0.0, 0.5)).build()
    assert [n for n, m in module.named_children() if isinstance(m, InvertedDropout)] == ["dropout2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"kind": "rnn"},
            "must be mlp, cnn, gru, wrn, vit, package.module:factory or path/to/file.py:factory",
        ),
        ({"classes": 1}, "at least 2"),
        ({"hidden": (0, 256)}, "widths must be"),
        ({"hidden": (65_537, 256)}, "widths must be"),
        ({"input": (1, -8, 8)}, "widths must be"),
        ({"input": (1, 8)}, "input"),
        ({"dropout": (0.2,) * 3}, "one rate a hidden layer"),
        ({"dropout": (0.2, 1.0)}, r"\[0, 1\)"),
        ({"spatial_dropout": -0.1}, r"\[0, 1\)"),
        ({"hidden": (8,) * 65, "dropout": (0.5,) * 65}, "at most 64 layers"),
        ({"kind": "cnn", "channels": (4, 4, 4, 4)}, "to nothing"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(change, reason):
    with pytest.raises(ConfigError, match=reason):
        replace(MLP, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"input": [1, 8]}, {"input": None}, {"input": "abc"}, {"classes": "ten"},
        {"classes": float("inf")}, {"hidden": 256}, {"dropout": ["a", "b"]}, {"arguments": 3},
    ],
    ids=repr,
)  # fmt: skip
def test_json_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match="network"):
        NetworkConfig.from_json({**MLP.to_json(), **change})


@pytest.mark.parametrize("name", list(MLP.to_json())[:8])
def test_json_with_a_missing_value_is_refused_by_name(name):
    values = MLP.to_json()
    del values[name]
    with pytest.raises(ConfigError, match=name):
        NetworkConfig.from_json(values)


def test_a_description_that_an_earlier_release_wrote_is_todays_default():
    values = dict(list(MLP.to_json().items())[:8])
    assert NetworkConfig.from_json(values) == MLP


@pytest.mark.parametrize("allowed", [None, {"torch.nn:Linear"}], ids=["any", "named"])
def test_a_trusted_factory_makes_the_module(allowed):
    module = FACTORY.build(allowed)
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (4, 3)


@pytest.mark.parametrize("allowed", [(), {"torch.nn:Conv2d"}])
def test_a_factory_that_is_not_trusted_is_not_called(allowed):
    config = replace(FACTORY, kind="builtins:print", arguments={"nonsense": 1})
    with pytest.raises(ConfigError, match=r"'builtins:print' is not trusted.*DROPSERVE_FACTORIES"):
        config.build(allowed)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no.such.package:make", "ModuleNotFoundError"),
        ("torch.nn:NoSuchLayer", "AttributeError"),
        ("torch.nn:Conv2d", "TypeError"),
        ("builtins:dict", "made a dict, not a torch.nn.Module"),
        (":make", "ValueError"),
    ],
)
def test_a_broken_factory_is_refused_with_its_error(kind, reason):
    with pytest.raises(ConfigError, match=reason):
        replace(FACTORY, kind=kind).build()


NETS = """
from torch import nn
import blocks
from .blocks import width
def make(extra=0):
    return nn.Linear(blocks.width(), width() + extra)
"""


def write(folder, width, name="nets.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(NETS)
    (folder / "blocks.py").write_text(f"def width():\n    return {width}\n")
    return folder / name


def test_files_and_neighbours_of_one_name_are_different_modules(tmp_path):
    before = set(sys.modules), list(sys.path)
    for width in (3, 4):
        module = call_factory(f"{write(tmp_path / str(width), width)}:make", {"extra": 1})
        assert isinstance(module, nn.Linear)
        assert (module.in_features, module.out_features) == (width, width + 1)
    assert sys.path == before[1]
    assert {
        name for name in set(sys.modules) - before[0] if not name.startswith("_factory_")
    } == set()


def test_a_file_that_was_edited_is_run_anew_with_its_neighbours(tmp_path):
    file = write(tmp_path / "a", 3)
    assert call_factory(f"{file}:make", {}).in_features == 3
    write(tmp_path / "a", 1234)  # of another length, so that no cached byte code is taken for it
    module = call_factory(f"{file}:make", {})
    assert (module.in_features, module.out_features) == (1234, 1234)


def test_a_relative_path_starts_in_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "a:b", 5, name="my nets.v2.py")
    monkeypatch.chdir(tmp_path)
    assert call_factory("a:b/my nets.v2.py:make", {}).in_features == 5


@pytest.mark.parametrize(
    ("code", "name", "reason"),
    [
        ("def make(:", "make", r"bad\.py:make: SyntaxError: .*bad\.py, line 1"),
        ("import sys; sys.exit(3)", "make", r"bad\.py:make: SystemExit: 3"),
        ("", "make", r"bad\.py:make: AttributeError: .*no attribute 'make'"),
        ("def make():\n    raise OSError('no')", "make", r"bad\.py:make: OSError: no"),
        (None, "make", r"bad\.py:make: FileNotFoundError"),
    ],
    ids=["syntax", "exit", "missing", "failing", "no file"],
)
def test_a_file_that_fails_is_named(tmp_path, code, name, reason):
    if code is not None:
        (tmp_path / "bad.py").write_text(code)
    path = list(sys.path)
    with pytest.raises(ConfigError, match=reason):
        call_factory(f"{tmp_path / 'bad.py'}:{name}", {})
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "allowed", "meant"),
    [
        ("a.b:f", ["a.b:f"], "a.b:f"),
        ("x/nets.py:f", ["x/nets.py:f", "y/nets.py:f"], "x/nets.py:f"),
        ("./x//nets.py:f", ["x/nets.py:f", "y/nets.py:f"], "x/nets.py:f"),
        ("/home/me/nets.py:f", ["/srv/nets.py:f", "/srv/nets.py:g"], "/srv/nets.py:f"),
    ],
)
def test_a_file_is_known_by_its_path_or_else_its_name(name, allowed, meant):
    assert trusted(name, allowed) == meant


@pytest.mark.parametrize(
    ("name", "allowed", "reason"),
    [
        ("os:system", ["a.b:system", "/x/nets.py:g"], r"named there: a.b:system, nets.py:g$"),
        ("nets.py:g", ["nets.py:f"], "not trusted"),
        ("evil/blocks.py:f", ["nets.py:f"], "not trusted"),
        ("nets:f", ["nets.py:f"], "not trusted"),
        ("a.nets:f", ["b.nets:f"], "not trusted"),
        ("z/nets.py:f", ["x/nets.py:f", "y/nets.py:f"], "x/nets.py:f or y/nets.py:f"),
    ],
)
def test_what_is_not_allowed_or_not_clear_is_refused(name, allowed, reason):
    with pytest.raises(ConfigError, match=reason):
        trusted(name, allowed)


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (65, 1), (66, 2), (80, 2), (96, 3), (97, 1)])
def test_a_vit_of_any_width_has_a_head_for_32_units_as_far_as_they_divide(width, heads):
    module = NetworkConfig("vit", (1, 8, 8), 10, (width,), (0.1,)).build()
    assert module.blocks[0].heads == heads
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
