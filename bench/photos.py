"""Peak memory of one worker while it is sent the images that take the most: `make bench-photos`.

A server with its default settings, on a socket. Requests come from many clients at once: images of
64 megapixels of every kind that is read, bodies of 32 MB, and files made to take more memory than
they should. Linux alone: the kernel's own count, VmHWM. Exits with 1 if the peak is above the
target, or if an answer is none of those that are due.
"""

import argparse
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench import bombs
from bench.process import peak_memory
from dropserve.models import checkpoint
from dropserve.models.networks import default_config
from dropserve.models.preprocessing import Preprocessing

TARGET = 1_500_000_000
"""Bytes that a worker may hold at most."""
SIDE = 8000
"""Pixels of a side of the largest images: 64 megapixels."""
_BODY = 32 * 2**20
_DUE = {200, 413, 422, 503}
_MODEL = "memory-cnn"
_IMAGE = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


@dataclass(frozen=True)
class Request:
    """What is sent to a path."""

    body: bytes
    content_type: str
    path: str = "/predict"
    headers: Mapping[str, str] | None = None


def requests(side: int = SIDE, body: int = _BODY) -> dict[str, Request]:
    """Make the requests, by name.

    Args:
        side: of the largest images.
        body: bytes of the largest bodies.
    """
    square, wide = (side, side), (min(16_383, 2 * side), side // 2 - side // 100)
    found = {
        f"{kind} {mode} {' '.join(options)}".strip(): Request(
            bombs.encoded(mode, size, kind, **options), f"image/{kind.lower()}"
        )
        for kind, mode, size, options in (
            ("PNG", "RGBA", square, {}),
            ("PNG", "LA", square, {}),
            ("PNG", "RGB", square, {}),
            ("PNG", "P", square, {"transparency": 0}),
            ("PNG", "L", square, {}),
            ("JPEG", "RGB", square, {}),
            ("JPEG", "RGB", square, {"exif": _turned(), "progressive": True, "subsampling": 0}),
            ("JPEG", "CMYK", square, {"progressive": True, "subsampling": 0}),
            ("JPEG", "L", square, {"progressive": True}),
            ("WEBP", "RGBA", square, {"lossless": True, "quality": 0, "method": 0}),
            ("WEBP", "RGB", wide, {"quality": 10, "method": 0}),
        )
    }
    photo = _noise(body * 6 // 10)
    large = [request.body for name, request in found.items() if "RGB" in name or "CMYK" in name]
    encoded = [base64.b64encode(image).decode() for image in [photo, *large]]
    numbers = np.random.default_rng(0).integers(0, 256, body // 12, np.uint8).astype("<f4")
    return found | {
        "a photo of many bytes": Request(photo, "image/jpeg"),
        "a form of them": _form([photo, *large[: max(1, len(large) // 2)]]),
        "JSON of them": Request(
            json.dumps({"images": encoded}).encode()[:body], "application/json"
        ),
        "a million numbers": Request(
            json.dumps({"instances": [[[0.5 + k % 255 for k in range(1000)]] * 990]}).encode(),
            "application/json",
        ),
        "a million names": Request(
            json.dumps({f"name {k}": 1 for k in range(min(990_000, body // 20))}).encode(),
            "application/json",
        ),
        "a tensor": _tensor(numbers[: len(numbers) // 64 * 64].reshape(64, -1, 1)),
        "wide JSON": Request(
            ('{"images": ["\U0001f600' + "A" * (body - 1000) + '"]}').encode(), "application/json"
        ),
        "PNG of much text": Request(bombs.png_of_text(), "image/png"),
        "PNG of many chunks": Request(bombs.png_of_chunks(body), "image/png"),
        "PNG of much EXIF": Request(bombs.png_of_exif(body - 1000), "image/png"),
        "JPEG of many segments": Request(bombs.jpeg_of_segments(body), "image/jpeg"),
        "JPEG of many scans": Request(bombs.jpeg_of_scans(side, 90), "image/jpeg"),
        "WebP of many tables": Request(bombs.webp_of_tables(min(side, 1024)), "image/webp"),
        "64 images, sampled": _form([bombs.encoded("RGB", (64, 64), "PNG")] * 64, "/uncertainty"),
    }


def _turned() -> Image.Exif:
    """An EXIF orientation that swaps the sides."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _noise(size: int) -> bytes:
    """A JPEG of about so many bytes."""
    side = int((size / 3) ** 0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=98, subsampling=0)
    return file.getvalue()


def _form(images: list[bytes], path: str = "/predict") -> Request:
    head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    body = b"".join(head + image + b"\r\n" for image in images) + b"--cut--\r\n"
    return Request(body, "multipart/form-data; boundary=cut", path)


def _tensor(values: np.ndarray) -> Request:
    tensor = {
        "name": "image",
        "shape": values.shape,
        "datatype": "FP32",
        "parameters": {"binary_data_size": values.nbytes},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    path = f"/v2/models/{_MODEL}/infer"
    return Request(head + values.tobytes(), "application/octet-stream", path, headers)


@contextmanager
def _server() -> Iterator[tuple[str, int]]:
    """Serve an untrained network; yield its address and the number of its process."""
    with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as folder:
        _publish(Path(folder))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DROPSERVE_")}
        own = {"DROPSERVE_CHECKPOINTS": folder, "DROPSERVE_PORT": str(port)}
        own["DROPSERVE_LOG_LEVEL"] = "warning"
        command = [
            sys.executable,
            "-c",
            "from dropserve.service.cli.main import app; app()",
            "serve",
        ]
        process = subprocess.Popen(command, env=kept | own)
        url = f"http://127.0.0.1:{port}"
        try:
            while not _answers(url):
                if process.poll() is not None:
                    raise RuntimeError("the server has ended by itself")
                time.sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(60)


def _publish(folder: Path) -> None:
    torch.manual_seed(0)
    preprocessing = Preprocessing((28, 28), 1, (0.3,), (0.4,))
    network = default_config("cnn", preprocessing.shape, 10)
    classes = tuple(f"class {k}" for k in range(10))
    metadata = checkpoint.Metadata(_MODEL, network, preprocessing, classes)
    checkpoint.save(folder, network.build(), metadata)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/readyz").is_success
    except httpx.TransportError:
        return False


def send(url: str, request: Request) -> int:
    """Send a request; return the status of the answer, 0 if none came."""
    headers = {"Content-Type": request.content_type, **(request.headers or {})}
    try:
        response = httpx.post(
            url + request.path, content=request.body, headers=headers, timeout=300
        )
    except httpx.TransportError:
        return 0
    return response.status_code


def storm(
    url: str, made: Mapping[str, Request], clients: int, seconds: float, seed: int
) -> dict[str, Counter[int]]:
    """Send requests at random from many clients at once; return the statuses by name."""
    statuses: dict[str, Counter[int]] = {name: Counter() for name in made}
    end = time.monotonic() + seconds

    def ask(client: int) -> None:
        order = random.Random(seed + client)  # noqa: S311  no secret
        while time.monotonic() < end:
            name = order.choice(list(made))
            statuses[name][send(url, made[name])] += 1

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def main() -> None:
    """Measure, print a table and the peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    made = requests()
    with _server() as (url, process):
        idle = peak_memory(process)
        console.print(f"idle: {idle / 1e6:,.0f} MB")
        table = Table("one after another", "body, MB", "status", "seconds", "peak so far, MB")
        for name, request in made.items():
            started = time.monotonic()
            status = send(url, request)
            figures = len(request.body) / 1e6, time.monotonic() - started
            peak = peak_memory(process) / 1e6
            table.add_row(
                name, f"{figures[0]:.1f}", str(status), f"{figures[1]:.1f}", f"{peak:,.0f}"
            )
        console.print(table)
        console.print(f"resting: {psutil.Process(process).memory_info().rss / 1e6:,.0f} MB")
        found = storm(url, made, options.clients, options.seconds, options.seed)
        most = peak_memory(process)
        rest = psutil.Process(process).memory_info().rss
    table = Table(f"{options.clients} clients at once", "statuses")
    for name, statuses in found.items():
        table.add_row(name, ", ".join(f"{count} x {s}" for s, count in sorted(statuses.items())))
    console.print(table)
    console.print(f"peak: {most / 1e6:,.0f} MB of {TARGET / 1e6:,.0f}; then {rest / 1e6:,.0f} MB")
    sys.exit(most > TARGET or not set().union(*found.values()) <= _DUE)


if __name__ == "__main__":
    main()
