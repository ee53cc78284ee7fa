"""Training throughput: `dropserve.models.training.fit` beside a plain loop over a `DataLoader`.

Same images, network, batch size and optimizer, all on all cores, an epoch of each in turn. The
plain loop is what people write: a dataset that normalises an image at a time, or, faster, whole
batches of a `TensorDataset`; dropout is PyTorch's.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bench.networks import Network, all_cores
from bench.progress import follow
from dropserve.models.data import Split
from dropserve.models.hyperparameters import Recipe
from dropserve.models.processes import launch
from dropserve.models.regularizers import InvertedDropout
from dropserve.models.training import Normalize, fit


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images one by one, normalised when they are asked for."""

    def __init__(self, data: Split, normalize: Normalize) -> None:
        self._data, self._normalize = data, normalize

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._normalize(self._data.images[index]), self._data.labels[index]


@all_cores()
def throughput(network: Network, data: Split, normalize: Normalize, rounds: int) -> dict[str, Any]:
    """Measure images a second; medians over `rounds` epochs, a first one not counted."""
    recipe = Recipe(epochs=rounds + 1, validation_share=0.01)
    torch.manual_seed(0)
    images, batches = Images(data, normalize), TensorDataset(data.images, data.labels)
    runs = {
        "fit": _fit(network.build(InvertedDropout), data, normalize, recipe),
        "dataloader": _plain(network.build(nn.Dropout), images, lambda x: x, recipe),
        "dataloader_batches": _plain(network.build(nn.Dropout), batches, normalize, recipe),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in follow(range(rounds + 1), f"{network.title}, training"):
        for name, run in runs.items():
            speed = next(run)
            if turn:
                found[name].append(speed)
    speeds = {name: statistics.median(values) for name, values in found.items()}
    return {
        "network": network.name,
        "title": network.title,
        "images": len(data),
        "batch": recipe.batch_size,
        "threads": torch.get_num_threads(),
        "images_per_second": speeds,
        "fit/dataloader": speeds["fit"] / speeds["dataloader"],
        "fit/dataloader_batches": speeds["fit"] / speeds["dataloader_batches"],
    }


def _fit(module: nn.Module, data: Split, normalize: Normalize, recipe: Recipe) -> Iterator[float]:
    for epoch in fit(module, data, normalize, recipe, fabric=launch("cpu")):
        yield epoch.images_per_second


def _plain(
    module: nn.Module,
    images: Dataset[tuple[Tensor, ...]],
    normalize: Normalize,
    recipe: Recipe,
) -> Iterator[float]:
    loader = DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    module.train()
    while True:
        started, seen = time.perf_counter(), 0
        for x, labels in loader:
            loss = F.cross_entropy(module(normalize(x)), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            seen += len(labels)
        yield seen / (time.perf_counter() - started)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what `throughput` measured."""
    names = ("fit", "dataloader", "dataloader_batches")
    shown = Table("training, images/s", *names, "fit/dataloader", "fit/dataloader_batches")
    for r in rows:
        figures = [f"{r['images_per_second'][name]:,.0f}" for name in names]
        ratios = [f"{r[name]:.2f}x" for name in ("fit/dataloader", "fit/dataloader_batches")]
        shown.add_row(r["network"], *figures, *ratios)
    return shown
