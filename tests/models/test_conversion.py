"""Converted networks: eval mode stays, and so do all thinned networks of dropout's conventions."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from dropserve.models import checkpoint
from dropserve.models.conversion import converted
from dropserve.models.errors import ConfigError
from dropserve.models.montecarlo.interception import Interception
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.regularizers import METHODS

MLP = NetworkConfig("mlp", (1, 1, 2), 2, (3, 2), (0.25, 0.4), input_dropout=0.3)
CNN = NetworkConfig("cnn", (1, 4, 4), 2, (3,), (0.4,), (2, 2), 0.2)
TINY_CNN = replace(CNN, input=(1, 2, 2), channels=(2,), spatial_dropout=0.0, input_dropout=0.3)
GRU = NetworkConfig("gru", (1, 3, 2), 2, (3,), (0.25, 0.4))
WRN = NetworkConfig("wrn", (1, 2, 2), 2, (2,), (0.4, 0.25), (1,), input_dropout=0.3)
VIT = NetworkConfig("vit", (1, 4, 4), 2, (4,), (0.3,), stochastic_depth=0.2)
NETWORKS = {config.kind: config for config in (MLP, CNN, GRU, VIT)}
NETWORKS["wrn"] = replace(WRN, channels=(2, 3), blocks=2)


def with_method(kind, name):
    """A small network with a method, and with a method's own number of rates."""
    config = NETWORKS[kind]
    if kind == "gru" and name == "zoneout":
        return replace(config, regularizer=name, dropout=(0.4,))
    shared = {"mask_scope": "batch"} if kind == "gru" and name == "dropconnect" else {}
    return replace(config, regularizer=name, **shared)


@pytest.fixture
def publish(tmp_path):
    """Save a network, with weights biases and running statistics that matter."""

    def publish(config, module=None):
        if module is None:
            module = config.build()
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    tensor.uniform_(-0.3, 1)  # so that most units are on
                    if ".running_" in name:
                        tensor.abs_().add_(0.5) if name.endswith("var") else tensor.neg_()
        size = config.input[1:]
        preprocessing = Preprocessing(size, config.input[0], (0.4,), (0.3,))
        classes = tuple(map(str, range(config.classes)))
        path = checkpoint.save(
            tmp_path, module, checkpoint.Metadata("m", config, preprocessing, classes)
        )
        return checkpoint.read(path)

    return publish


def logits(module, x):
    with torch.no_grad():
        return module.eval()(x)


def all_thinned(module, image):
    """Logits [2^units, classes] of every mask over all dropped units, and the rate of each unit."""
    rates = []

    def units(law, shape):
        rates.extend([law.p] * shape[1:].numel())

    Interception(units).run(module.train(), image)
    masks = torch.tensor(list(product([0.0, 1.0], repeat=len(rates))))
    rest = iter(masks.T)

    def put(law, shape):
        columns = [next(rest) for _ in range(shape[1:].numel())]
        return torch.stack(columns, 1).view(shape) * law.kept

    with torch.no_grad():
        return Interception(put).run(module, image.expand(len(masks), *image.shape[1:])), rates


@pytest.mark.parametrize(
    "config",
    [
        MLP,
        replace(MLP, before_activation=True),
        replace(MLP, batch_norm=True),
        replace(MLP, hidden=(), dropout=()),
        TINY_CNN,
        replace(CNN, before_activation=True),
        WRN,
        replace(WRN, blocks=2, hidden=(), dropout=(0.4,), input_dropout=0.0),
    ],
    ids=lambda c: f"{c.kind}-{'before' if c.before_activation else 'after'}-{len(c.hidden)}",
)
def test_both_conventions_have_the_same_eval_mode_and_the_same_thinned_networks(config, publish):
    vanilla = publish(replace(config, regularizer="vanilla"))
    inverted, about = converted(vanilla, {"regularizer": "dropout"})
    assert about.network == replace(config, regularizer="dropout")
    again = publish(about.network, inverted)
    back, about = converted(again, {"regularizer": "vanilla"})
    assert about.network == vanilla.metadata.network
    for name, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, vanilla.tensors[name], rtol=3e-7, atol=0)

    image = torch.rand(1, *config.input)
    one, other = vanilla.build(), again.build()
    changed = [n for n, t in one.state_dict().items() if not torch.equal(t, again.tensors[n])]
    assert changed
    assert all(name.endswith(".weight") for name in changed)
    torch.testing.assert_close(logits(one, image), logits(other, image), rtol=1e-5, atol=1e-6)
    (expected, rates), (got, same) = (all_thinned(module, image) for module in (one, other))
    assert rates == same
    assert len(expected) == 2 ** len(rates) > 1
    assert len(expected.unique(dim=0)) > len(rates)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["other", "fewer", "removed"])
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for name, m in METHODS.items() for kind in m.networks]
)
def test_other_rates_and_none_preserve_eval_mode_or_are_refused(kind, name, how, publish):
    version = publish(with_method(kind, name))
    config, image = version.metadata.network, torch.randn(5, *NETWORKS[kind].input)
    other = {} if kind in ("gru", "vit") else {"input_dropout": 0.6}
    asked = {
        "other": {"dropout": (0.7,), **other},
        "fewer": {"dropout": (0.0, *config.dropout[1:])},
        "removed": {},
    }[how]
    if name == "zoneout" or (kind, name) == ("vit", "vanilla"):
        with pytest.raises(ConfigError, match="train another network"):
            converted(version, asked, remove=how == "removed")
        return
    module, about = converted(version, asked, remove=how == "removed")
    rates = {"other": (0.7,) * len(config.dropout), "removed": (0.0,) * len(config.dropout)}
    assert about.network.dropout == rates.get(how, asked.get("dropout"))
    assert how != "removed" or not about.network.is_noisy
    torch.testing.assert_close(
        logits(module.double(), image.double()),
        logits(version.build().double(), image.double()),
        rtol=1e-6,
        atol=1e-6,
    )
    if name != "vanilla":
        assert all(
            torch.equal(t, version.tensors[n].double()) for n, t in module.state_dict().items()
        )


NOISE = replace(MLP, regularizer="noise", noise_mean=0.5)


def test_noise_with_a_mean_can_have_another_deviation(publish):
    version = publish(NOISE)
    module, _ = converted(version, {"dropout": (3.0, 2.0)})
    x = torch.randn(4, 1, 1, 2)
    assert torch.equal(logits(module, x), logits(version.build(), x))


@pytest.mark.parametrize(
    ("config", "asked", "remove", "reason"),
    [
        (MLP, {}, False, "give --dropout or --input-dropout .* --remove-dropout, or --to"),
        (MLP, {"dropout": (0.1,)}, True, "rates or --remove-dropout, not both"),
        (MLP, {"input_dropout": 0.1}, True, "rates or --remove-dropout, not both"),
        (MLP, {"dropout": (0.25, 0.4)}, False, "has this already"),
        (MLP, {"regularizer": "dropout"}, False, "has this already"),
        (MLP, {"dropout": (0.1, 0.1, 0.1)}, False, "2 rates, not 3"),
        (MLP, {"dropout": (1.0,)}, False, r"\[0, 1\)"),
        (GRU, {"regularizer": "vanilla"}, False, "gru can have .* vanilla is for mlp, cnn"),
        (GRU, {"input_dropout": 0.1}, False, "input_dropout is for mlp, cnn, wrn"),
        (VIT, {"regularizer": "vanilla"}, False, "no weights of a vit"),
        (NOISE, {"regularizer": "vanilla"}, False, "vanilla and inverted dropout, not for noise"),
        (NOISE, {"dropout": (0.0, 1.0)}, False, "noise with a mean|no rate of it 0"),
        (NOISE, {}, True, "noise with a mean|no rate of it 0"),
        (
            NetworkConfig(
                "torch.nn:Linear", (1, 1, 2), 2, arguments={"in_features": 2, "out_features": 2}
            ),
            {"dropout": (0.1,)},
            False,
            "only mlp, .* can be converted: which weights of torch.nn:Linear",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_with_what_can(config, asked, remove, reason, publish):
    module = nn.Linear(2, 2) if ":" in config.kind else None
    with pytest.raises(ConfigError, match=reason):
        converted(publish(config, module), asked, remove=remove)


def test_weights_that_lose_their_digits_are_refused_with_the_difference(publish):
    config = replace(MLP, regularizer="vanilla")
    module = config.build()
    with torch.no_grad():
        module.logits.weight.fill_(3e-45)  # twice the smallest float32
        module.logits.bias.zero_()
        module.hidden1.bias.fill_(1)
        module.hidden2.bias.fill_(5)
    with pytest.raises(ConfigError, match=r"differ by up to \d.*largest is \d.* too small"):
        converted(publish(config, module), {"regularizer": "dropout"})


def test_a_network_whose_tensors_would_have_other_names_is_refused(publish, monkeypatch):
    version, build = publish(MLP), NetworkConfig.build

    def renamed(config, *factories):
        return nn.Sequential(build(config, *factories))

    monkeypatch.setattr(NetworkConfig, "build", renamed)
    with pytest.raises(ConfigError, match="tensors of other names"):
        converted(version, {"dropout": (0.0, 0.4)})
