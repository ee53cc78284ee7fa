"""Each kind of noise: T Monte Carlo samples by a plain loop and by ours.

The loop runs what PyTorch's users write, in train mode, with one mask of weights a pass. The MLPs
have the weights of the trained one, so that as many units are at zero.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from bench import timing
from bench.networks import with_dropout
from dropserve.models.montecarlo import Sampler
from dropserve.models.networks import default_config
from dropserve.models.regularizers import (
    METHODS,
    DropConnect,
    GaussianDropout,
    GaussianNoise,
    InvertedDropout,
    VanillaDropout,
)
from dropserve.models.sequential import convert_memory_format

BATCH = 8
OTHERS = (
    ("gru", "dropout"), ("gru", "variational"), ("gru", "dropconnect"), ("gru", "zoneout"),
    ("wrn", "dropout"), ("vit", "dropout"),
)  # fmt: skip
"""Networks beside the MLP, and the method of each."""


class _Plain(nn.Module):
    """A layer whose train mode is a function of its input and of what the layer holds."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer)


def _connect(x: Tensor, layer: DropConnect) -> Tensor:
    keep = 1 - (layer.p or 0.0)
    weight, bias = (
        parameter * torch.bernoulli(torch.full_like(parameter, keep)) / keep
        for parameter in (layer.weight, layer.bias)
    )
    return F.linear(x, weight, bias)


_FUNCTIONS: Mapping[type[nn.Module], Callable[[Tensor, Any], Tensor]] = {
    InvertedDropout: lambda x, layer: F.dropout(x, layer.p),
    VanillaDropout: lambda x, layer: x * torch.bernoulli(torch.full_like(x, 1 - layer.p)),
    GaussianDropout: lambda x, layer: x * (1 + layer.law.std * torch.randn_like(x)),
    GaussianNoise: lambda x, layer: x + layer.law.std * torch.randn_like(x),
    DropConnect: _connect,
}


def plain(module: nn.Module) -> nn.Module:
    """Copy a sequential network with its noise as PyTorch's users write it."""
    copied = copy.deepcopy(module)
    for name, layer in copied.named_children():
        if type(layer) in _FUNCTIONS:
            setattr(copied, name, _Plain(layer, _FUNCTIONS[type(layer)]))
    return copied


def rows(trained: nn.Module, x: Tensor, samples: int, rounds: int) -> list[dict[str, Any]]:
    """Measure every method on the MLP, whose weights `trained` has, and the other networks."""
    x, found = x[:BATCH], []
    mlp = [("mlp", name) for name, method in METHODS.items() if "mlp" in method.networks]
    for kind, method in (*mlp, *OTHERS):
        torch.manual_seed(0)
        module = default_config(kind, (1, 28, 28), 10, method).build().eval()
        loop = with_dropout(module)
        if kind == "mlp":
            pairs = zip(module.parameters(), trained.parameters(), strict=True)
            for own, theirs in pairs:
                own.data.copy_(theirs)
            loop = plain(module)
        found.append(_row(kind, method, module, loop, x, samples, rounds))
    return found


def _row(
    kind: str, method: str, module: nn.Module, loop: nn.Module, x: Tensor, samples: int, rounds: int
) -> dict[str, Any]:
    sampler = Sampler(convert_memory_format(module), x)
    sampler.warm_up(x[:1])
    seeds = itertools.count(1)
    calls = {
        "loop": lambda: timing.passes(loop, x, range(samples)).mean(0),
        "ours": lambda: sampler.sample(x, samples).mean(0),
        "ours_new_seed": lambda: sampler.sample(x, samples, next(seeds)).mean(0),
    }
    times = timing.measure(calls, rounds, f"{kind}, {method}")
    return {
        "network": kind,
        "method": method,
        "batch": len(x),
        "samples": samples,
        "path": sampler.path,
        "microseconds": times,
        "loop/ours": times["loop"] / times["ours"],
        "loop/ours_new_seed": times["loop"] / times["ours_new_seed"],
    }


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Show what `rows` measured: milliseconds and ratios."""
    shown = Table("network", "method", "loop ms", "ours", "new seed", "loop/ours", "path")
    for r in found:
        figures = [f"{r['microseconds'][name] / 1e3:,.2f}" for name in r["microseconds"]]
        shown.add_row(r["network"], r["method"], *figures, f"{r['loop/ours']:.1f}x", r["path"])
    return shown
