"""Bernoulli methods against all of their masks, each run by hand in float64 NumPy."""

import copy
from functools import cache
from itertools import accumulate, product

import numpy as np
import pytest
import torch
from torch import nn

from dropserve.models.montecarlo import Sampler
from dropserve.models.montecarlo.interception import Interception
from dropserve.models.networks import NetworkConfig
from dropserve.models.regularizers import (
    DropConnect,
    InvertedDropout,
    SpatialDropout,
    VanillaDropout,
)


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(logits):
    shares = np.exp(logits)
    return shares / shares.sum(-1, keepdims=True)


def linear(w, name, x, mask=1.0):
    """Map x by a layer; a mask [out, in + 1] is of its weights, the biases last."""
    both = np.column_stack([w[f"{name}.weight"], w[f"{name}.bias"]]) * mask
    return x @ both[:, :-1].T + both[:, -1]


def mlp(w, x, masks):
    h = (x * masks[0]).reshape(len(x), -1)
    for name, mask in zip(("hidden1", "hidden2"), masks[1:], strict=True):
        h = relu(linear(w, name, h)) * mask
    return linear(w, "logits", h)


def connected(w, x, masks):
    return linear(w, "logits", relu(linear(w, "hidden1", x.reshape(len(x), -1), masks[0])))


def convolve(x, kernel):
    """Convolve x [B, C, H, W] by [O, C, 3, 3], zeros around it."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, kernel)


def wrn(w, x, masks):
    """Run one block; fresh batch normalisation divides by the square root of 1 + 1e-5."""
    norm = np.sqrt(1 + 1e-5)
    h = convolve(x, w["conv.weight"])
    branch = relu(convolve(relu(h / norm), w["block1.conv1.weight"]) / norm) * masks[0]
    h = h + convolve(branch, w["block1.conv2.weight"]) * masks[1]
    return linear(w, "logits", relu(h / norm).mean((2, 3)))


def gru(w, x, *, inputs=1.0, state=1.0, update=1.0, weights=(1.0, 1.0)):
    """Run Cho et al. (2014) over the rows of x [B, 1, T, W]."""
    rows = x[:, 0] * inputs
    units = w["logits.weight"].shape[1]
    states, updates = (np.broadcast_to(m, (rows.shape[1], units)) for m in (state, update))
    h = np.zeros((len(x), units))
    for t in range(rows.shape[1]):
        given = linear(w, "from_input", rows[:, t], weights[1])
        read = linear(w, "from_state", h * states[t], weights[0])
        reset, keep = sigmoid((given + read)[:, : 2 * units]).reshape(-1, 2, units).swapaxes(0, 1)
        new = np.tanh(given[:, 2 * units :] + reset * read[:, 2 * units :])
        h = h + updates[t] * ((1 - keep) * new + keep * h - h)
    return linear(w, "logits", h)


MLP = {"kind": "mlp", "input": (1, 1, 3), "hidden": (3, 2), "dropout": (0.3, 0.5)}
GRU = {"kind": "gru", "input": (1, 2, 2), "hidden": (2,), "dropout": (0.2, 0.4)}
CASES = {  # description, forward pass for given masks in the order of their drawing
    "dropout": (MLP | {"input_dropout": 0.2}, mlp),
    "vanilla": (MLP | {"input_dropout": 0.2}, mlp),
    "dropconnect": (MLP | {"input": (1, 1, 2), "hidden": (3,), "dropout": (0.4,)}, connected),
    "spatial": (
        {"kind": "wrn", "input": (1, 3, 2), "channels": (3,), "hidden": (), "dropout": (0.3,)}
        | {"stochastic_depth": 0.4},
        wrn,
    ),
    "variational": (
        GRU | {"input": (1, 3, 2)},
        lambda w, x, m: gru(w, x, inputs=m[0], state=m[1]),
    ),
    "zoneout": (
        GRU | {"input": (1, 3, 2), "dropout": (0.3,)},
        lambda w, x, m: gru(w, x, update=m[0]),
    ),
    "dropout of a gru": (GRU, lambda w, x, m: gru(w, x, inputs=m[0], state=m[1])),
    "dropconnect of a gru": (
        GRU | {"input": (1, 3, 1), "hidden": (1,), "mask_scope": "batch"},
        lambda w, x, m: gru(w, x, weights=m),
    ),
}
any_case = pytest.mark.parametrize("case", CASES)


def under_all_masks(module, x):
    """Return the masks' probabilities [N], the masks [N, ...] a site, and logits [N, B, C]."""
    calls = []
    module.train()
    Interception(lambda law, shape: calls.append((law, (1, *shape[1:])))).run(module, x)
    ends = [*accumulate(int(np.prod(shape)) for _, shape in calls)]
    keep = np.array([*product((0, 1), repeat=ends[-1])], float)
    probability, masks = np.ones(len(keep)), []
    for (law, shape), end in zip(calls, ends, strict=True):
        part = keep[:, end - int(np.prod(shape)) : end]
        probability *= np.where(part, 1 - law.p, law.p).prod(1)
        masks.append((part * law.kept).reshape(-1, *shape))

    def run(*one):
        given = iter(one)
        return Interception(lambda _law, _shape: next(given)).run(module, x)

    with torch.no_grad():
        logits = torch.vmap(run)(*map(torch.from_numpy, masks))
    assert probability.sum() == pytest.approx(1)
    return probability, masks, logits.numpy()


@cache
def exact(case):
    """Return a tiny network in eval mode, three images, and what all masks make of them."""
    torch.manual_seed(2)
    method = case.split()[0]
    module = NetworkConfig(classes=3, regularizer=method, **CASES[case][0]).build().double()
    for parameter in module.parameters():
        parameter.data.mul_(1 if parameter.dim() == 1 else 2)  # far from uniform answers
    x = torch.randn(3, *CASES[case][0]["input"], dtype=torch.float64)
    found = under_all_masks(module, x)
    return module.eval(), x, found


def by_hand(case, masks):
    module, x, _ = exact(case)
    w = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    return CASES[case][1](w, x.numpy(), masks)


@any_case
def test_every_mask_gives_what_numpy_makes_of_it_by_hand(case):
    _, _, (_, masks, logits) = exact(case)
    assert len(logits) == len(masks[0]) >= 16
    for i, got in enumerate(logits):
        np.testing.assert_allclose(got, by_hand(case, [mask[i][0] for mask in masks]), atol=1e-12)


@any_case
def test_eval_mode_is_the_weight_scaling_network(case):
    """All masks at their mean, which is near the mean over all masks, but not it."""
    module, x, (probability, masks, logits) = exact(case)
    means = [np.average(mask, 0, probability)[0] for mask in masks]
    with torch.no_grad():
        plain = module(x).numpy()
    np.testing.assert_allclose(plain, by_hand(case, means), atol=1e-12)
    gap = np.abs(softmax(plain) - np.average(softmax(logits), 0, probability)).max()
    assert 1e-3 < gap < 0.15


@any_case
def test_the_sampler_converges_to_mean_and_variance_over_all_masks(case):
    module, x, (probability, _, logits) = exact(case)
    p = softmax(logits)
    mean = np.average(p, 0, probability)
    second, fourth = (np.average((p - mean) ** k, 0, probability) for k in (2, 4))
    module, x, samples = copy.deepcopy(module).float(), x.float(), 4000
    got = Sampler(module, x).sample(x, samples, 3, "independent").double().numpy()
    assert (np.abs(got.mean(0) - mean) <= 5 * np.sqrt(second / samples) + 1e-6).all()
    spread = np.sqrt(np.maximum(fourth - second**2, 0) / samples)
    assert (np.abs(got.var(0, ddof=1) - second) <= 5 * spread + 25 * second / samples + 1e-6).all()


LINEAR = {
    "dropout": (InvertedDropout(0.3), nn.Linear(4, 3), InvertedDropout(0.6), nn.Linear(3, 2)),
    "vanilla": (VanillaDropout(0.3), nn.Linear(4, 3), VanillaDropout(0.6), nn.Linear(3, 2)),
    "spatial": (nn.Unflatten(1, (2, 2)), SpatialDropout(0.3), nn.Flatten(), nn.Linear(4, 2)),
    "dropconnect": (InvertedDropout(0.3), DropConnect(4, 2, 0.6), nn.Linear(2, 2)),
}


@pytest.mark.parametrize("method", LINEAR)
def test_weight_scaling_is_exact_for_a_linear_network(method):
    module, x = nn.Sequential(*LINEAR[method]).double(), torch.randn(3, 4, dtype=torch.float64)
    probability, _, logits = under_all_masks(module, x)
    with torch.no_grad():
        plain = module.eval()(x)
    assert logits.std(0).min() > 0.01
    np.testing.assert_allclose(np.average(logits, 0, probability), plain, atol=1e-12)


def test_vanilla_weights_times_the_keep_probability_are_those_of_inverted_dropout():
    """Srivastava et al. (2014), section 10: the following weights, and no biases."""
    module, x, (_, _, logits) = exact("vanilla")
    converted = NetworkConfig(classes=3, input_dropout=0.2, **MLP).build().double()
    converted.load_state_dict(module.state_dict())
    for name, p in (("hidden1", 0.2), ("hidden2", 0.3), ("logits", 0.5)):
        converted.get_submodule(name).weight.data.mul_(1 - p)
    np.testing.assert_allclose(under_all_masks(converted, x)[2], logits, atol=1e-12)
    torch.testing.assert_close(converted.eval()(x), module(x), rtol=0, atol=1e-12)
