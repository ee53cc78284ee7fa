"""Holds Monte Carlo figures against what they estimate: `python -m bench.accuracy`.

Samples of networks that switch their noise by `self.training` against plain passes in train mode
(`bench.training_mode`), and the reported standard error against the true one
(`bench.standard_error`).
Writes results/accuracy.json.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import standard_error, training_mode
from bench.progress import follow
from dropserve.lab.machine import machine, versions
from dropserve.models.memory import keep_freed_memory
from dropserve.models.montecarlo import MASK_KINDS

RESULTS = Path(__file__).parent / "results" / "accuracy.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=4000, help="plain passes of each network")
    parser.add_argument("--seeds", type=int, default=standard_error.SEEDS)
    parser.add_argument("--samples", type=int, default=100, help="T of the times")
    parser.add_argument("--images", type=int, default=8, help="that are compared")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of the times")
    parser.add_argument("--rounds", type=int, default=7, help="of the times")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the service does
    networks = training_mode.study(
        options.passes, options.images, options.samples, options.batches, options.rounds
    )
    rows = [row for kind in MASK_KINDS for row in standard_error.study(kind, seeds=options.seeds)]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "standard_error": rows,
        "training_mode": list(follow(networks, "networks", total=len(training_mode.NETWORKS))),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    console = Console()
    if not console.is_terminal:
        console.width = 140
    for part in ("standard_error", "training_mode"):
        table = Table(*result[part][0])
        for row in result[part]:
            cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            table.add_row(*cells)
        console.print(table)


if __name__ == "__main__":
    main()
