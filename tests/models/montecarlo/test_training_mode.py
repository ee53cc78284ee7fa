"""Noise that a module switches by `self.training`: found, sampled, and told apart."""

import ctypes
import logging
import random
import weakref
from functools import partial
from threading import Lock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import training_mode
from bench.networks import with_dropout
from dropserve.models.errors import UnsupportedModule
from dropserve.models.montecarlo import Sampler

PASSES = 4000
SITES = {
    "vision transformer, attention's dropout_p by self.training": ["attention", "dropout"] * 2,
    "residual net, BatchNorm, F.dropout if self.training": ["dropout"] * 3,
    "stochastic depth as timm writes it": ["bernoulli"] * 3,
    "stochastic depth as torchvision writes it": ["bernoulli"] * 3,
    "torch.nn.TransformerEncoder": ["attention", "dropout", "dropout", "dropout"] * 2,
    "LSTM, dropout on its outputs": ["dropout"],
}
LOG = logging.getLogger(__name__)
PRIVATE = random.Random(1)
NUMPYS = np.random.default_rng(1)
OLDER = np.random.RandomState(1)
X = torch.linspace(-1, 1, 12).view(2, 6)


def state(module):
    """Everything that sampling might change: flags, and the bytes of parameters and buffers."""
    flags = [child.training for child in module.modules()]
    return flags, {n: t.numpy().tobytes() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("name", SITES)
def test_samples_are_distributed_as_plain_passes_in_train_mode(name):
    assert SITES.keys() == training_mode.NETWORKS.keys()
    module, x = training_mode.ready(name), torch.randn(1, 1, 28, 28)
    before = state(module)
    with torch.inference_mode():  # rows of a batch have masks of their own
        plain = with_dropout(module)(x.expand(PASSES, -1, -1, -1)).softmax(-1)
    sampler = Sampler(module, x)
    found = training_mode.compare(plain.view(PASSES, 1, 10), sampler.summarize(x, PASSES))
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


def by_weak_reference():
    module = Function(lambda m, x: F.dropout(x, 0.5) if m.parent().training else x)
    module.parent = weakref.ref(module)
    return module


def by_weak_proxy():
    module = Function(lambda m, x: F.dropout(x, 0.5) if m.parent.training else x)
    vars(module)["parent"] = weakref.proxy(module)
    return module


def by_function_in_a_function():
    def mode(again=True):
        return mode(False) if again else module.training

    module = Function(lambda m, x: m.drop(x))
    module.drop = lambda x, /, *, p=0.5: F.dropout(x, p) if mode() else x
    return module


def by_default_argument():
    module = Function(lambda m, x: m.drop(x))
    module.drop = partial(lambda x, outer: F.dropout(x, 0.5) if outer.training else x, outer=module)
    return module


@pytest.mark.parametrize(
    "build",
    [
        by_attribute,
        by_hook,
        by_bound_method,
        by_weak_reference,
        by_weak_proxy,
        by_function_in_a_function,
        by_default_argument,
    ],
)
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


HELD = {}


def in_a_table():
    def drop(_, x):
        def is_training():
            return HELD["module"].training

        return F.dropout(x, 0.5) if is_training() else x

    HELD["module"] = Function(drop)
    return HELD["module"]


class InItsClass(nn.Module):
    """Looks itself up in its class, by a property."""

    def __init__(self):
        super().__init__()
        type(self).held = [self]
        self.drop = nn.Dropout(0.5)

    @property
    def is_training(self):
        return self.held[0].training

    def forward(self, x):
        return self.drop(F.dropout(x, 0.5) if self.is_training else x)


@pytest.mark.parametrize("build", [in_a_class, in_a_list, in_a_table, InItsClass])
def test_a_reference_that_a_copy_cannot_follow_is_refused(build):
    with pytest.raises(UnsupportedModule, match=r"refers to a module .* make that module"):
        Sampler(build().eval(), X)


def test_what_a_logger_leads_to_is_not_searched(monkeypatch):
    def drop(_, x):
        LOG.debug("this is read by the module's code")
        return F.dropout(x, 0.5)

    module = Function(drop).eval()
    monkeypatch.setattr(LOG, "held", [module], raising=False)
    assert len(Sampler(module, X).sites) == 1


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
    for own, other in zip(module.parameters(), copied.parameters(), strict=True):
        assert own.data_ptr() == other.data_ptr()
    for own, other in zip(module.buffers(), copied.buffers(), strict=True):
        assert own.data_ptr() != other.data_ptr()
    assert [child.training for child in copied] == [True, False, True]


def if_training(change):
    return Function(lambda m, x: F.dropout(change(x) if m.training else x, 0.5))


@pytest.mark.parametrize(
    ("change", "source"),
    [
        (lambda x: x + torch.randn_like(x), "aten.randn_like"),
        (lambda x: x * (torch.rand_like(x) > 0.5) * 2, "aten.rand.default"),
        (lambda x: F.rrelu(x, training=True), "aten.rrelu_with_noise"),
        (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), "aten.bernoulli.default"),
        (lambda x: x * torch.empty_like(x).bernoulli_(x.sigmoid()), "aten.bernoulli_.Tensor"),
        (lambda x: x * x.int().bernoulli_(0.5), "aten.bernoulli_.float"),
        (lambda x: x * torch.ops.aten.dropout(x, 0.5, True), "dropout|bernoulli"),
        (lambda x: x * random.choice((1.0, 1.0)), "Python's random"),
        (lambda x: x * PRIVATE.choice((1.0, 1.0)), "Python's random"),
        (lambda x: x * float(np.random.rand() < 2), "a generator of NumPy"),
        (lambda x: x * float(NUMPYS.random() < 2), "a generator of NumPy"),
        (lambda x: x * float(OLDER.rand() < 2), "a generator of NumPy"),
        (lambda x: x * float(np.random.default_rng().random() < 2), "Python's random"),
        (lambda x: x * float(random.SystemRandom().random() < 2), "Python's random"),
    ],
)
def test_other_randomness_is_refused_by_name_with_the_remedy(change, source):
    module = nn.Sequential(nn.Identity(), if_training(change)).eval()
    with pytest.raises(UnsupportedModule, match=rf"^1: draws from .*({source}).*bernoulli_\(keep"):
        Sampler(module, X)


def test_random_numbers_of_the_compiler_are_none_of_the_module():
    layer, drop = nn.Linear(6, 3), nn.Dropout(0.5)
    compiled = nn.Sequential(drop, torch.compile(layer, backend="eager")).eval()
    expected = Sampler(nn.Sequential(drop, layer).eval(), X).sample(X, 12)
    torch.testing.assert_close(Sampler(compiled, X).sample(X, 12), expected)


class Auxiliary(nn.Module):
    """Answers with two tensors in train mode."""

    def __init__(self):
        super().__init__()
        self.drop, self.head, self.auxiliary = nn.Dropout(0.5), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        logits = self.head(self.drop(x))
        return (logits, self.auxiliary(x)) if self.training else logits


class Drifting(nn.Module):
    """Changes a buffer, on which its output depends, in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.ones(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        if self.training:
            self.passes += 1e-5
        return self.drop(x) * self.passes


class Clamped(nn.Module):
    """Changes its weights in train mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
        return F.linear(F.dropout(x, 0.5), self.weight)


class Everywhere(nn.Module):
    """Keeps its mode outside of the instance."""

    on = False

    def train(self, mode=True):
        Everywhere.on = mode
        return super().train(mode)

    def forward(self, x):
        return F.dropout(x, 0.5) * (1 + Everywhere.on)


class Itself(nn.Module):
    """Is its own copy."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout(0.5)

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.inner(x)


class NeedsTargets(nn.Module):
    """Cannot run in train mode without targets."""

    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("in training mode, targets should be passed")
        return F.dropout(x, 0.5, self.training)


class CountsByHand(nn.Module):
    """Writes to a buffer of the served module, whose address it knows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.address = self.count.data_ptr()

    def forward(self, x):
        if self.training:
            ctypes.c_float.from_address(self.address).value += 1
        return F.dropout(x, 0.5)


def layer_drop(x):
    return F.dropout(x, 0.1) if torch.empty(1).bernoulli_(0.5) else x


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (Auxiliary(), "one tensor of logits, not .*tuple.* in training mode"),
        (Function(lambda m, x: F.dropout(x, 0.5) * (2 if m.training else 1)), "auxiliary heads"),
        (Function(lambda m, x: m.first(x) if m.training else F.dropout(x)), "other logits"),
        (if_training(lambda x: x - x.mean(0)), "statistics of the batch"),
        (if_training(layer_drop), "dropout calls depend on masks"),
        (Drifting(), "two passes in training mode over the same images"),
        (Clamped(), "changes the parameter weight"),
        (Everywhere(), "after a copy .* other logits in eval mode|other logits in training mode"),
        (nn.Sequential(Itself()), "holds parts of the module itself"),
        (
            nn.Sequential(nn.Flatten(), Function(lambda _, x: F.dropout(x - x.mean(0)))),
            "depend on the other images",
        ),
        (CountsByHand(), "after a copy .* another in eval mode"),
        (NeedsTargets(), "in training mode the module fails: ValueError: .*targets"),
    ],
)
def test_what_else_depends_on_the_mode_is_refused_with_advice(module, advice):
    with pytest.raises(UnsupportedModule, match=advice):
        Sampler(module.eval(), X)


@pytest.mark.parametrize("what", [Lock(), np, (n for n in range(3))])
def test_what_cannot_be_copied_is_shared(what):
    module = Function(lambda _, x: F.dropout(x, 0.5)).eval()
    module.what, module.table = what, {"inner": [what, torch.ones(3)]}
    copied = Sampler(module, X).training_copy
    assert copied.what is what
    assert copied.table["inner"][0] is what
    assert copied.table["inner"][1] is not module.table["inner"][1]


class Merged(nn.Linear):
    """Adds a product to its weights in eval mode and takes it off in train mode, as LoRA does."""

    def __init__(self):
        super().__init__(6, 3)
        self.left, self.right = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 6))

    def train(self, mode=True):
        change = self.left @ self.right
        if mode != self.training:
            self.weight.data += -change if mode else change
        return super().train(mode)

    def forward(self, x):
        x = F.dropout(x, 0.5)
        beside = x @ (self.left @ self.right).T if self.training else 0
        return super().forward(x) + beside


def test_weights_that_train_changes_are_changed_in_the_copy_alone():
    module = Merged().eval()
    before, merged = state(module), module.weight.detach().clone()
    sampler = Sampler(module, X)
    assert state(module) == before
    got = sampler._forward(X, (torch.full((1, 6), 2.0),), torch.float32)
    torch.testing.assert_close(got, F.linear(2 * X, merged, module.bias))


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm, nn.utils.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_are_normalised_are_those_of_eval_mode(norm):
    module = nn.Sequential(norm(nn.Linear(6, 6)), Function(lambda _, x: F.dropout(x, 0.5))).eval()
    with torch.no_grad():
        module(X)
    before = state(module)
    sampler = Sampler(module, X)
    first = sampler.sample(X, 30)
    assert torch.equal(sampler.sample(X, 30), first)
    all_kept = (torch.ones(sampler.sites[0].template),)
    with torch.no_grad():
        torch.testing.assert_close(
            sampler._forward(X, all_kept, torch.float32),
            module[1].last(module[1].first(module[0](X))),
        )
    assert state(module) == before


class TimeFirst(nn.Module):
    """Folds time into the batch, the images of a step side by side."""

    def __init__(self, outer):
        super().__init__()
        self.outer, self.drop, self.last = outer, nn.Dropout(0.5), nn.Linear(3, 3)

    def forward(self, x):
        steps = x.view(len(x), 2, 3)
        steps = steps if self.outer else steps.transpose(0, 1)
        dropped = self.drop(steps.reshape(-1, 3)).view(steps.shape).tanh()
        return self.last(dropped.mean(1 if self.outer else 0))


@pytest.mark.parametrize("outer", [True, False])
def test_an_answer_does_not_depend_on_the_batch_wherever_rows_of_an_image_lie(outer):
    sampler = Sampler(TimeFirst(outer).eval(), X)
    assert sampler.sites[0].shape == (2, 3)
    assert sampler.sites[0].images_inside is not outer
    together = sampler.sample(X, 40)
    for image in (0, 1):
        alone = sampler.sample(X[image : image + 1], 40)
        torch.testing.assert_close(together[:, image], alone[:, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-3)
