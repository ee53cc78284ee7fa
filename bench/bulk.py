"""Processor time of bulk scoring by its engines: `python -m bench.bulk`, 15 minutes.

The same 100,000 PNG files of 28 x 28 pixels are scored over HTTP (a server and `dropserve score`),
by `--engine local`, and by `--engine ray` with one and two actors; in float32, without a log of
requests. Time is user and system time of the command, of the server, and of all that they start.
What an image takes is the slope of it over the images that are done, from a tenth of them on, and
its part of writing the table: the start is left out, and so is the end of Ray. Linux alone: it
adopts what Ray leaves behind. Exits with 1 if a target is missed.
"""

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench.http.processes import adopt_orphans, free_port, serving
from bench.progress import follow
from dropserve.lab.machine import machine, versions
from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.service.cli import score_ray

RESULT = Path(__file__).parent / "results/scaling/bulk.json"
IMAGES = 100_000
MODES = ("predict", "uncertainty")
ROUNDS = 3
"""In which engines take turns: a machine that others use too changes its speed."""
ENGINES: Mapping[str, Sequence[str]] = {
    "http": ["--engine", "http"],
    "local": ["--engine", "local"],
    "ray, 1 actor": ["--engine", "ray", "--actors", "1"],
    "ray, 2 actors": ["--engine", "ray", "--actors", "2"],
}
TARGET_SPEEDUP, TARGET_SCALING = 5.0, 0.1
"""Least images per processor second relative to HTTP; most that a second actor may add to each."""
_STARTING, _LEAST = 0.1, 5
"""Share of the images that do not count, as processes still start; looks at the others."""
_LOOK = 0.1  # seconds from one look at the processes to the next
_EACH = "microseconds_per_image"
_DROPSERVE = [sys.executable, "-c", "from dropserve.service.cli.main import app; app()"]


class Look(NamedTuple):
    """What was seen of a run: images that are done, seconds of processors, and of the clock."""

    images: int
    processor: float
    clock: float


def per_image(looks: Sequence[Look], images: int) -> tuple[float, float]:
    """Return the seconds that an image takes of processors, and of the clock.

    Raises:
        SystemExit: there were too few looks at a run, because there were too few images.
    """
    between = [look for look in looks if _STARTING * images <= look.images < images - 1]
    if len(between) < _LEAST:
        raise SystemExit(f"{images:,} images are done too soon to be measured: give more")
    # on images that are not done yet, each look has as much work: a slope has none of it
    done, *seconds = np.transpose(between)
    rows, table = (next(x for x in looks if x.images >= n) for n in (images - 1, images))
    processor, clock = (
        1 / np.polyfit(taken, done, 1)[0] + (table[i] - rows[i]) / images
        for i, taken in enumerate(seconds, 1)
    )
    return float(processor), float(clock)


def measure(folder: Path, root: Path, images: int, engine: str, mode: str) -> dict[str, float]:
    """Score a folder once: what an image took, after the start and with it."""
    environment = {
        "DROPSERVE_CHECKPOINTS": str(root),
        "DROPSERVE_LOG_LEVEL": "warning",
        "DROPSERVE_PRECISION": "float32",
    }
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        out = place / ("scores" if engine.startswith("ray") else "scores.csv")
        command = [*_DROPSERVE, "score", str(folder), "--out", str(out), "--mode", mode]
        command += ENGINES[engine]
        with (
            _server(environment, place) if engine == "http" else _nothing() as more,
            (place / "said").open("w+") as said,
        ):
            looks, used, scored, ended = [], dict[int, float](), _scored(out, images), False
            began = time.perf_counter()
            with subprocess.Popen(
                [*command, *more], env=os.environ | environment, stdout=said, stderr=said
            ) as process:
                while not ended:
                    time.sleep(_LOOK)
                    ended = _has_ended(process)
                    _count(used)
                    now = time.perf_counter() - began
                    looks.append(Look(next(scored), sum(used.values()), now))
            said.seek(0)
            if process.returncode or f"{images:,} images" not in (text := said.read()):
                raise RuntimeError(text)
        if psutil.wait_procs(psutil.Process().children(), timeout=60)[1]:
            raise RuntimeError(f"{engine} left processes behind")
        processor, clock = per_image(looks, images)
        return {
            _EACH: 1e6 * processor,
            f"{_EACH}_with_start": 1e6 * looks[-1].processor / images,
            "images_per_second": 1 / clock,
            "seconds": looks[-1].clock,
        }


@contextmanager
def _server(environment: Mapping[str, str], folder: Path) -> Iterator[list[str]]:
    """Serve; yield what the command is told of it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/readyz").is_success
        return False

    with serving([*_DROPSERVE, "serve", "--port", str(port)], environment, folder, answers):
        yield ["--url", url]


@contextmanager
def _nothing() -> Iterator[list[str]]:
    yield []


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Say if a process has ended, and leave it to be looked at for the last time."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, options) is not None


def _count(used: dict[int, float]) -> None:
    """Note the processor seconds of each process below this one.

    The system's count of those that have ended is not complete: Ray kills some.
    """
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            used[child.pid] = times.user + times.system


def _scored(out: Path, images: int) -> Iterator[int]:
    """Yield how many images are done, by the files that a run continues from; all: and written."""
    part, read, lines = out.with_name(f"{out.name}.part"), 0, 0
    while True:
        if out.is_dir():
            yield min(score_ray.IMAGES * len([*out.glob("part-*.parquet")]), images)
        elif out.exists():
            yield images
        else:
            with suppress(FileNotFoundError), part.open("rb") as file:
                file.seek(read)
                new = file.read()
                read, lines = read + len(new), lines + new.count(b"\n")
            yield max(0, min(lines, images) - 1)


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


def run(images: int, data: Path | None) -> dict[str, Any]:
    """Measure every engine in both modes; medians of the rounds."""
    adopt_orphans()
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="bulk-") as temporary:
        root, folder = Path(temporary, "checkpoints"), Path(temporary, "images")
        make_model(root)
        folder.mkdir()
        make_folder(folder, images, data)
        for mode, engine in follow([*product(MODES, ENGINES)] * ROUNDS, "runs"):
            found[engine, mode].append(measure(folder, root, images, engine, mode))

    def ratio(engine: str, other: str, mode: str) -> float:
        pairs = zip(found[engine, mode], found[other, mode], strict=True)
        return median(one[_EACH] / another[_EACH] for one, another in pairs)

    targets = {
        f"{engine}, {mode}: times HTTP": ratio("http", engine, mode)
        for mode, engine in product(MODES, ENGINES)
        if engine != "http"
    }
    for mode in MODES:
        targets[f"2 actors by 1, {mode}"] = ratio("ray, 2 actors", "ray, 1 actor", mode)
    rows = [
        {"engine": engine, "mode": mode}
        | {name: median(each[name] for each in rounds) for name in rounds[0]}
        | {"rounds": rounds}
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
    """Name the targets that are missed."""
    slow = [n for n, v in targets.items() if "times HTTP" in n and v < TARGET_SPEEDUP]
    return slow + [
        f"2 actors by 1, {mode}"
        for mode in MODES
        if targets[f"2 actors by 1, {mode}"] > 1 + TARGET_SCALING
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show what was measured."""
    shown = Table("engine", "mode", "us an image", "with its start", "images/s", "s, all")
    names = _EACH, f"{_EACH}_with_start", "images_per_second", "seconds"
    for row in rows:
        shown.add_row(row["engine"], row["mode"], *(f"{row[name]:,.0f}" for name in names))
    return shown


def main() -> None:
    """Measure, show, write; with other numbers of images nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    given = parser.parse_args()
    result = run(given.images, given.data)
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
