"""Times S networks trained as one, their parameters stacked, and apart: `python -m bench.stacked`.

On one thread, in turns, so ratios hold on a busy machine; each has its own batch and masks.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.progress import follow
from dropserve.lab.machine import machine, versions
from dropserve.models.memory import keep_freed_memory
from dropserve.models.regularizers import InvertedDropout

RESULTS = Path(__file__).with_name("results") / "stacked.json"
NETWORKS, BATCH, STEPS = 5, 128, 20


class _Stacked(nn.Module):
    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:  # [S, B, in], each layer's own rows
        return torch.baddbmm(self.bias, x, self.weight)


def _stack(modules: Sequence[nn.Sequential]) -> nn.Sequential:
    layers = zip(*modules, strict=True)
    return nn.Sequential(*(_Stacked(m) if isinstance(m[0], nn.Linear) else m[0] for m in layers))


def _network(h: int) -> nn.Sequential:
    first = nn.Linear(784, h), nn.ReLU(), InvertedDropout(0.2)
    return nn.Sequential(*first, nn.Linear(h, h), nn.ReLU(), InvertedDropout(0.5), nn.Linear(h, 10))


def _trainer(module: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Return what makes a step of each of x [steps, (S,) B, in] and labels [steps, (S,) B]."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.02, fused=True)

    def train(x: Tensor, labels: Tensor) -> None:
        for inputs, right in zip(x, labels, strict=True):
            optimizer.zero_grad()
            logits = module(inputs).flatten(0, -2)
            (F.cross_entropy(logits, right.flatten(), reduction="sum") / right.shape[-1]).backward()
            optimizer.step()

    return train


def _apart(h: int, x: Tensor, labels: Tensor) -> float:
    """Train both ways with the same masks; return how far parameters are apart at most."""
    modules = [_network(h).to(x.dtype) for _ in range(NETWORKS)]
    stacked = _stack(modules)
    for i in (2, 5):
        masks = stacked[i](x.new_ones(*labels.shape, h))
        sources = map(iter, (masks, *masks.unbind(1)))
        for m, source in zip((stacked, *modules), sources, strict=True):
            m[i] = nn.Identity()
            m[i].register_forward_hook(lambda _m, x, _y, given=source: x[0] * next(given))
    _trainer(stacked)(x, labels)
    for m, *own in zip(modules, x.unbind(1), labels.unbind(1), strict=True):
        _trainer(m)(*own)
    pairs = zip(stacked.parameters(), _stack(modules).parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _row(h: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(STEPS, NETWORKS, BATCH, 784)
    labels = torch.randint(10, x.shape[:-1])
    # In double precision: in single, AdamW magnifies the rounding of gradients near 0.
    if not (apart := _apart(h, x[:5].double(), labels[:5])) <= 1e-9:
        raise RuntimeError(f"{h} units: parameters are {apart} apart")
    modules = [_network(h) for _ in range(NETWORKS)]
    separate, stacked = [_trainer(module) for module in modules], _trainer(_stack(modules))
    turns = []
    for _ in follow(range(rounds + 1), f"{h} units"):
        began = time.perf_counter()
        for s, train in enumerate(separate):
            train(x[:, s], labels[:, s])
        between = time.perf_counter()
        stacked(x, labels)
        turns.append((between - began, time.perf_counter() - between))
    medians = [1e3 * statistics.median(t) / STEPS for t in zip(*turns[1:], strict=True)]
    low, ratio, high = statistics.quantiles([a / b for a, b in turns[1:]], n=4)
    row = {"hidden": h, "apart": apart, "separate_ms": medians[0], "stacked_ms": medians[1]}
    return {**row, "quartile1": low, "separate/stacked": ratio, "quartile3": high}


def main(rounds: int = 31, results: Path = RESULTS) -> None:
    """Measure, print a table, write JSON."""
    torch.set_num_threads(1)  # as the lab does
    keep_freed_memory()
    rows = [_row(h, rounds) for h in (32, 64, 128, 256)]
    settings = {"networks": NETWORKS, "batch": BATCH, "steps": STEPS, "rounds": rounds}
    made: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    made |= {"versions": versions(), "settings": settings, "rows": rows}
    results.write_text(json.dumps(made, indent=2) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3g}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
