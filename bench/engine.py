"""Measures the Monte Carlo engine in one run: `python -m bench.engine`; writes results/engine.json.

Speed beside plain loops, what a sample is worth, memory, training throughput; then each claim of
the documentation with its target and what was measured. With `--device cuda` speed alone, at batch
1, 64 and 1,024, into results/engine-cuda.json.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bench import efficiency, memory, networks, noises, timing, training
from bench.claims import claims
from bench.claims import table as claims_table
from bench.networks import NETWORKS, Network
from bench.progress import follow
from dropserve.lab.machine import machine, versions
from dropserve.models.data import Dataset
from dropserve.models.device import find_device, is_gpu
from dropserve.models.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "engine.json"
RESULTS_OF_GPU = RESULTS.with_name("engine-cuda.json")
GPU_BATCHES = (1, 64, 1024)


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int = 7
    sweep: tuple[int, ...] = (10, 20, 100, 1000)
    sweep_rounds: int = 3
    images: int = 64
    passes: int = 100_000
    seeds: int = 40
    sizes: tuple[int, ...] = efficiency.SIZES
    training_images: int = 6400
    training_rounds: int = 3
    epochs: int | None = None
    batches: int | None = None
    contenders: tuple[str, ...] = ("eval", "loop", "fold", "ours", "ours_summary")


QUICK = Scale(
    rounds=1,
    sweep=(10,),
    sweep_rounds=1,
    images=8,
    passes=3000,
    seeds=4,
    sizes=(10, 50),
    training_images=256,
    training_rounds=1,
    epochs=1,
    batches=1,
    contenders=(),
)
"""A smoke run: some seconds, on digits, T=50, and no figure that means much."""


class Bench:
    """The networks, the images, and what is measured on them."""

    def __init__(
        self, data: Dataset, scale: Scale, samples: int, cache: Path, device: torch.device
    ) -> None:
        self.scale, self.samples, self.data, self.device = scale, samples, data, device
        ready = {n: networks.ready(n, data, scale.epochs, cache) for n in NETWORKS}
        self.modules = {n: module.to(device) for n, module in ready.items()}
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
        self._test = data.preprocessing.normalize(data.test.images[order[:256]].to(device))

    def x(self, images: int) -> Tensor:
        """Return test images, normalised [B, C, H, W]; from the 257th on the first again."""
        return self._test.repeat(-(-images // len(self._test)), 1, 1, 1)[:images]

    def cases(self) -> list[tuple[Network, nn.Module, Tensor]]:
        """List the networks with a batch of each size."""
        on_gpu = is_gpu(self.device)
        return [
            (network, module, self.x(batch))
            for network, module in self.modules.items()
            for batch in (GPU_BATCHES if on_gpu else network.batches)[: self.scale.batches]
        ]

    def trained(self) -> list[tuple[Network, nn.Module]]:
        """List the networks that are trained."""
        return [(network, module) for network, module in self.modules.items() if network.trained]

    def engine(self) -> list[dict[str, Any]]:
        """Time the contenders."""
        return [timing.row(*case, self.samples, self.scale.rounds) for case in self.cases()]

    def sweep(self) -> list[dict[str, Any]]:
        """Time the loop and ours over T."""
        scale = self.scale
        found = [
            timing.sweep(*case, scale.sweep, scale.sweep_rounds)
            for case in self.cases()
            if case[0].trained
        ]
        return [row for rows in found for row in rows]

    def noises(self) -> list[dict[str, Any]]:
        """Time each kind of noise."""
        return noises.rows(
            self.modules[NETWORKS[0]], self.x(noises.BATCH), self.samples, self.scale.rounds
        )

    def efficiency(self) -> list[dict[str, Any]]:
        """Measure what a sample is worth."""
        scale = self.scale
        x = self.x(scale.images)
        return [
            efficiency.study(network, module, x, scale.passes, scale.seeds, scale.sizes)
            for network, module in self.trained()
        ]

    def memory(self) -> list[dict[str, Any]]:
        """Measure what the contenders take, and T = 1,000 at batch 64 on the CNN."""
        calls = [(*case, self.samples, self.scale.contenders) for case in self.cases()]
        largest = [(*case, self.x(64), 1000, ("ours_summary",)) for case in self.trained()]
        calls = [call for call in calls if call[-1]] + [c for c in largest if c[0].name == "cnn"]
        return [memory.row(*call) for call in follow(calls, "memory")]

    def training(self) -> list[dict[str, Any]]:
        """Measure training throughput."""
        train = self.data.train
        images = train.take(torch.arange(min(self.scale.training_images, len(train))))
        normalize, rounds = self.data.preprocessing.normalize, self.scale.training_rounds
        trained = [n for n, _ in self.trained()][: self.scale.batches]
        return [training.throughput(n, images, normalize, rounds) for n in trained]


PARTS: dict[str, tuple[Callable[[Bench], list[dict[str, Any]]], Callable[..., Any]]] = {
    "engine": (Bench.engine, timing.table),
    "sweep": (Bench.sweep, timing.sweep_table),
    "noises": (Bench.noises, noises.table),
    "efficiency": (Bench.efficiency, efficiency.table),
    "memory": (Bench.memory, memory.table),
    "training": (Bench.training, training.table),
}
"""Name, also in JSON -> what measures it, what shows it."""


def run(bench: Bench, parts: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure the parts; print a table of each and one of the claims."""
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | _gpu(bench.device),
        "versions": versions(),
        "quick": bench.scale is QUICK,
        "data": bench.data.name,
        "samples": bench.samples,
        "threads": torch.get_num_threads(),
        "contenders": timing.CONTENDERS,
    }
    for name in parts:
        measure, table = PARTS[name]
        result[name] = measure(bench)
        console.print(table(result[name]))
    found = [] if is_gpu(bench.device) else claims(result)  # which are of a processor
    console.print(claims_table(found))
    return {**result, "claims": [claim.to_json() for claim in found]}


def _gpu(device: torch.device) -> dict[str, Any]:
    if not is_gpu(device):
        return {}
    return {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, help="T (default 100), a multiple of fifty")
    parser.add_argument("--threads", type=int, default=1, help="of all but training")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DROPSERVE_DATA_DIR", "data")),
        help="folder of datasets, or DROPSERVE_DATA_DIR; digits are taken without it",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="by default all; of a GPU engine")
    parser.add_argument("--quick", action="store_true", help="a smoke run, on digits")
    parser.add_argument("--cache", type=Path, default=networks.CACHE, help="of trained weights")
    parser.add_argument("--json", type=Path, help="file of results, by default bench/results")
    options = parser.parse_args(arguments)
    device = find_device(options.device)
    whole = ["engine"] if is_gpu(device) else list(PARTS)
    parts = options.only or whole
    if not set(parts) <= set(whole):
        parser.error(f"of a GPU there is {', '.join(whole)} alone")
    if options.json is None and (options.quick or set(parts) < set(whole)):
        parser.error("a part would overwrite the results of the whole: name a file with --json")
    target: Path = options.json or (RESULTS_OF_GPU if is_gpu(device) else RESULTS)
    samples = options.samples or (50 if options.quick else 100)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the service does
    data = networks.load_images(options.data_dir, stand_in=options.quick)
    bench = Bench(data, QUICK if options.quick else Scale(), samples, options.cache, device)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(f"{data.name}, T={samples}, {options.threads} thread(s)")
    result = run(bench, parts, console)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
