"""Peak memory of one call, above a process that has loaded the network and answered once.

Each call is made in a process of its own, `python -m bench.memory`, because memory that was freed
before would hide what it takes. Linux alone.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import Tensor, nn

from bench.networks import NETWORKS, Network
from bench.process import peak_memory
from bench.timing import contenders
from dropserve.models.memory import keep_freed_memory
from dropserve.models.storage import dump_tensors, parse_tensors, read_once

_MAX_BYTES = 2**30
_INPUT = "x"


def peak(network: Network, module: nn.Module, x: Tensor, samples: int, contender: str) -> float:
    """Return the MiB that one call takes at most, above idle.

    Args:
        network: which.
        module: it, with its weights.
        x: the batch [B, ...].
        samples: T.
        contender: as in `bench.timing.CONTENDERS`.
    """
    with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(dump_tensors(path, {**module.state_dict(), _INPUT: x}))
        command = [sys.executable, "-m", "bench.memory", network.name, str(path), contender]
        found = subprocess.run([*command, str(samples)], capture_output=True, text=True, check=True)
    mib: float = json.loads(found.stdout)["mib"]
    return mib


def row(
    network: Network, module: nn.Module, x: Tensor, samples: int, names: Sequence[str]
) -> dict[str, Any]:
    """Measure some contenders."""
    about = {"network": network.name, "title": network.title, "batch": len(x), "samples": samples}
    return {**about, "mib": {name: peak(network, module, x, samples, name) for name in names}}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what `row` measured."""
    names = list(dict.fromkeys(name for r in rows for name in r["mib"]))
    shown = Table("peak MiB above idle", "batch", "T", *names)
    for r in rows:
        figures = [f"{r['mib'][name]:,.0f}" if name in r["mib"] else "" for name in names]
        shown.add_row(r["network"], str(r["batch"]), str(r["samples"]), *figures)
    return shown


def main() -> None:
    """Make one call, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=[network.name for network in NETWORKS])
    parser.add_argument("file", type=Path, help="weights and batch, safetensors")
    parser.add_argument("contender")
    parser.add_argument("samples", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the service does
    tensors = parse_tensors(options.file, read_once(options.file, _MAX_BYTES))
    x = tensors.pop(_INPUT)
    network = next(network for network in NETWORKS if network.name == options.network)
    module = network.build(nn.Dropout).eval()
    module.load_state_dict(tensors)
    with torch.inference_mode():
        calls = contenders(module, x, options.samples)
        calls["eval"]()
        _give_freed_memory_back()
        with suppress(OSError):  # where it may not be reset, it can only come out higher
            Path("/proc/self/clear_refs").write_text("5")
        idle = psutil.Process().memory_info().rss
        calls[options.contender]()
        mib = max(0, peak_memory() - idle) / 2**20
        print(json.dumps({"mib": mib}))  # the parent reads it


def _give_freed_memory_back() -> None:
    """Return to the system what loading left free: reused by the call, it would not be counted."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


if __name__ == "__main__":
    main()
