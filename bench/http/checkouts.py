"""Compares two checkouts of Dropserve over HTTP: `python -m bench.http.checkouts BEFORE`.

Each checkout runs its own `.venv/bin/dropserve serve`, one worker of one thread, over the same
checkpoints. The two servers take turns under wrk's load, so that what else the machine does hits
both. Results: requests a second, and processor time of the server a request.
"""

import argparse
import base64
import io
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from scipy import stats

from bench.http import load, processes
from bench.progress import follow
from dropserve.lab.machine import machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "checkouts.json"
COUNT = 16
"""Images of a case."""
BOUNDARY = "boundary-of-the-benchmark"


def encoded(kind: str, side: int, seed: int) -> bytes:
    """Make an image of smooth noise, which compresses about as a photo does."""
    grid = np.random.default_rng(seed).integers(0, 256, (7, 7), np.uint8)
    out = io.BytesIO()
    Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


@dataclass(frozen=True)
class Case:
    """What is sent, and how."""

    path: str
    content_type: str
    bodies: Sequence[bytes]
    connections: int = 32
    header: tuple[str, ...] = ()


def cases(model: str) -> Mapping[str, Case]:
    """Name what is measured."""
    png = [encoded("PNG", 28, n) for n in range(COUNT)]
    small, large = ([encoded("JPEG", side, n) for n in range(COUNT)] for side in (28, 224))
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n"
    parts = [part.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode() for image in small]
    lists = [json.dumps({"images": [base64.b64encode(image).decode()]}) for image in small]
    shape = {"name": "image", "datatype": "UINT8", "shape": [1, 28, 28, 1]}
    binary = shape | {"parameters": {"binary_data_size": 28 * 28}}
    head = json.dumps({"inputs": [binary]}).encode()
    length = ("Inference-Header-Content-Length", str(len(head)))
    pixels = [np.random.default_rng(n).bytes(28 * 28) for n in range(COUNT)]
    infer = f"/v2/models/{model}/infer"
    return {
        "PNG 28 x 28, 1 connection": Case("/predict", "image/png", png, 1),
        "PNG 28 x 28": Case("/predict", "image/png", png),
        "JPEG 28 x 28": Case("/predict", "image/jpeg", small),
        "JPEG 224 x 224": Case("/predict", "image/jpeg", large),
        "multipart, JPEG 28 x 28": Case(
            "/predict", f"multipart/form-data; boundary={BOUNDARY}", parts
        ),
        "JSON, JPEG 28 x 28": Case("/predict", "application/json", [x.encode() for x in lists]),
        "OIP, binary tensor 28 x 28": Case(
            infer, "application/octet-stream", [head + x for x in pixels], header=length
        ),
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="the other checkout, with its .venv")
    parser.add_argument("--change", default="a change", help="what changed, for the report")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=2)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = {"before": options.before.resolve(), "after": ROOT}
        servers = {
            name: stack.enter_context(_serving(tree, options.checkpoints.resolve(), folder / name))
            for name, tree in trees.items()
        }
        url, _ = servers["after"]
        model = httpx.get(f"{url}/v1/models").json()["models"][0]["name"]
        rows = []
        for number, (title, case) in enumerate(cases(model).items()):
            bodies = folder / str(number)
            bodies.mkdir()
            for index, body in enumerate(case.bodies):
                (bodies / str(index)).write_bytes(body)
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
            for turn in follow(range(options.rounds + 1), title):
                names = list(servers) if turn % 2 else list(reversed(servers))
                for name in names:
                    url, running = servers[name]
                    found = _measure(url, running, case, bodies, options.seconds)
                    if turn:  # the first round warms up
                        measured[name].append(found)
            rows.append({"case": title, **_compared(**measured)})
            print(json.dumps(rows[-1]))
    settings = {"rounds": options.rounds, "seconds": options.seconds}
    versions = {"python": platform.python_version(), "torch": version("torch")}
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "versions": versions,
        "change": options.change,
        **settings,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _serving(tree: Path, checkpoints: Path, folder: Path) -> "_Server":
    folder.mkdir()
    port = processes.free_port()
    environment = {
        "DROPSERVE_CHECKPOINTS": str(checkpoints),
        "DROPSERVE_PORT": str(port),
        "DROPSERVE_THREADS": "1",
        "DROPSERVE_PRECISION": "float32",
        "DROPSERVE_LOG_LEVEL": "warning",
        "OMP_NUM_THREADS": "1",
    }
    return _Server([str(tree / ".venv/bin/dropserve"), "serve"], environment, folder, port)


class _Server:
    """A running server: its address and its processes."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], folder: Path, port: int
    ) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._before = set(psutil.Process().children(recursive=True))
        self._serving = processes.serving(command, environment, folder, self._answers)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self._url}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def __enter__(self) -> tuple[str, list[psutil.Process]]:
        self._serving.__enter__()
        found = set(psutil.Process().children(recursive=True)) - self._before
        return self._url, list(found)

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401
        self._serving.__exit__(*error)


def _measure(
    url: str,
    running: list[psutil.Process],
    case: Case,
    bodies: Path,
    seconds: int,
) -> tuple[float, float]:
    """Return requests a second, and microseconds of processor time a request."""
    before = _seconds_used(running)
    found = load.run(
        url + case.path, bodies, case.content_type, case.connections, seconds, case.header
    )
    if found.errors:
        raise SystemExit(f"{found.errors} errors at {case.path}")
    used = _seconds_used(running) - before
    return found.requests_per_second, used / found.requests * 1e6


def _seconds_used(running: Sequence[psutil.Process]) -> float:
    """Return the processor time that processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in running)


def _compared(
    before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> dict[str, float]:
    """Compare in pairs: geometric mean of ratios and its 95% interval; difference of times."""
    logs = [math.log(a[0] / b[0]) for a, b in zip(after, before, strict=True)]
    extra = [a[1] - b[1] for a, b in zip(after, before, strict=True)]
    t = float(stats.t.ppf(0.975, len(logs) - 1)) / math.sqrt(len(logs))
    mean, half = statistics.fmean(logs), t * statistics.stdev(logs)
    return {
        "before": round(statistics.median(x[0] for x in before)),
        "after": round(statistics.median(x[0] for x in after)),
        "ratio": round(math.exp(mean), 4),
        "ratio_low": round(math.exp(mean - half), 4),
        "ratio_high": round(math.exp(mean + half), 4),
        "microseconds_before": round(statistics.median(x[1] for x in before), 1),
        "microseconds_after": round(statistics.median(x[1] for x in after), 1),
        "microseconds_more": round(statistics.fmean(extra), 1),
        "microseconds_half_width": round(t * statistics.stdev(extra), 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
