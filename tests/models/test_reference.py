"""The NumPy reference, PyTorch's autograd and our layers agree; its page says what is measured."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dropserve.models import reference
from dropserve.models.montecarlo.interception import Interception
from dropserve.models.networks import NetworkConfig

PAGE = (Path(__file__).parents[2] / "docs/reference.md").read_text()
RATES = (0.2, 0.6)
KINDS = {"vanilla": reference.vanilla, "dropout": reference.inverted}
X = np.random.default_rng(1).standard_normal((7, 6))
LABELS = np.arange(7) % 3


def network(regularizer):
    """A module in float64, and the same layers in NumPy."""
    config = NetworkConfig("mlp", (1, 2, 3), 3, (8, 5), RATES, regularizer=regularizer)
    module = config.build().double()
    linear = [module.hidden1, module.hidden2, module.logits]
    return module, [(m.weight.detach().numpy().T, m.bias.detach().numpy()) for m in linear]


def masks():
    random = np.random.default_rng(2)
    return [reference.draw_mask(random, (len(X), n), p) for n, p in zip((8, 5), RATES, strict=True)]


@pytest.mark.parametrize("regularizer", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_layers_and_autograd_compute_what_textbooks_say(regularizer, training):
    module, layers = network(regularizer)
    given = masks() if training else [None, None]
    how = KINDS[regularizer], RATES, given
    logits, read = reference.forward(X, layers, *how)
    loss, gradients = reference.backward(logits, LABELS, read, layers, *how)

    rest = iter(given)
    injected = Interception(lambda law, shape: torch.tensor(next(rest)).view(shape) * law.kept)
    images = torch.tensor(X).view(-1, 1, 2, 3)
    got = injected.run(module.train(training), images)
    expected = F.cross_entropy(got, torch.tensor(LABELS))
    expected.backward()
    np.testing.assert_allclose(got.detach(), logits, rtol=1e-6)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for (weights, biases), name in zip(gradients, ("hidden1", "hidden2", "logits"), strict=True):
        layer = module.get_submodule(name)
        np.testing.assert_allclose(weights.T, layer.weight.grad, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(biases, layer.bias.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("drop", KINDS.values())
@pytest.mark.parametrize("p", [0.2, 0.8])
def test_the_mean_over_masks_is_what_eval_mode_computes(drop, p):
    h = np.ones((1000, 1000))
    mask = reference.draw_mask(np.random.default_rng(0), h.shape, p)
    assert drop(h, p, mask).mean() == pytest.approx(drop(h, p, None).mean(), rel=0.01)


@pytest.mark.parametrize(
    ("options", "moves"), [({}, False), ({"momentum": 0.9}, True), ({"weight_decay": 0.1}, True)]
)
def test_a_dropped_unit_gets_no_gradient_and_moves_by_momentum_and_weight_decay(options, moves):
    _, layers = network("dropout")
    weights, biases = (torch.tensor(np.array(t)) for t in layers[0])
    biases += 5  # so that ReLU passes every unit
    optimizer = torch.optim.SGD([weights], lr=0.1, **options)

    def step(kept):
        mask = np.ones((1, 8))
        mask[0, 3] = kept
        now = [(weights.numpy(), biases.numpy()), *layers[1:]]
        how = reference.inverted, RATES, [mask, np.ones((1, 5))]
        logits, read = reference.forward(X[:1], now, *how)
        _, gradients = reference.backward(logits, LABELS[:1], read, now, *how)
        weights.grad = torch.tensor(gradients[0][0])
        before = weights.clone()
        optimizer.step()
        return weights.grad[:, 3], (weights - before)[:, 3]

    gradient, moved = step(kept=1)
    assert gradient.all()
    assert moved.all()
    gradient, moved = step(kept=0)
    assert not gradient.any()
    assert moved.any() == moves


def test_the_page_quotes_the_module_and_states_what_its_wrong_form_gives():
    *quoted, wrong = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    own = [reference.draw_mask, reference.vanilla, reference.inverted]
    assert quoted == [inspect.getsource(function) for function in own]
    made = {}
    exec(wrong, made)  # noqa: S102  our own page
    stated = re.findall(r"^\| (\.\d) \| ([\d.]+) \| 1 \|$", PAGE, re.MULTILINE)
    assert {p for p, _ in stated} == {".2", ".5", ".8"}
    for p, mean in stated:
        measured = made["mixed"](np.ones((1000, 1000)), float(p), np.random.default_rng(0)).mean()
        assert measured == pytest.approx(float(p) / (1 - float(p)), rel=0.01)
        assert f"{measured:.2f}".lstrip("0") == mean
