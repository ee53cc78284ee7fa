"""Times T Monte Carlo samples four ways: `python -m bench.engine`.

For each network and batch size: one prediction in eval mode, the usual loop of T passes with
`nn.Dropout` in train mode, one pass over a T-fold batch, and `Sampler`. The four take turns, so
that a change in the machine's speed meets all of them; medians are reported.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from models.montecarlo import Sampler

Contender = Callable[[], Tensor]


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]]:
    """Return name -> (module in eval mode, shape of one image, batch sizes)."""
    mlp = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(256, 10),
    )
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(128, 10),
    )
    return {
        "MLP 784-256-256-10": (mlp.eval(), (1, 28, 28), (1, 64)),
        "CNN 2 conv + 3136-128-10": (cnn.eval(), (1, 28, 28), (1, 32)),
    }


def contenders(module: nn.Module, x: Tensor, samples: int) -> dict[str, Contender]:
    """Return name -> a call that answers the batch `x` once."""
    sampler = Sampler(module, x)

    def evaluate() -> Tensor:
        result: Tensor = module(x).softmax(-1)
        return result

    def with_dropout(batch: Tensor) -> Tensor:
        _switch_dropout(module, training=True)
        try:
            result: Tensor = module(batch).softmax(-1)
        finally:
            _switch_dropout(module, training=False)
        return result

    def loop() -> Tensor:
        return torch.stack([with_dropout(x) for _ in range(samples)]).mean(0)

    def fold() -> Tensor:
        batch = x.repeat(samples, *(1 for _ in x.shape[1:]))
        return with_dropout(batch).view(samples, len(x), -1).mean(0)

    def ours() -> Tensor:
        return sampler.sample(x, samples).mean(0)

    return {"eval": evaluate, "loop": loop, "fold": fold, "dropserve": ours}


def _switch_dropout(module: nn.Module, *, training: bool) -> None:
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.train(training)


def measure(calls: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Return name -> median microseconds of a call; the contenders take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in track(range(rounds + 1), transient=True):
        for name, call in calls.items():
            repeats = 20 if name == "eval" else 1
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - started) / repeats * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print a table and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("network", "batch", "eval us", "loop", "T-fold batch", "dropserve", "loop/ours")
    rows = []
    for name, (module, shape, batches) in networks().items():
        for batch in batches:
            with torch.inference_mode():
                calls = contenders(module, torch.randn(batch, *shape), options.samples)
                medians = measure(calls, options.rounds)
            ratio = medians["loop"] / medians["dropserve"]
            rows.append({"network": name, "batch": batch, **medians, "loop/ours": ratio})
            figures = [f"{value:,.0f}" for value in medians.values()]
            table.add_row(name, str(batch), *figures, f"{ratio:.1f}x")
    Console().print(table)
    if options.json:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        about |= {"samples": options.samples, "threads": options.threads}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
