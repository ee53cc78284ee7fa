"""Noise that a module switches by `self.training`: found, sampled, and told from all else."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import switched
from bench.networks import with_dropout
from models.errors import UnsupportedModule
from models.montecarlo import Sampler

PASSES = 4000
SITES = {
    "vision transformer, attention's dropout_p by self.training": ["attention", "dropout"] * 2,
    "residual net, BatchNorm, F.dropout if self.training": ["dropout"] * 3,
    "stochastic depth as timm writes it": ["bernoulli"] * 3,
    "stochastic depth as torchvision writes it": ["bernoulli"] * 3,
    "torch.nn.TransformerEncoder": ["attention", "dropout", "dropout", "dropout"] * 2,
    "LSTM, dropout on its outputs": ["dropout"],
}
X = torch.linspace(-1, 1, 12).view(2, 6)


def state(module):
    """Everything that sampling might change: flags, and the bytes of parameters and buffers."""
    flags = [child.training for child in module.modules()]
    return flags, {n: t.numpy().tobytes() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("name", SITES)
def test_samples_are_distributed_as_plain_passes_in_train_mode(name):
    assert SITES.keys() == switched.NETWORKS.keys()
    module, x = switched.ready(name), torch.randn(1, 1, 28, 28)
    before = state(module)
    with torch.inference_mode():  # rows of a batch have masks of their own
        plain = with_dropout(module)(x.expand(PASSES, -1, -1, -1)).softmax(-1)
    sampler = Sampler(module, x)
    found = switched.compare(plain.view(PASSES, 1, 10), sampler.summarize(x, PASSES))
    assert [site.kind for site in sampler.sites] == SITES[name]
    assert 0.9 < found["variance ratio"] < 1.1
    assert found["mean"] < 4
    assert state(module) == before


class Function(nn.Module):
    """Runs `function(self, x)` between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def by_attribute():
    module = Function(lambda m, x: m.drop(x))
    module.drop = lambda x: F.dropout(x, 0.5) if module.training else x
    return module


def by_hook():
    module = Function(lambda _, x: x)
    module.first.register_forward_hook(
        lambda _m, _args, output: F.dropout(output, 0.5) if module.training else output
    )
    return module


def by_bound_method():
    module = Function(lambda m, x: m.method(x))
    drop = Function(lambda m, x: F.dropout(x, 0.5) if m.training else x)
    drop.first = drop.last = nn.Identity()
    module.drop, module.method = drop, drop.forward
    return module


def by_default_argument():
    module = Function(lambda m, x: m.drop(x))
    module.drop = partial(lambda x, outer: F.dropout(x, 0.5) if outer.training else x, outer=module)
    return module


@pytest.mark.parametrize("build", [by_attribute, by_hook, by_bound_method, by_default_argument])
def test_functions_that_refer_to_the_module_run_in_the_copys_mode(build):
    module = build().eval()
    before = state(module)
    sampler = Sampler(module, X)
    assert len(sampler.sites) == 1
    assert sampler.sample(X, 20).std(0).min() > 1e-4
    assert state(module) == before


def in_a_class():
    inner = nn.Linear(6, 6)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = inner, nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(F.dropout(x, 0.5) if inner.training else x)

    return Outer()


def in_a_list():
    module = Function(lambda m, x: m.drops[0](x))
    module.drops = [lambda x: F.dropout(x, 0.5) if module.training else x]
    return module


@pytest.mark.parametrize("build", [in_a_class, in_a_list])
def test_a_reference_that_a_copy_cannot_follow_is_refused(build):
    with pytest.raises(UnsupportedModule, match=r"by a closure.* make that module an attribute"):
        Sampler(build().eval(), X)


class BatchNormByHand(nn.Module):
    """Normalises as user code does, by the flag, and drops likewise."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.linspace(0, 1, 6))
        self.register_buffer("var", torch.linspace(1, 2, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        if self.training:
            x = F.dropout(x, 0.5)
        return self.last(x)


def test_batch_norm_of_user_code_keeps_to_running_statistics_and_does_not_overwrite_them():
    module = BatchNormByHand().eval()
    before = state(module)
    sampler = Sampler(module, X)
    got = sampler.sample(X, 2000)
    normed = (X - module.mean) / (module.var + 1e-5).sqrt()
    with torch.no_grad():
        kept = torch.rand(2000, 1, 6) < 0.5
        expected = module.last(normed * kept * 2).softmax(-1)
    torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=0, atol=0.02)
    assert state(module) == before
    assert state(sampler.training_copy)[1] == before[1]


def test_parameters_are_shared_and_buffers_are_not():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).eval()
    copied = Sampler(module, X).training_copy
    pairs = zip(module.parameters(), copied.parameters(), strict=True)
    assert all(own is other for own, other in pairs)
    for own, other in zip(module.buffers(), copied.buffers(), strict=True):
        assert own.data_ptr() != other.data_ptr()
    assert [child.training for child in copied] == [True, False, True]


def if_training(change):
    return Function(lambda m, x: F.dropout(change(x) if m.training else x, 0.5))


def old_drop_path(x):
    return x.div(0.8) * (0.8 + torch.rand(len(x), 1)).floor_()


@pytest.mark.parametrize(
    ("change", "source"),
    [
        (lambda x: x + torch.randn_like(x), "aten.randn_like"),
        (old_drop_path, "aten.rand.default"),
        (lambda x: F.rrelu(x, training=True), "aten.rrelu_with_noise"),
        (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), "aten.bernoulli.default"),
        (lambda x: x * torch.ops.aten.dropout(x, 0.5, True), "dropout|bernoulli"),
        (lambda x: x * random.choice((1.0, 1.0)), "Python's or NumPy's"),  # noqa: S311
        (lambda x: x * float(np.random.rand() < 2), "Python's or NumPy's"),
    ],
)
def test_other_randomness_is_refused_by_name_with_the_remedy(change, source):
    module = nn.Sequential(nn.Identity(), if_training(change)).eval()
    with pytest.raises(UnsupportedModule, match=rf"^1: draws from .*({source}).*bernoulli_\(keep"):
        Sampler(module, X)


class Auxiliary(nn.Module):
    """Answers with two tensors in train mode."""

    def __init__(self):
        super().__init__()
        self.drop, self.head, self.auxiliary = nn.Dropout(0.5), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        logits = self.head(self.drop(x))
        return (logits, self.auxiliary(x)) if self.training else logits


class Counter(nn.Module):
    """Counts its passes in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        if self.training:
            self.passes += 1
        return self.drop(x)


class NeedsTargets(nn.Module):
    """Cannot run in train mode without targets."""

    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("in training mode, targets should be passed")
        return F.dropout(x, 0.5, self.training)


def thrown_away(x):
    mask = torch.empty_like(x)
    mask.bernoulli_(0.5)
    return x * mask * 2


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (Auxiliary(), "one tensor of logits, not .*tuple.* in training mode"),
        (Function(lambda m, x: F.dropout(x, 0.5) * (2 if m.training else 1)), "auxiliary heads"),
        (Function(lambda m, x: m.first(x) if m.training else F.dropout(x)), "other logits"),
        (if_training(lambda x: x - x.mean(0)), "statistics of the batch"),
        (if_training(thrown_away), "use the values that dropout and bernoulli_ return"),
        (Counter(), "changes its buffer passes"),
        (NeedsTargets(), "in training mode the module fails: ValueError: .*targets"),
    ],
)
def test_what_else_depends_on_the_mode_is_refused_with_advice(module, advice):
    with pytest.raises(UnsupportedModule, match=advice):
        Sampler(module.eval(), X)


def test_a_module_that_cannot_be_copied_is_refused_with_the_reason():
    module = Function(lambda _, x: F.dropout(x, 0.5)).eval()
    module.stream = (n for n in range(3))
    with pytest.raises(UnsupportedModule, match=r"cannot be copied .*generator"):
        Sampler(module, X)
