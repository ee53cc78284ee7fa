"""Train mode and eval mode side by side, on the same images."""

import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dropserve.models.dropout import Dropout
from dropserve.models.montecarlo import Sampler


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
        p: its rate in train mode, where it is a dropout.
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
        layers: those that run in both modes, in the order of a forward pass.
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
    rates = {site.name: (site if p is None else site.at(p)).p for site in sampler.sites}
    layers = _Layers(rates)
    plain, thinned = [], []
    for _ in range(2):
        with torch.inference_mode(), layers.watched(module, "eval"):  # neither across a yield
            plain.append(module(x.clone()))  # which it may overwrite
        yield
    for t in range(passes):
        with torch.inference_mode(), layers.watched(sampler.training_copy, "train"):
            thinned.append(sampler.thinned(x, seed, "independent", t, p))
        yield
    return Comparison(
        torch.stack(plain).float().softmax(-1),
        torch.stack(thinned).float().softmax(-1),
        layers.in_both_modes(),
    )


class _Layers:
    """The leaves of a module, and moments of their outputs.

    Args:
        rates: of the dropout sites in train mode, by name.
    """

    def __init__(self, rates: Mapping[str, float]) -> None:
        self._rates = rates
        self._found: dict[str, Layer] = {}

    def in_both_modes(self) -> tuple[Layer, ...]:
        """Return the layers that ran in both."""
        return tuple(x for x in self._found.values() if x.eval.count and x.train.count)

    @contextmanager
    def watched(self, module: nn.Module, mode: Literal["eval", "train"]) -> Iterator[None]:
        """Add the moments of every leaf's output, for passes of this thread."""
        thread = threading.get_ident()
        calls: dict[str, int] = {}

        def record(name: str, leaf: nn.Module, output: object) -> None:
            if threading.get_ident() != thread or not isinstance(output, Tensor):
                return
            calls[name] = calls.get(name, 0) + 1
            key = name if calls[name] == 1 else f"{name}[{calls[name]}]"
            if key not in self._found:
                self._found[key] = Layer(key, type(leaf).__name__, self._rate(key, leaf))
            layer = self._found[key]
            (layer.eval if mode == "eval" else layer.train).add(output)

        with ExitStack() as hooks:
            for name, leaf in module.named_modules():
                if not any(leaf.children()):
                    handle = leaf.register_forward_hook(
                        lambda m, _args, output, name=name or "root": record(name, m, output)
                    )
                    hooks.callback(handle.remove)
            yield

    def _rate(self, key: str, leaf: nn.Module) -> float | None:
        """Return a dropout's rate, 0 where it is no site; other modules have none."""
        return self._rates.get(key, 0.0 if isinstance(leaf, _DropoutNd | Dropout) else None)
