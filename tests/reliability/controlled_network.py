"""A network whose steps take as long, and as much memory, as the image says.

An image of one value does what `SLEEP` and the others below say. Any other, as those that a model
is tried on when it is loaded, takes `spin` seconds of CPU time, which decide where batches run.
"""

import re
import time

import httpx
import torch
from PIL import Image
from torch import nn

from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from tests.helpers import encode

NAME = "controlled"
FACTORY = f"{__file__}:Controlled"
SLEEP = 0.1
"""Seconds for each unit of a value up to 100."""
HANG, ALLOCATE = 200, 201
_BYTES = 8 * 2**30


class Controlled(nn.Module):
    """Maps images [B, 1, 8, 8] of 0 to 1 to two logits."""

    def __init__(self, spin: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)
        self.spin = spin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for image in x:
            if bool((image == image[0, 0, 0]).all()):
                do(round(255 * float(image[0, 0, 0])))
            else:
                spin(self.spin)
        return self.linear(x.flatten(1))


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def do(value: int) -> None:
    """Do what a value stands for."""
    if value <= 100:
        time.sleep(SLEEP * value)
    elif value == ALLOCATE:
        torch.empty(_BYTES, dtype=torch.uint8)
    elif value == HANG:
        time.sleep(3600)


def publish(root, name=NAME, spin=0.006):
    """Save a version; by default its batches are too slow to run on the event loop."""
    network = NetworkConfig(FACTORY, (1, 8, 8), 2, arguments={"spin": spin})
    preprocessing = Preprocessing((8, 8), 1, (0.0,), (1.0,))
    metadata = checkpoint.Metadata(name, network, preprocessing, ("a", "b"))
    torch.manual_seed(0)
    return checkpoint.save(root, network.build((FACTORY,)), metadata)


def image(value, size=8):
    """Write a PNG of one value."""
    return encode(Image.new("L", (size, size), value))


def ask(server, value, path="/predict", **headers):
    """Post an image of one value."""
    sent = {"Content-Type": "image/png", **headers}
    return httpx.post(server.url + path, content=image(value), headers=sent, timeout=60)


def figure(server, name):
    """Add up the values of a metric."""
    text = httpx.get(server.url + "/metrics").text
    return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
