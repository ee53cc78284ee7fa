"""Processor time of bulk scoring by its engines: `python -m bench.bulk`, 25 minutes.

The same 100,000 PNG files of 28 x 28 pixels are scored over HTTP (a server and `dropserve score`,
both as they are by default), by `--engine local`, and by `--engine ray` with one and two actors.
Time is user and system time of all processes that the commands start, until the last has ended.
Each is run with few images too: the difference of both runs, by the difference of images, leaves
out what starting takes. Of Ray that varies by more than a second actor could add: what the actors
say that they took is compared for that. Linux alone, because of orphans. Exits with 1 if a target
is missed.
"""

import argparse
import ctypes
import gzip
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.http.processes import free_port
from bench.progress import follow
from dropserve.lab.machine import machine, versions
from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing

RESULT = Path(__file__).parent / "results/scaling/bulk.json"
IMAGES, FEW = 100_000, 5_000
MODES = ("predict", "uncertainty")
ROUNDS = 3
"""In which engines take turns: a machine that others use too changes its speed."""
_EACH, _WITH_START = "microseconds_per_image", "microseconds_per_image_with_start"
ENGINES: Mapping[str, Sequence[str]] = {
    "http": ["--engine", "http"],
    "local": ["--engine", "local"],
    "ray, 1 actor": ["--engine", "ray", "--actors", "1"],
    "ray, 2 actors": ["--engine", "ray", "--actors", "2"],
}
TARGET_SPEEDUP, TARGET_SCALING = 5.0, 0.1
"""Least images per processor second relative to HTTP; most that a second actor may add to each."""
_PR_SET_CHILD_SUBREAPER = 36
_DROPSERVE = [sys.executable, "-c", "from dropserve.service.cli.main import app; app()"]


def measure(folder: Path, root: Path, images: int, engine: str, mode: str) -> dict[str, float]:
    """Score a folder once: seconds of processor time, and of the clock, of scoring alone."""
    environment = os.environ | {
        "DROPSERVE_CHECKPOINTS": str(root),
        "DROPSERVE_LOG_LEVEL": "warning",
        "DROPSERVE_PRECISION": "float32",
    }
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / ("scores" if engine.startswith("ray") else "scores.csv")
        command = [*_DROPSERVE, "score", str(folder), "--out", str(out), "--mode", mode]
        command += ENGINES[engine]
        before = _children_seconds()
        with _server(environment) if engine == "http" else _nothing() as url:
            command += ["--url", url] if url else []
            started = time.perf_counter()
            run = subprocess.run(
                command, env=environment, check=False, capture_output=True, text=True
            )
            wall = time.perf_counter() - started
        if run.returncode or f"{images:,} images" not in run.stdout:
            raise RuntimeError(run.stdout + run.stderr)
        _reap()
        spent = _children_seconds() - before
        own = sum(map(float, re.findall(r"(?:decoding|inference) ([0-9.]+) s", run.stdout)))
        return {"processor_seconds": spent, "scoring_seconds": own, "seconds": wall}


@contextmanager
def _server(environment: Mapping[str, str]) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*_DROPSERVE, "serve", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    httpx.get(f"{url}/readyz").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
                if server.poll() is not None:
                    raise RuntimeError("the server did not start")
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


@contextmanager
def _nothing() -> Iterator[str]:
    yield ""


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reap() -> None:
    """Wait for all descendants: orphans become children of this process."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def make_folder(folder: Path, images: int, data: Path | None) -> None:
    """Write PNG files: Fashion-MNIST's again and again, or random ones without it."""
    pixels = _pixels(data)
    for number in follow(range(images), "images"):
        file = io.BytesIO()
        Image.fromarray(pixels[number % len(pixels)]).save(file, "PNG")
        (folder / f"{number:06}.png").write_bytes(file.getvalue())


def _pixels(data: Path | None) -> npt.NDArray[np.uint8]:
    file = data and data / "train-images-idx3-ubyte.gz"
    if file and file.is_file():
        raw = gzip.decompress(file.read_bytes())
        return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    return np.random.default_rng(0).integers(0, 256, (10_000, 28, 28), np.uint8)


def make_model(root: Path) -> None:
    """Save the network of the Fashion-MNIST recipe; its weights are of no effect on the time."""
    network = NetworkConfig("mlp", (1, 28, 28), 10, (256, 256), (0.2, 0.5))
    prepared = Preprocessing((28, 28), 1, (0.286,), (0.353,))
    torch.manual_seed(0)
    classes = tuple(f"class {k}" for k in range(10))
    checkpoint.save(root, network.build(), checkpoint.Metadata("bulk", network, prepared, classes))


def run(images: int, few: int, data: Path | None) -> dict[str, Any]:
    """Measure every engine in both modes, few images first; medians of the rounds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="bulk-") as temporary:
        root = Path(temporary) / "checkpoints"
        make_model(root)
        folders = {}
        for count in (few, images):
            folders[count] = Path(temporary) / str(count)
            folders[count].mkdir()
            make_folder(folders[count], count, data)
        for mode, engine in follow([*product(MODES, ENGINES)] * ROUNDS, "runs"):
            start, whole = (measure(folders[n], root, n, engine, mode) for n in (few, images))
            spent = whole["processor_seconds"] - start["processor_seconds"]
            found[engine, mode].append({
                **whole,
                _EACH: 1e6 * spent / (images - few),
                _WITH_START: 1e6 * whole["processor_seconds"] / images,
            })  # fmt: skip

    def ratio(name: str, engine: str, other: str, mode: str) -> float:
        pairs = zip(found[engine, mode], found[other, mode], strict=True)
        return median(one[name] / another[name] for one, another in pairs)

    targets = {}
    for mode in MODES:
        for engine in ("local", "ray, 1 actor", "ray, 2 actors"):
            targets[f"{engine}, {mode}: times HTTP"] = ratio(_EACH, "http", engine, mode)
            name = f"{engine}, {mode}: with its start, relative to HTTP"
            targets[name] = ratio(_WITH_START, "http", engine, mode)
        for name, seconds in (("2 actors by 1", "scoring_seconds"), ("2 actors by 1, all", _EACH)):
            targets[f"{name}, {mode}"] = ratio(seconds, "ray, 2 actors", "ray, 1 actor", mode)
    rows = [
        {"engine": engine, "mode": mode}
        | {n: median(each[n] for each in rounds) for n in rounds[0]}
        for (engine, mode), rounds in found.items()
    ]
    return {
        "command": "make bench-bulk",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions() | {"ray": version("ray")},
        "images": images,
        "rows": rows,
        "targets": targets,
    }


def missed(targets: Mapping[str, float]) -> list[str]:
    """Name the targets that are missed; what includes the start is shown, and has none."""
    slow = [n for n, v in targets.items() if "times HTTP" in n and v < TARGET_SPEEDUP]
    return slow + [
        f"2 actors by 1, {mode}"
        for mode in MODES
        if abs(targets[f"2 actors by 1, {mode}"] - 1) > TARGET_SCALING
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what was measured."""
    shown = Table("engine", "mode", "us an image", "with its start", "processor s", "s")
    for row in rows:
        per = [f"{row[f'microseconds_per_image{end}']:.0f}" for end in ("", "_with_start")]
        whole = [f"{row[name]:.1f}" for name in ("processor_seconds", "seconds")]
        shown.add_row(row["engine"], row["mode"], *per, *whole)
    return shown


def main() -> None:
    """Measure, show, write; with other numbers of images nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--few", type=int, default=FEW)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    result = run(given.images, given.few, given.data)
    console = Console()
    console.print(table(result["rows"]))
    console.print(result["targets"])
    if given.images == IMAGES:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    if bad := missed(result["targets"]):
        console.print(f"missed: {'; '.join(bad)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
