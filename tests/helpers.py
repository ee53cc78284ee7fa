"""What tests of several folders use: pictures as files, free ports, waiting, packages."""

import asyncio
import importlib.metadata
import inspect
import io
import socket
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from typer.testing import CliRunner

from dropserve.service.cli.main import app
from dropserve.service.client import AsyncDropserveClient, DropserveClient
from dropserve.service.http.images import encoded


def encode(picture, kind="PNG", **options):
    """Write an image, or an array of pixels, as a file's bytes."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(data, content_type, limits):
    """Decode an image at full size."""
    return encoded(data, content_type, limits).decode(lambda _image: None)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


PNG = encode(Image.new("L", (8, 8), 77))


def chunk(kind, data, crc=None):
    """Write a chunk of a PNG."""
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(width=4, height=4, *, bits=8, colour=0, rows=None, before=b"", data=True):
    """Write a PNG of grey 77, or of unfiltered rows; `before` goes between header and pixels."""
    if rows is None:
        rows = [b"\x4d" * width] * height
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
    return head + (pixels if data else b"") + chunk(b"IEND", b"")


def zero():
    """The first of scikit-learn's digits: what httpx is to post."""
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[0] * (255 / 16)).round().astype(np.uint8)
    return {"content": encode(pixels), "headers": {"Content-Type": "image/png"}}


def certify(folder, name, *options):
    """Make a self-signed certificate for 127.0.0.1 by openssl; return its path and its key's."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2")
    names = ("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", *kind, *names, *options, "-keyout", key, "-out", cert)
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def eventually(condition, seconds=30, pause=0.05):
    """Wait until a condition holds; return what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(pause)
    return found


def workers(server):
    """Process ids of a server's workers: its children that are no tracker of resources."""
    root = Path("/proc", str(server.process.pid), "task", str(server.process.pid), "children")
    children = root.read_text().split()
    return [
        int(pid) for pid in children if b"spawn_main" in Path("/proc", pid, "cmdline").read_bytes()
    ]


class Caller:
    """Calls a method of one of the two clients; a stream comes back as a list."""

    def __init__(self, kind, url, **options):
        self.kind, self.url, self.options = kind, url, options

    def __call__(self, method, *arguments, **given):
        if self.kind == "sync":
            with DropserveClient(self.url, **self.options) as client:
                answer = getattr(client, method)(*arguments, **given)
                return list(answer) if inspect.isgenerator(answer) else answer

        async def run():
            async with AsyncDropserveClient(self.url, **self.options) as client:
                answer = getattr(client, method)(*arguments, **given)
                if inspect.isasyncgen(answer):
                    return [event async for event in answer]
                return await answer

        return asyncio.run(run())


def invoke(*arguments, stdin=None, **environment):
    """Run a command in this process: as in a pipe, whatever the terminal of the tests is."""
    plain = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "100"}
    runner = CliRunner(env=plain | {"NO_PROXY": "127.0.0.1"} | environment)
    return runner.invoke(app, [str(argument) for argument in arguments], input=stdin)


def dropserve(*arguments, **environment):
    """Run a command that must succeed; return what it printed."""
    result = invoke(*arguments, **environment)
    assert result.exit_code == 0, result.output
    return result.stdout


def needed(requirements, instead=None):
    """Find the installed distributions that requirements lead to, directly or not.

    `instead` maps a distribution's name to requirements that count in place of its own.
    """
    found, seen = {}, set()
    pending = [(Requirement(text), "") for text in requirements]
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {("", name), *((e, name) for e in requirement.extras)} - seen:
            seen.add(wanted)
            found[name] = importlib.metadata.distribution(name)
            asked = (instead or {}).get(name, found[name].requires)
            pending += [(Requirement(text), wanted[0]) for text in asked or ()]
    return list(found.values())
