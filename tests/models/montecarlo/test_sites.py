"""Sites: where a network drops units, and what cannot be sampled is refused with advice."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropserve.models.dropout import InvertedDropout, VanillaDropout
from dropserve.models.errors import SamplingError, UnsupportedModule
from dropserve.models.montecarlo import Sampler
from dropserve.models.networks import default_config

P = 0.5
X = torch.ones(2, 6)


class Calls(nn.Module):
    """Runs a function between two linear layers."""

    def __init__(self, function, classes=3):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.function = function
        self.last = nn.Linear(6, classes)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def test_the_default_networks_name_their_sites():
    mlp = Sampler(default_config("mlp", (1, 28, 28), 10).build().eval(), torch.zeros(1, 1, 28, 28))
    assert [(s.name, s.kind, s.p, s.shape) for s in mlp.sites] == [
        ("dropout1", "dropout", 0.2, (256,)),
        ("dropout2", "dropout", 0.5, (256,)),
    ]
    assert mlp.classes == 10
    assert mlp.path == "folded"


def test_a_function_in_a_forward_is_named_after_the_module_and_the_kind():
    sites = Sampler(nn.Sequential(Calls(lambda x: F.dropout(x, P))).eval(), X).sites
    assert [s.name for s in sites] == ["0:dropout"]


def test_a_site_behind_a_module_that_failed_has_the_name_of_its_own_module():
    class Fallback(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow = nn.Linear(5, 6)

        def forward(self, x):
            with suppress(RuntimeError):
                x = self.narrow(x)
            return F.dropout(x, P)

    assert [s.name for s in Sampler(Fallback().eval(), X).sites] == ["root:dropout"]


def test_a_zero_rate_is_no_site():
    module = nn.Sequential(nn.Dropout(0.0), nn.Dropout(P), InvertedDropout(0.0)).eval()
    assert [s.name for s in Sampler(module, X).sites] == ["1"]


@pytest.mark.parametrize(
    "dropout",
    [
        lambda x: F.dropout(input=x, p=P),
        lambda x: torch.dropout(x, P, train=True),
        lambda x: torch.dropout(input=x, p=P, train=True),
        lambda x: F.dropout(x, P, training=True, inplace=True),
    ],
    ids=["keyword", "torch", "torch by keyword", "in place"],
)
def test_dropout_is_found_however_it_is_called(dropout):
    sampler = Sampler(Calls(dropout).eval(), X)
    assert [(s.kind, s.p, s.shape) for s in sampler.sites] == [("dropout", P, (6,))]
    assert sampler.sample(X, 20).std(0).min() > 1e-4


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.Dropout1d, InvertedDropout, VanillaDropout])
def test_dropout_that_is_off_in_train_mode_is_no_site(kind):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.drop = nn.Sequential(nn.Linear(6, 6), kind(0.3)), nn.Dropout(P)

        def train(self, mode=True):
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, x):
            return F.alpha_dropout(self.drop(F.dropout(self.frozen(x), 0.25, training=False)))

    assert [s.name for s in Sampler(Frozen().eval(), X).sites] == ["drop"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_of_another_precision_is_sampled_in_it(dtype):
    torch.manual_seed(1)
    module = Calls(nn.Dropout(P)).eval()
    expected = Sampler(module, X).sample(X, 10)
    x = X.to(dtype)
    got = Sampler(module.to(dtype), x).sample(x, 10)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


def grown(module):
    return nn.Sequential(nn.Unflatten(1, (2, 3)), module)


class LastState(nn.Module):
    """A recurrent network that answers with its last output."""

    def __init__(self, kind, layers, dropout):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=layers, dropout=dropout, batch_first=True)
        self.drop = nn.Dropout(P)

    def forward(self, x):
        return self.drop(self.rnn(x.view(-1, 2, 3))[0][:, -1])


class PerBatch(nn.Module):
    """Drops only where the batch is odd."""

    def forward(self, x):
        return F.dropout(x, P) if len(x) % 2 else F.dropout(x, 0.25)


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (nn.Linear(6, 3), "add dropout"),
        (nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.0)), "add dropout"),
        (nn.Dropout(1.0), "p=1.0 drops everything"),
        (LastState(nn.GRU, 2, 0.5), r"rnn.*nn\.GRU\(num_layers=2.*stack single-layer ones"),
        (LastState(nn.LSTM, 2, 0.5), r"rnn.*nn\.LSTM\(num_layers=2.*stack single-layer ones"),
        (grown(nn.Dropout(P)), r"logits \[B, C\]; two images gave torch.float32 \[2, 2, 3\]"),
        (nn.Sequential(nn.Dropout(P), nn.Flatten(0)), r"logits \[B, C\]"),
        (nn.Sequential(nn.Dropout(P), nn.LSTMCell(6, 3)), "one tensor of logits"),
        (PerBatch(), "change with the size of the batch"),
        (Calls(lambda x: F.dropout(x @ x.T, P) @ x), r"mask of shape \[2, 2\] .* \[3, 3\]"),
    ],
    ids=["none", "rate 0", "rate 1", "gru", "lstm", "three dimensions", "one dimension", "a pair",
        "by batch", "batch twice",
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_sampled_is_refused_with_advice(module, advice):
    with pytest.raises(UnsupportedModule, match=advice):
        Sampler(module.eval(), X)


def test_torch_script_is_refused():
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        module = torch.jit.script(nn.Sequential(nn.Linear(6, 3), nn.Dropout(P)).eval())
    with pytest.raises(UnsupportedModule, match="TorchScript; give the Python module"):
        Sampler(module, X)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_network_with_dropout_outside_is_sampled(kind):
    sampler = Sampler(LastState(kind, 1, 0.0).eval(), X)
    assert [s.name for s in sampler.sites] == ["drop"]
    assert sampler.sample(X, 20).std(0).min() > 1e-4


class Branch(nn.Module):
    """Looks at a number that the masks decide, which no vectorised pass can."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        logits = self.plain(x)
        return logits if logits.sum().item() > -1e9 else -logits


def test_a_module_that_cannot_be_vectorised_logs_it_and_runs_one_pass_a_sample(caplog):
    plain = Calls(nn.Dropout(P)).eval()
    looped = Sampler(Branch(plain).eval(), X)
    assert "runs one pass a sample" in caplog.text
    vectorised = Sampler(plain, X)
    assert (looped.path, vectorised.path) == ("loop", "vmap")
    torch.testing.assert_close(looped.sample(X, 30, 5), vectorised.sample(X, 30, 5))


class Moody(nn.Module):
    """Changes its dropout calls after it was traced."""

    def __init__(self):
        super().__init__()
        self.calls = ((P, 6),)

    def forward(self, x):
        for p, units in self.calls:
            x = F.pad(F.dropout(x[:, :units], p), (0, 6 - units))
        return x


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ((), "did not call root, as"),
        (((P, 6), (P, 6)), "more often than on the example"),
        (((0.25, 6),), r"expected dropout with p=0.5 .* the module called dropout with p=0.25"),
        (((P, 4),), r"expected dropout with p=0.5 over \[1, 6\] .* over \[2, 4\]"),
    ],
)
def test_dropout_calls_that_are_not_those_of_the_example_are_refused(calls, reason):
    module = Moody().eval()
    sampler = Sampler(module, X)
    sampler.training_copy.calls = calls
    with pytest.raises(SamplingError, match=reason):
        sampler.sample(X, 3)
