"""Train mode and eval mode side by side, on the same images."""

import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dropserve.models.device import OneStepAhead, to_cpu
from dropserve.models.montecarlo import Sampler
from dropserve.models.regularizers import Stochastic


@dataclass
class Moments:
    """Mean and variance of all elements of some tensors, in float64."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, count: int, mean: float, variance: float) -> None:
        """Take in so many elements (Chan, Golub and LeVeque, 1979)."""
        self.count += count
        share, gap = count / self.count, mean - self.mean
        self.mean += share * gap
        self.variance += share * (variance - self.variance + (1 - share) * gap**2)


@dataclass(frozen=True)
class Layer:
    """One call of a layer in a forward pass, and the moments of its output in both modes."""

    name: str  # of the module; `[2]` follows where it is called a second time
    kind: str
    p: float | None  # in train mode, where it is a dropout
    eval: Moments = field(default_factory=Moments)  # over units and images
    train: Moments = field(default_factory=Moments)  # over passes too


_Found = tuple[Moments, int, Tensor]
"""Moments that some elements belong to, how many they are, and their variance and mean [2]."""


@dataclass(frozen=True)
class Comparison:
    """What two eval passes and k train-mode passes made of B images; tensors of the CPU."""

    eval: Tensor  # probabilities [2, B, C], the same twice
    train: Tensor  # probabilities [k, B, C]
    layers: tuple[Layer, ...]  # those that run in both modes, in the order of a forward pass

    def distance(self) -> Tensor:
        """Total variation between the train-mode mean and eval: [B], 0 to 1."""
        return (self.train.double().mean(0) - self.eval[0].double()).abs().sum(-1) / 2


def compare(
    module: nn.Module,
    sampler: Sampler,
    x: Tensor,
    passes: int = 8,
    seed: int = 0,
    p: float | None = None,
) -> Generator[None, None, Comparison]:
    """Run images [B, ...] through both modes, a pass a step: other work may run between them.

    Train mode here is dropout switched on, at rate `p` (None: each one's own), with independent
    masks. Batch normalisation keeps its running statistics in both, so that what differs is
    dropout's effect, and the module, whose sampler is given, is not changed.
    """
    laws = {site.module: site.law for site in sampler.sites}
    rates = {name: law.p if p is None else law.at(p).p for name, law in laws.items()}
    layers: dict[str, Layer] = {}
    found: list[_Found] = []
    plain, thinned = [], []
    ahead = OneStepAhead(x.device)
    for _ in range(2):
        # neither the mode nor the hooks may stay on across a yield
        with torch.inference_mode(), _recorded(module, "eval", rates, layers, found):
            plain.append(module(x.clone()))  # which it may overwrite
        ahead.wait()
        yield
    for t in range(passes):
        copied = sampler.training_copy
        with torch.inference_mode(), _recorded(copied, "train", rates, layers, found):
            thinned.append(sampler.thinned(x, seed, "independent", t, p))
        ahead.wait()
        yield
    probabilities = (torch.stack(logits).float().softmax(-1) for logits in (plain, thinned))
    evaluated, trained, *moments = to_cpu([*probabilities, *(moments for *_, moments in found)])
    for (side, count, _), (variance, mean) in zip(found, map(Tensor.tolist, moments), strict=True):
        side.add(count, mean, variance)
    both = (layer for layer in layers.values() if layer.eval.count and layer.train.count)
    return Comparison(evaluated, trained, tuple(both))


@contextmanager
def _recorded(
    module: nn.Module,
    mode: Literal["eval", "train"],
    rates: Mapping[str, float | None],
    layers: dict[str, Layer],
    found: list[_Found],
) -> Iterator[None]:
    """List what every leaf of `layers` gives in passes of this thread."""
    thread = threading.get_ident()
    calls: Counter[str] = Counter()

    def record(name: str, leaf: nn.Module, output: object) -> None:
        if threading.get_ident() != thread or not isinstance(output, Tensor) or not output.numel():
            return
        calls[name] += 1
        key = name if calls[name] == 1 else f"{name}[{calls[name]}]"
        dropped = isinstance(leaf, _DropoutNd | Stochastic)  # at rate 0 where it is no site
        rate = rates.get(key, 0.0 if dropped else None)
        layer = layers.setdefault(key, Layer(key, type(leaf).__name__, rate))
        moments = torch.stack(torch.var_mean(output.double(), correction=0))
        found.append((layer.eval if mode == "eval" else layer.train, output.numel(), moments))

    with ExitStack() as hooks:
        for name, leaf in module.named_modules():
            if not any(leaf.children()):
                handle = leaf.register_forward_hook(
                    lambda m, _args, output, name=name or "root": record(name, m, output)
                )
                hooks.callback(handle.remove)
        yield
