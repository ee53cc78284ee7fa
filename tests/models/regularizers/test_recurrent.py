"""The recurrent network: PyTorch's own without noise, and which steps share a draw."""

import pytest
import torch
from torch import nn

from dropserve.models.montecarlo import Sampler
from dropserve.models.montecarlo.interception import Interception
from dropserve.models.networks import NetworkConfig, default_config
from dropserve.models.regularizers import METHODS, Zoneout

T, UNITS = 4, 3


def build(regularizer, rates, **more):
    config = NetworkConfig("gru", (2, T, 5), 3, (UNITS,), rates, regularizer=regularizer, **more)
    return config.build().double()


def last_state(module, x):
    """Return what a GRU classifies."""
    seen = []
    with module.logits.register_forward_hook(lambda _m, args, _y: seen.append(args[0])):
        module(x)
    return seen[0]


def images():
    return torch.randn(6, 2, T, 5, dtype=torch.float64)


def test_without_noise_it_is_the_gru_of_torch_over_the_rows():
    """Both have reset, update and new in this order, and an update gate of 1 keeps the state."""
    module, x = build("zoneout", (0.0,)).train(), images()
    torchs = nn.GRU(2 * 5, UNITS, batch_first=True).double()
    for layer, name in ((module.from_input, "ih"), (module.from_state, "hh")):
        getattr(torchs, f"weight_{name}_l0").data = layer.weight.data
        getattr(torchs, f"bias_{name}_l0").data = layer.bias.data
    rows = torch.stack([x[:, :, t].flatten(1) for t in range(T)], 1)
    torch.testing.assert_close(last_state(module, x), torchs(rows)[1][0], rtol=0, atol=1e-12)


def test_zoneout_of_everything_keeps_the_state_and_of_nothing_none_of_it():
    module, x = build("zoneout", (0.5,)).train(), images()
    plain = build("zoneout", (0.0,))
    plain.load_state_dict(module.state_dict())

    def state(mask):
        run = Interception(lambda _law, shape: mask.expand(shape)).run
        return run(lambda given: last_state(module, given), x)

    assert (state(torch.zeros(T, UNITS)) == 0).all()
    torch.testing.assert_close(state(torch.ones(T, UNITS)), last_state(plain, x))
    unit = torch.tensor([1.0, 0.0, 1.0]).expand(T, UNITS)
    assert (state(unit)[:, 1] == 0).all()
    assert (state(unit)[:, [0, 2]] != 0).all()
    only_first = (torch.arange(T)[:, None] == 0).double().expand(T, UNITS)
    torch.testing.assert_close(state(only_first), last_state(plain, x[:, :, :1]))


def test_a_rate_close_to_one_keeps_almost_every_state():
    module, x = build("zoneout", (0.999999,)), images()
    assert last_state(module.eval(), x).abs().max() < 1e-5
    assert last_state(module.train(), x).abs().max() < 1e-5
    assert Zoneout(0.3).eval()(torch.ones(())).item() == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("regularizer", "alike"), [("variational", True), ("dropout", False), ("gaussian", False)]
)
def test_steps_share_a_draw_where_it_is_variational(regularizer, alike):
    module, seen = build(regularizer, (0.5, 0.5)).train(), {}
    for name in ("inputs", "state"):
        layer = module.get_submodule(name)
        layer.register_forward_hook(lambda _m, args, y, n=name: seen.update({n: y / args[0]}))
    module(images())
    for name, factors in seen.items():
        assert factors.shape == (6, T, 10 if name == "inputs" else UNITS)
        assert (factors == factors[:, :1]).all() == alike
        assert not (factors == factors[:1]).all(), "each example has a draw of its own"


def test_dropconnect_draws_a_layers_weights_once_for_all_steps():
    module = build("dropconnect", (0.5, 0.5), mask_scope="batch").train()
    calls = []
    Interception(lambda law, shape: calls.append((law.kind, shape))).run(module, images())
    assert calls == [("dropconnect", (1, 9, UNITS + 1)), ("dropconnect", (1, 9, 11))]


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if "gru" in m.networks])
def test_it_computes_in_bfloat16_too(method):
    module, x = default_config("gru", (1, 8, 8), 10, method).build(), torch.randn(4, 1, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module.train()(x).isfinite().all()
        rough = module.eval()(x).float()
    torch.testing.assert_close(rough, module(x), rtol=0, atol=0.02)
    if method == "zoneout":  # of which the first step is the same for all samples
        rough, exact = (Sampler(module, x, dtype).sample(x, 5) for dtype in ("bfloat16", "float32"))
        torch.testing.assert_close(rough, exact, rtol=0, atol=0.005)
