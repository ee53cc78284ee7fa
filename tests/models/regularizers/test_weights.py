"""What goes with noise in training: norms, penalties, decay and first weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dropserve.models.errors import ConfigError
from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import NetworkConfig
from dropserve.models.processes import launch
from dropserve.models.regularizers import DropConnect
from dropserve.models.training import fit, penalty, project

CNN = NetworkConfig("cnn", (2, 8, 8), 3, (6,), (0.5,), (4,), regularizer="dropconnect")
WEIGHTS = {"conv1.weight", "hidden1.weight", "logits.weight"}


def parameters(module):
    return {name: p.detach().double().numpy().copy() for name, p in module.named_parameters()}


@given(st.floats(0.05, 3))
def test_max_norm_shortens_long_rows_alone(limit):
    module = CNN.build()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    before = parameters(module)
    project(module, limit)
    for name, got in parameters(module).items():
        expected = before[name]
        if name in WEIGHTS:
            norm = np.sqrt((expected**2).sum(tuple(range(1, expected.ndim)), keepdims=True))
            expected = expected * np.minimum(1, limit / norm)
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)


def test_training_keeps_rows_within_max_norm(digits):
    config = replace(CNN, input=(1, 8, 8), classes=10)
    for limit in (None, 0.3):
        module = config.build()
        recipe = Recipe(epochs=1, batch_size=32, learning_rate=0.01, max_norm=limit)
        data = digits.train.take(torch.arange(100))
        list(fit(module, data, digits.preprocessing.normalize, recipe, fabric=launch("cpu")))
        norms = [
            p.flatten(1).norm(dim=1).max()
            for name, p in module.named_parameters()
            if name in WEIGHTS
        ]
        assert (max(norms) <= 0.3 + 1e-6) == (limit is not None)


def test_the_penalty_is_on_absolute_weights_and_its_gradient_is_their_sign():
    module = CNN.build()
    value = penalty(module, 0.25)
    expected = sum(np.abs(p).sum() for name, p in parameters(module).items() if name in WEIGHTS)
    assert float(value.detach()) == pytest.approx(0.25 * expected, rel=1e-5)
    value.backward()
    for name, parameter in module.named_parameters():
        if name in WEIGHTS:
            assert torch.equal(parameter.grad, 0.25 * parameter.detach().sign())
        else:
            assert parameter.grad is None
    assert penalty(module, 0.0) == 0.0


class Still(nn.Module):
    """Has parameters that get a gradient of exactly zero."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(64, 10), nn.BatchNorm1d(4)
        nn.init.ones_(self.layer.bias)

    def forward(self, x):
        return 0 * (self.layer(x.flatten(1)) + sum(p.sum() for p in self.norm.parameters()))


@pytest.mark.parametrize("decays", [True, False])
def test_decay_of_biases_is_the_factor_of_adamw(decays, digits):
    """One step, whose rate is the first of the warm-up: 0.001 / 0.051 of the peak."""
    module = Still()
    recipe = Recipe(
        epochs=1, batch_size=50, learning_rate=0.1, weight_decay=0.5, decay_biases=decays
    )
    data = digits.train.take(torch.arange(60))
    (epoch,) = fit(module, data, digits.preprocessing.normalize, recipe, fabric=launch("cpu"))
    assert epoch.images_per_second > 0
    factor = 1 - 0.1 * (0.001 / 0.051) * 0.5 if decays else 1.0
    for ones in (module.layer.bias, module.norm.weight):
        torch.testing.assert_close(ones.detach(), torch.full_like(ones, factor), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["mlp", "gru"])
def test_init_std_is_that_of_weights_and_biases_are_zero(kind):
    rates, how = ((0.5,), {}) if kind == "mlp" else ((0.5, 0.5), {"mask_scope": "batch"})
    config = NetworkConfig(
        kind, (1, 40, 50), 10, (60,), rates, regularizer="dropconnect", init_std=0.07, **how
    )
    layers = [m for m in config.build().modules() if isinstance(m, nn.Linear | DropConnect)]
    assert len(layers) == len(rates) + 1
    for layer in layers:
        weights = layer.weight.numel()
        assert float(layer.weight.std().detach()) == pytest.approx(
            0.07, rel=5 / (2 * weights) ** 0.5
        )
        assert abs(float(layer.weight.mean().detach())) < 5 * 0.07 / weights**0.5
        assert (layer.bias == 0).all()


def test_batch_norm_follows_each_hidden_layer():
    config = NetworkConfig("mlp", (1, 8, 8), 3, (6, 5), (0.5, 0.0), batch_norm=True)
    assert [(name, type(m).__name__) for name, m in config.build().named_children()] == [
        ("flatten", "Flatten"),
        *(("hidden1", "Linear"), ("norm1", "BatchNorm1d"), ("hidden1_relu", "ReLU")),
        ("dropout1", "InvertedDropout"),
        *(("hidden2", "Linear"), ("norm2", "BatchNorm1d"), ("hidden2_relu", "ReLU")),
        ("logits", "Linear"),
    ]


@pytest.mark.parametrize("change", [{"max_norm": 0.0}, {"max_norm": -1.0}, {"l1": 1.0}])
def test_a_limit_or_penalty_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Recipe(**change)
