"""What the sampler promises, of every method in every network that can have it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.models.errors import ConfigError, NoDropout
from dropserve.models.montecarlo import Sampler
from dropserve.models.networks import NETWORKS, NetworkConfig
from dropserve.models.regularizers import METHODS, SCOPES, Bernoulli, Gaussian

SMALL = {
    "mlp": {"hidden": (6, 5), "dropout": (0.2, 0.5), "input_dropout": 0.1},
    "cnn": {
        "channels": (3, 4), "hidden": (6,), "dropout": (0.5,), "input_dropout": 0.1,
        "spatial_dropout": 0.2,
    },
    "gru": {"hidden": (5,), "dropout": (0.3, 0.2)},
    "wrn": {
        "channels": (3, 4), "hidden": (6,), "dropout": (0.3, 0.5), "input_dropout": 0.1,
        "stochastic_depth": 0.2,
    },
    "vit": {"hidden": (8,), "dropout": (0.3,), "stochastic_depth": 0.2},
}  # fmt: skip
SITES = {  # the method's own, by name: rate, and what it covers; of a vit -1 tokens
    "mlp": {"input": (0.1, (1, 8, 8)), "dropout1": (0.2, (6,)), "dropout2": (0.5, (5,))},
    "cnn": {"input": (0.1, (1, 8, 8)), "dropout1": (0.5, (6,))},
    "gru": {"inputs": (0.3, (8, 8)), "state": (0.2, (8, 5))},
    "wrn": {
        "input": (0.1, (1, 8, 8)), "block1.noise": (0.3, (3, 8, 8)),
        "block2.noise": (0.3, (4, 4, 4)), "dropout1": (0.5, (6,)),
    },
    "vit": {
        "noise": (0.3, (-1, 8)), "blocks.0.noise": (0.3, (-1, 8)),
        "blocks.0.mlp.2": (0.3, (-1, 16)), "blocks.0.mlp.4": (0.3, (-1, 8)),
    },
    "mlp dropconnect": {
        "hidden1:dropconnect": (0.2, (6, 65)), "hidden2:dropconnect": (0.5, (5, 7)),
    },
    "cnn dropconnect": {"hidden1:dropconnect": (0.5, (6, 17))},
    "gru dropconnect": {
        "from_state:dropconnect": (0.2, (15, 6)), "from_input:dropconnect": (0.3, (15, 9)),
    },
    "gru variational": {"inputs": (0.3, (1, 8)), "state": (0.2, (1, 5))},
    "gru zoneout": {"update": (0.2, (8, 5))},
    "wrn spatial": {
        "input": (0.1, (1,)), "block1.noise": (0.3, (3,)), "block2.noise": (0.3, (4,)),
        "dropout1": (0.5, (6,)),
    },
}  # fmt: skip
BESIDES = {  # of whatever method
    "cnn": {"spatial_dropout1": (Bernoulli("spatial", 0.2), (3,))},
    "wrn": {
        "block1.depth": (Bernoulli("depth", 0.1), (1,)),
        "block2.depth": (Bernoulli("depth", 0.2), (1,)),
    },
    "vit": {
        "blocks.0.depth1": (Bernoulli("depth", 0.2), (1,)),
        "blocks.0.depth2": (Bernoulli("depth", 0.2), (1,)),
    },
}
LAWS = {
    "dropout": lambda p: Bernoulli("dropout", p),
    "vanilla": lambda p: Bernoulli("vanilla", p, rescaled=False),
    "spatial": lambda p: Bernoulli("spatial", p),
    "gaussian": lambda p: Gaussian("gaussian", 1.0, (p / (1 - p)) ** 0.5, p),
    "noise": lambda p: Gaussian("noise", 0.0, p),
    "dropconnect": lambda p: Bernoulli("dropconnect", p),
    "variational": lambda p: Bernoulli("variational", p),
    "zoneout": lambda p: Bernoulli("zoneout", p, rescaled=False),
}
PAIRS = [(kind, name) for name, method in METHODS.items() for kind in method.networks]


def describe(kind, method):
    more = dict(SMALL[kind])
    if method == "zoneout":
        more["dropout"] = (0.2,)
    if (kind, method) == ("gru", "dropconnect"):
        more["mask_scope"] = "batch"
    return NetworkConfig(kind, (1, 8, 8), 3, regularizer=method, **more)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_every_path_of_every_pair_samples_the_same_and_leaves_the_module_alone(kind, method):
    module, x = describe(kind, method).build().eval(), torch.randn(5, 1, 8, 8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        plain = module(x)
    sampler = Sampler(module, x)
    path = "folded" if kind in ("mlp", "cnn") else "vmap"
    assert sampler.path == path
    got = sampler.sample(x, 23, 7)
    assert torch.equal(sampler.sample(x, 23, 7), got)
    assert (sampler.sample(x, 23, 8) - got).abs().max() > 1e-3
    assert got.std(0).max() > 1e-3
    for t in (0, 11, 22):
        close(sampler.thinned(x, 7, "stratified", t).softmax(-1), got[t])
    if path == "folded":
        kernels, masks = (
            sampler._kernels[torch.float32],
            sampler._store.get("stratified", 7, range(23), x.device),
        )
        with torch.inference_mode():
            h = kernels.prefix(x)
            for _, kernel in kernels.choices(h, masks):
                close(kernel(h, masks).softmax(-1).transpose(0, 1), got)
    for path in ("vmap", "loop"):
        sampler.path = path
        close(sampler.sample(x, 23, 7), got)
    close(Sampler(module, x).sample(x[2:3], 23, 7)[:, 0], got[:, 2])
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(part.training for part in module.modules())
    with torch.no_grad():
        assert torch.equal(module(x), plain)


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_every_pair_has_its_sites_with_their_laws_and_shapes(kind, method):
    module, expected = describe(kind, method).build().eval(), dict(BESIDES.get(kind, {}))
    for name, (p, shape) in SITES.get(f"{kind} {method}", SITES[kind]).items():
        if kind == "vit":
            shape = (module.positions.shape[1], shape[1])
        expected[name] = (LAWS[method](p), shape)
    if method == "dropconnect" and kind != "gru":  # whose input has no weights
        expected["input"] = (Bernoulli("dropout", 0.1), (1, 8, 8))
    found = Sampler(module, torch.randn(2, 1, 8, 8)).sites
    assert {site.name: (site.law, site.shape) for site in found} == expected


REFUSED = [
    *(
        (
            {"kind": kind, "regularizer": name},
            rf"{kind} can have regularizer .*, not '{name}'; {name} is for {method.networks[0]}",
        )
        for name, method in METHODS.items()
        for kind in NETWORKS
        if kind not in method.networks
    ),
    ({"regularizer": "bogus"}, r"can have regularizer dropout, .*, not 'bogus'$"),
    ({"kind": "gru", "hidden": (8, 8)}, "a gru needs one width"),
    ({"kind": "vit", "hidden": (8, 8)}, "a vit needs one width"),
    ({"kind": "gru", "dropout": (0.1,) * 3}, "1 or 2 rates, not 3: inputs and state"),
    (
        {"kind": "gru", "regularizer": "zoneout", "dropout": (0.1, 0.1)},
        "1 rate, not 2: that of the state",
    ),
    (
        {"kind": "wrn", "dropout": (0.1,) * 3},
        "1 or 2 rates, not 3: of blocks, then of hidden layers",
    ),
    ({"kind": "wrn", "channels": ()}, "a wrn needs channels"),
    ({"kind": "vit", "dropout": (0.1, 0.1)}, "1 rate, not 2"),
    ({"kind": "gru", "regularizer": "dropconnect"}, "mask_scope batch"),
    ({"mask_scope": "image"}, "mask_scope must be example, batch, epoch"),
    ({"kind": "gru", "input_dropout": 0.1}, "input_dropout is for mlp, cnn, wrn, not for gru"),
    ({"kind": "vit", "input_dropout": 0.1}, "input_dropout is for mlp, cnn, wrn, not for vit"),
    ({"noise_mean": 0.1}, "noise_mean is for additive noise"),
    ({"regularizer": "noise", "noise_mean": 0.1, "dropout": (0.0, 0.1)}, "no rate of it 0"),
    ({"kind": "wrn", "before_activation": True}, "before_activation is for mlp, cnn, not for wrn"),
    ({"regularizer": "dropconnect", "before_activation": True}, "noise on units"),
    ({"kind": "cnn", "batch_norm": True}, "batch_norm is for mlp"),
    ({"kind": "cnn", "stochastic_depth": 0.1}, "stochastic_depth is for wrn, vit, not for cnn"),
    ({"spatial_dropout": 0.1}, "spatial_dropout is for cnn"),
    ({"channels": (3,)}, "channels is for cnn, wrn, not for mlp"),
    ({"regularizer": "noise", "dropout": (0.2, 100.0)}, r"deviation .* \[0, 100\); got 100"),
    ({"regularizer": "dropconnect", "input_dropout": 1.5}, r"\[0, 1\), .* got 1.5"),
    ({"init_std": 0.0}, r"init_std must be in \(0, 100\)"),
    ({"kind": "wrn", "stochastic_depth": 1.0}, r"\[0, 1\), .* got 1.0"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_a_network_cannot_have_is_refused_with_what_it_can(change, reason):
    kind = change.get("kind", "mlp")
    values = SMALL[kind] | {"input_dropout": 0.0, "spatial_dropout": 0.0, "stochastic_depth": 0.0}
    with pytest.raises(ConfigError, match=reason):
        NetworkConfig(**{"kind": kind, "input": (1, 8, 8), "classes": 3} | values | change)


RATES = st.sampled_from([0.0, 0.1, 0.5, 0.9])
FIELDS = {
    "hidden": st.lists(st.sampled_from([9, 65]), max_size=2).map(tuple),
    "dropout": st.lists(RATES, max_size=3).map(tuple),
    "channels": st.lists(st.integers(1, 3), max_size=2).map(tuple),
    "input": st.sampled_from([(1, 8, 8), (3, 4, 9), (2, 1, 5)]),
    "blocks": st.integers(1, 2),
    "input_dropout": RATES,
    "spatial_dropout": RATES,
    "stochastic_depth": RATES,
    "noise_mean": st.sampled_from([0.0, 0.5]),
    "mask_scope": st.sampled_from(SCOPES),
    "before_activation": st.booleans(),
    "batch_norm": st.booleans(),
    "init_std": st.sampled_from([None, 0.2]),
}
CHANGES = st.lists(
    st.one_of(*(st.tuples(st.just(name), values) for name, values in FIELDS.items())), max_size=3
).map(dict)


@settings(max_examples=100)
@given(st.sampled_from(PAIRS), CHANGES, st.booleans())
def test_a_description_is_refused_or_makes_a_network_that_trains_and_samples(pair, change, fits):
    config = describe(*pair)
    if fits:  # one rate for all
        change = change | {"dropout": (0.3,)}
    try:
        config = replace(config, **change)
    except ConfigError:
        return
    module, x = config.build(), torch.randn(3, *config.input)
    assert module.train()(x).shape == module.eval()(x).shape == (3, 3)
    try:
        sampler = Sampler(module.eval(), x)
    except NoDropout:
        assert not any((*config.dropout, config.input_dropout, config.stochastic_depth))
        return
    assert config.is_noisy
    assert sampler.path != "loop"
    got = sampler.sample(x, 3)
    assert got.shape == (3, 3, 3)
    close(got.sum(-1), torch.ones(3, 3))
