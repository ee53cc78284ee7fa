"""What processes, threads and parts of a batch do to training: `python -m bench.distributed`.

Each row is a run of its own: images a second of its last epochs, and the peak memory of a process.
Writes results/scaling/distributed.json. It takes three minutes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.networks import load_images
from bench.process import peak_memory
from bench.progress import follow
from dropserve.lab.machine import machine, versions
from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import default_config
from dropserve.models.processes import launch, run
from dropserve.models.training import fit

RESULTS = Path(__file__).parent / "results" / "scaling" / "distributed.json"
COMMAND = "python -m bench.distributed"
NETWORKS = {"mlp": (12_800, (128, 1024)), "cnn": (4096, (128, 1024))}
"""Images of an epoch, and batch sizes, by network."""
WAYS = {
    "1 process": {"processes": 1, "threads": 1, "accumulate": 1},
    "2 threads": {"processes": 1, "threads": 2, "accumulate": 1},
    "2 processes": {"processes": 2, "threads": 1, "accumulate": 1},
    "`--accumulate 8`": {"processes": 1, "threads": 1, "accumulate": 8},
}
_EPOCHS = 3  # the first is not counted


def work(options: Mapping[str, Any]) -> None:
    """Train as one of the processes of a run; the first prints what it measured as JSON."""
    data = load_images(Path(os.environ.get("DROPSERVE_DATA_DIR", "data")))
    held_out, size = 1000, options["batch"]
    images = min(options["images"] + held_out, len(data.train))
    some = data.train.take(torch.arange(images))
    threads, share = options["threads"], held_out / images
    recipe = Recipe(epochs=_EPOCHS, batch_size=size, threads=threads, validation_share=share)
    torch.manual_seed(0)
    module = default_config(options["network"], data.preprocessing.shape, 10).build()
    fabric = launch("cpu")
    how = {"fabric": fabric, "accumulate": options["accumulate"]}
    speeds = [
        e.images_per_second for e in fit(module, some, data.preprocessing.normalize, recipe, **how)
    ]
    if fabric.is_global_zero:
        speed = statistics.median(speeds[1:])
        print(json.dumps({"images_per_second": speed, "peak_bytes": peak_memory()}))


def measure(images: float = 1.0) -> dict[str, Any]:
    """Run each way with each network and batch; `images` is the share of them to take."""
    rows = []
    plans = [(n, b, w) for n, (_, batches) in NETWORKS.items() for b in batches for w in WAYS]
    for network, batch, way in follow(plans, "distributed"):
        count = max(2 * batch, int(NETWORKS[network][0] * images))
        options = {"network": network, "batch": batch, "images": count, **WAYS[way]}
        command = [sys.executable, "-m", "bench.distributed", "--run", json.dumps(options)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"way": way, **options, **json.loads(done.stdout)})
    for _, same in itertools.groupby(rows, lambda r: (r["network"], r["batch"])):
        alone, *others = same
        for row in (alone, *others):
            row["speedup"] = row["images_per_second"] / alone["images_per_second"]
            row["efficiency"] = row["speedup"] / (row["processes"] * row["threads"])
    return {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what was measured."""
    shown = Table("network", "batch", "way", "images/s", "speed-up", "efficiency", "peak MB")
    for r in rows:
        figures = f"{r['images_per_second']:,.0f}", f"{r['speedup']:.2f}", f"{r['efficiency']:.0%}"
        peak = f"{r['peak_bytes'] / 1e6:,.0f}"
        shown.add_row(r["network"], str(r["batch"]), r["way"], *figures, peak)
    return shown


def main() -> None:
    """Measure, show and save; or be one run of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a twentieth of the images; saves nothing"
    )
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run and asked.run["processes"] > 1:
        command = ["-m", "bench.distributed", "--work", json.dumps(asked.run)]
        sys.exit(run(command, asked.run["processes"]))
    if asked.run or asked.work:
        work(asked.run or asked.work)
        return
    result = measure(0.05 if asked.quick else 1.0)
    Console().print(table(result["rows"]))
    if not asked.quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
