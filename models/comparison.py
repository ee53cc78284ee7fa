"""Train mode and eval mode side by side, on the same images."""

import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.montecarlo import Sampler


@dataclass
class Moments:
    """Running mean and variance of numbers that come in tensors, in float64."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Take in all elements."""
        values = values.double()
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    @property
    def mean(self) -> float:
        """Of all elements so far."""
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Of all elements so far, about their mean."""
        return max(0.0, self.squares / self.count - self.mean**2)


@dataclass(frozen=True)
class Layer:
    """One call of a layer in a forward pass.

    Attributes:
        name: of the module; `[2]` follows where it is called a second time.
        kind: its class.
        p: its rate, where it is a dropout.
        eval: moments of its output in eval mode, over units and images.
        train: the same with dropout on, over passes too.
    """

    name: str
    kind: str
    p: float | None
    eval: Moments = field(default_factory=Moments)
    train: Moments = field(default_factory=Moments)


@dataclass(frozen=True)
class Comparison:
    """What two eval passes and k train-mode passes made of B images.

    Attributes:
        eval: probabilities [2, B, C], the same twice.
        train: probabilities [k, B, C].
        layers: in the order of a forward pass.
    """

    eval: Tensor
    train: Tensor
    layers: tuple[Layer, ...]

    def distance(self) -> Tensor:
        """Total variation between the train-mode mean and eval: [B], 0 to 1."""
        gap = self.train.double().mean(0) - self.eval[0].double()
        return gap.abs().sum(-1) / 2


def compare(
    module: nn.Module,
    sampler: Sampler,
    x: Tensor,
    passes: int = 8,
    seed: int = 0,
    p: float | None = None,
) -> Generator[None, None, Comparison]:
    """Run images through both modes, a pass a step: other work may run between them.

    Train mode here is dropout switched on. Batch normalisation keeps its running statistics in
    both, so that what differs is dropout's doing, and the module is not changed by being looked at.

    Args:
        module: maps normalised images to logits.
        sampler: of that module.
        x: images [B, ...].
        passes: k, with dropout on; independent masks.
        seed: of the masks.
        p: rate of every dropout in train mode; None: each one's own.

    Returns:
        What the passes made of them, when they are over.
    """
    layers: dict[str, Layer] = {}
    plain, thinned = [], []
    for _ in range(2):
        with torch.inference_mode(), _moments(module, layers, "eval"):  # neither across a yield
            plain.append(module(x.clone()))  # which it may overwrite
        yield
    for t in range(passes):
        with torch.inference_mode(), _moments(module, layers, "train"):
            thinned.append(sampler.thinned(x, seed, "independent", t, p))
        yield
    return Comparison(
        torch.stack(plain).float().softmax(-1),
        torch.stack(thinned).float().softmax(-1),
        tuple(layers.values()),
    )


@contextmanager
def _moments(module: nn.Module, layers: dict[str, Layer], mode: str) -> Iterator[None]:
    """Add the moments of every leaf's output to `layers`, for passes of this thread."""
    thread = threading.get_ident()
    calls: dict[str, int] = {}

    def record(name: str, leaf: nn.Module, output: object) -> None:
        if threading.get_ident() != thread or not isinstance(output, Tensor):
            return
        calls[name] = calls.get(name, 0) + 1
        key = name if calls[name] == 1 else f"{name}[{calls[name]}]"
        if key not in layers:
            layers[key] = Layer(key, type(leaf).__name__, _rate(leaf))
        moments: Moments = getattr(layers[key], mode)
        moments.add(output)

    with ExitStack() as hooks:
        for name, leaf in module.named_modules():
            if not any(leaf.children()):
                handle = leaf.register_forward_hook(
                    lambda m, _args, output, name=name or "root": record(name, m, output)
                )
                hooks.callback(handle.remove)
        yield


def _rate(leaf: nn.Module) -> float | None:
    """Return a dropout's p; other modules have none."""
    p = getattr(leaf, "p", None)
    return p if isinstance(p, float) else None
