"""What every peer serves: the checkpoint's MLP in eval mode, PNG bytes in, probabilities out.

Needs torch, NumPy, Pillow and safetensors alone, so that it runs in every peer's environment. It is
written to be fast: one thread, one tensor a batch, normalised in place.
"""

import io
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

WORKERS = 2  # processes that run the network, where a peer has that notion
BATCH, WAIT_SECONDS = 16, 0.001  # at half of 32 connections, both workers have a batch to run


class Classifier:
    """The network of the checkpoint that BENCH_CHECKPOINT names."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        folder = Path(os.environ["BENCH_CHECKPOINT"])
        about = json.loads((folder / "model.json").read_text())
        height, width = about["preprocessing"]["size"]
        self.mean = 255 * about["preprocessing"]["mean"][0]
        self.std = 255 * about["preprocessing"]["std"][0]
        self.module = mlp(height * width, **about["network"])
        self.module.load_state_dict(load_file(folder / "model.safetensors"))
        self.module.eval()

    def batch(self, pngs: Sequence[bytes]) -> Tensor:
        """Decode and normalise pictures: float32 [B, H * W]."""
        pixels = [np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in pngs]
        return torch.from_numpy(np.stack(pixels)).flatten(1).float().sub_(self.mean).div_(self.std)

    @torch.inference_mode()
    def predict(self, pngs: Sequence[bytes]) -> np.ndarray:
        """Return the probabilities of pictures: float32 [B, C]."""
        return self.module(self.batch(pngs)).softmax(-1).numpy()


def mlp(
    width: int, hidden: Sequence[int], dropout: Sequence[float], classes: int, **_rest: object
) -> nn.Sequential:
    """Build linear, ReLU, dropout a hidden layer, then logits, under the checkpoint's names."""
    layers: list[tuple[str, nn.Module]] = []
    for i, (units, p) in enumerate(zip(hidden, dropout, strict=True), 1):
        layers += [(f"hidden{i}", nn.Linear(width, units)), (f"relu{i}", nn.ReLU())]
        layers.append((f"dropout{i}", nn.Dropout(p)))
        width = units
    return nn.Sequential(OrderedDict([*layers, ("logits", nn.Linear(width, classes))]))
