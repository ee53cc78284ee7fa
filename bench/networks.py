"""The networks that are measured, and the images: Fashion-MNIST, or digits of its size without it.

What the engine costs depends on how many units ReLU leaves at zero, and what masks are worth on how
sure a network is, so the MLP and the CNN are trained, shortly and once: their weights are kept.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.progress import follow
from dropserve.models.data import Dataset, load_dataset
from dropserve.models.hyperparameters import Recipe
from dropserve.models.preprocessing import Preprocessing
from dropserve.models.processes import launch
from dropserve.models.storage import dump_tensors, parse_tensors, read_once, replace_durably
from dropserve.models.training import fit

CACHE = Path(__file__).parent / ".cache"
_MAX_BYTES = 2**28

Dropout = Callable[[float], nn.Module]


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        name: for the machine.
        title: for the reader.
        build: makes it, with the given class of dropout.
        batches: batch sizes to measure at.
        epochs: that it is trained for first: the recipe's, but fewer where they take minutes each.
    """

    name: str
    title: str
    build: Callable[[Dropout], nn.Module]
    batches: tuple[int, ...]
    epochs: int

    @property
    def trained(self) -> bool:
        """Say if it is trained at all."""
        return self.epochs > 0


def mlp(dropout: Dropout = nn.Dropout) -> nn.Module:
    """784-256-256-10 with rates .2 and .5."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 256), nn.ReLU(), dropout(0.2)),
        *(nn.Linear(256, 256), nn.ReLU(), dropout(0.5)),
        nn.Linear(256, 10),
    )


def cnn(dropout: Dropout = nn.Dropout) -> nn.Module:
    """Two convolutions, then 3136-128-10 with rates .25 and .5."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), dropout(0.25), nn.Linear(3136, 128), nn.ReLU(), dropout(0.5)),
        nn.Linear(128, 10),
    )


def residual(dropout: Dropout = nn.Dropout) -> nn.Module:
    """Three residual blocks of 16, 32, 64 channels; dropout in the last, .3, and before logits."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(
            _Block(16, 16, nn.Identity()),
            _Block(16, 32, nn.Identity()),
            _Block(32, 64, dropout(0.3)),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), dropout(0.5), nn.Linear(64, 10)),
    )


def encoder(_dropout: Dropout = nn.Dropout) -> nn.Module:
    """Two layers of `nn.TransformerEncoder` over 16 patches, width 64, PyTorch's own dropout .1."""
    return _Encoder(width=64, layers=2, patch=7)


NETWORKS = (
    Network("mlp", "MLP 784-256-256-10", mlp, (1, 64), epochs=30),
    Network("cnn", "CNN 2 conv + 3136-128-10", cnn, (1, 32), epochs=3),
    Network("residual", "residual net with BatchNorm", residual, (8,), epochs=0),
    Network("encoder", "TransformerEncoder", encoder, (8,), epochs=0),
)


class _Block(nn.Module):
    """He et al. (2016), with dropout between the convolutions (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, channels: int, out: int, dropout: nn.Module) -> None:
        super().__init__()
        stride = out // channels
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(dropout, nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.skip = nn.Sequential(convolution, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class _Encoder(nn.Module):
    def __init__(self, width: int, layers: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.logits = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position  # [B, tokens, width]
        logits: Tensor = self.logits(self.encoder(tokens).mean(1))
        return logits


def load_images(data_dir: Path, *, stand_in: bool = False) -> Dataset:
    """Load Fashion-MNIST from `data_dir`, if it is there, else digits, scaled up to 28 x 28."""
    if not stand_in and (data_dir / "fashion-mnist").is_dir():
        return load_dataset("fashion-mnist", data_dir)
    digits = load_dataset("digits", data_dir)
    train, test = (
        replace(s, images=F.interpolate(s.images, (28, 28), mode="bilinear"))
        for s in (digits.train, digits.test)
    )
    measured = Preprocessing.measured([train.images])
    return Dataset("digits-28x28", digits.classes, train, test, measured)


def ready(
    network: Network, data: Dataset, most: int | None = None, cache: Path = CACHE
) -> nn.Module:
    """Return a network in eval mode, trained if it is to be, from `cache` if it was before."""
    torch.manual_seed(0)
    module = network.build(nn.Dropout).eval()
    if not network.trained:
        return module
    epochs = min(network.epochs, most or network.epochs)
    path = cache / f"{network.name}-{data.name}-{epochs}.safetensors"
    if path.exists():
        module.load_state_dict(parse_tensors(path, read_once(path, _MAX_BYTES)))
        return module
    recipe = Recipe(epochs=epochs, learning_rate=1e-3)
    run = fit(module, data.train, data.preprocessing.normalize, recipe, fabric=launch("cpu"))
    with all_cores():
        for _ in follow(run, f"training the {network.name}", total=epochs):
            pass
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    replace_durably(path, dump_tensors(path, module.state_dict()))
    return module


@contextmanager
def all_cores() -> Iterator[None]:
    """Let torch use every core for the length of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_dropout(module: nn.Module) -> nn.Module:
    """Copy a module and put it in train mode, but for batch normalisation: Gal's recipe by hand.

    Dropout modules alone would not do: an encoder layer in eval mode takes PyTorch's fast path,
    which has no dropout.
    """
    module = copy.deepcopy(module).train()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
    return module
