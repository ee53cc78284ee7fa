"""What shares a draw in training, and where it is put."""

from dataclasses import replace
from itertools import islice
from math import sqrt

import pytest
import torch

from dropserve.models.hyperparameters import Recipe
from dropserve.models.montecarlo import Sampler
from dropserve.models.networks import NetworkConfig
from dropserve.models.processes import launch
from dropserve.models.regularizers import (
    METHODS,
    SCOPES,
    GaussianDropout,
    InvertedDropout,
    SpatialDropout,
    StochasticDepth,
    VanillaDropout,
    VariationalDropout,
    Zoneout,
    begin_epoch,
)
from dropserve.models.training import fit

LAYERS = (
    InvertedDropout, VanillaDropout, SpatialDropout, GaussianDropout, VariationalDropout, Zoneout,
    StochasticDepth,
)  # fmt: skip


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_draw_is_shared_by_nothing_a_batch_or_an_epoch(kind, scope):
    layer, x = kind(0.5, scope=scope).train(), torch.ones(40, 7, 3)
    drawn = [layer(x) for _ in range(10)]
    examples = {tuple(example.flatten().tolist()) for example in drawn[0]}
    assert (len(examples) == 1) == (scope != "example")
    assert all(torch.equal(drawn[0], other) for other in drawn) == (scope == "epoch")
    for _ in range(9):
        begin_epoch(layer)
        drawn.append(layer(x))
    assert not all(torch.equal(drawn[0], other) for other in drawn), "an epoch draws anew"


@pytest.mark.parametrize("kind", LAYERS)
def test_train_mode_has_the_mean_of_eval_mode_and_the_spread_of_its_law(kind):
    """Of both kinds of noise p/(1-p) is the variance, but of masks that are not scaled p(1-p)."""
    layer, p, draws = kind(0.3).train(), 0.3, 50_000
    drawn = layer(torch.ones(draws, 2, 1, dtype=torch.float64))[:, 0]
    variance = p * (1 - p) if kind in (VanillaDropout, Zoneout) else p / (1 - p)
    mean = layer.eval()(torch.ones(1)).item()
    assert mean == pytest.approx(1 - p if kind in (VanillaDropout, Zoneout) else 1)
    assert abs(drawn.mean() - mean) <= 5 * sqrt(variance / draws)
    assert drawn.var().item() == pytest.approx(variance, rel=5 * sqrt(2 / draws))


def start(config, digits, **options):
    torch.manual_seed(3)
    module, recipe = config.build(), Recipe(epochs=2, batch_size=32)
    data, normalize = digits.train.take(torch.arange(100)), digits.preprocessing.normalize
    return module, fit(module, data, normalize, recipe, fabric=launch("cpu"), **options)


@pytest.mark.parametrize("regularizer", ["dropout", "dropconnect"])
def test_an_epoch_trains_one_thinned_network_and_a_resumed_run_is_an_unbroken_one(
    regularizer, digits, tmp_path
):
    config = NetworkConfig(
        "mlp", (1, 8, 8), 10, (16,), (0.5,), regularizer=regularizer, mask_scope="epoch"
    )
    unbroken, run = start(config, digits)
    (layer,) = (m for m in unbroken.modules() if type(m) is METHODS[regularizer].layer)
    drawn = []
    layer.register_forward_hook(
        lambda m, _args, _y: drawn.append(m.of_epoch.clone()) if m.training else None
    )
    list(run)
    assert len(drawn) == 4  # of two batches in each epoch
    assert [torch.equal(drawn[0], mask) for mask in drawn] == [True, True, False, False]
    assert torch.equal(drawn[2], drawn[3])

    path = tmp_path / "state.safetensors"
    _, run = start(config, digits, state_path=path)
    assert len([*islice(run, 1)]) == 1
    run.close()
    resumed, run = start(config, digits, state_path=path)
    assert [epoch.number for epoch in run] == [2]
    for got, expected in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("regularizer", ["dropout", "vanilla", "gaussian", "noise"])
def test_masks_may_come_before_relu_or_after_it_and_other_noise_may_not(regularizer):
    """ReLU commutes with factors that are not negative."""
    after = NetworkConfig("mlp", (1, 1, 9), 3, (20,), (0.5,), regularizer=regularizer)
    networks = [after.build(), replace(after, before_activation=True).build()]
    networks[1].load_state_dict(networks[0].state_dict())
    orders = [[n for n, _ in module.named_children()][2:4] for module in networks]
    assert orders == [["hidden1_relu", "dropout1"], ["dropout1", "hidden1_relu"]]
    x = torch.randn(4, 1, 1, 9)
    got, other = (Sampler(module.eval(), x).sample(x, 20, 1) for module in networks)
    assert torch.allclose(got, other, atol=1e-6) == (METHODS[regularizer].layer in LAYERS[:2])
    torch.testing.assert_close(*(module(x) for module in networks))


def test_noise_of_a_wide_residual_network_follows_the_second_relu_of_a_block():
    config = NetworkConfig("wrn", (1, 4, 4), 3, (), (0.5,), (3,), regularizer="gaussian")
    module, given = config.build(), []
    module.block1.noise.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    module(torch.randn(5, 1, 4, 4))
    assert given[0].min() == 0 < given[0].max()
