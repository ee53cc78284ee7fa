"""Networks that switch their noise by `self.training`, as published code does.

Monte Carlo dropout must answer what plain passes in train mode answer: `compare` holds one against
the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import networks, timing
from bench.progress import follow
from dropserve.models.montecarlo import Sampler, Summary

Rows = Iterator[dict[str, Any]]


class _Attention(nn.Module):
    """Self-attention over tokens [B, L, E]; the mode decides the argument `dropout_p`."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, width))
        return out


class _VisionTransformer(nn.Module):
    """Two layers over 16 patches, width 32 (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 7, 7)
        self.position = nn.Parameter(0.2 * torch.randn(16, 32))
        self.attention = nn.ModuleList(_Attention(32, 4, p) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            for _ in range(2)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.drop = nn.ModuleList(nn.Dropout(p) for _ in range(2))
        self.logits = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position  # [B, 16, 32]
        for norm, attention, mlp, drop in zip(
            self.norm, self.attention, self.mlp, self.drop, strict=True
        ):
            x = x + attention(norm(x))
            x = x + drop(mlp(x))
        logits: Tensor = self.logits(x.mean(1))
        return logits


class _ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, and functional dropout in train mode between them."""

    def __init__(self, channels: int, p: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        if self.training:
            y = F.dropout(y, self.p)
        return F.relu(x + self.norm2(self.second(y)))


def residual(p: float = 0.3) -> nn.Module:
    """Three residual blocks of 32 channels on 14x14 pixels, dropout in every block."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(_ResidualBlock(32, p) for _ in range(3)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop residual branches of whole rows, as timm's `drop_path` does."""
    if p == 0.0 or not training:
        return x
    keep = 1 - p
    mask = x.new_empty((x.shape[0], *(1 for _ in x.shape[1:]))).bernoulli_(keep)
    return x * mask.div_(keep)


def stochastic_depth(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop residual branches of whole rows, as torchvision's `stochastic_depth` does."""
    if not training or p == 0.0:
        return x
    survival = 1.0 - p
    noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(survival)
    if survival > 0.0:
        noise.div_(survival)
    return x * noise


class _StochasticDepth(nn.Module):
    """Residual layers whose branches are dropped with growing rates (Huang et al., ECCV 2016)."""

    def __init__(self, drop: Callable[[Tensor, float, bool], Tensor]) -> None:
        super().__init__()
        self.drop = drop
        self.first = nn.Linear(784, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.logits = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for number, layer in enumerate(self.layers):
            x = x + self.drop(F.gelu(layer(x)), 0.15 * number, self.training)
        logits: Tensor = self.logits(x)
        return logits


class _Recurrent(nn.Module):
    """An LSTM over the rows of an image, with dropout on its outputs."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, 24, batch_first=True)
        self.drop = nn.Dropout(p)
        self.logits = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x.squeeze(1))
        logits: Tensor = self.logits(self.drop(outputs).mean(1))
        return logits


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "vision transformer, attention's dropout_p by self.training": _VisionTransformer,
    "residual net, BatchNorm, F.dropout if self.training": residual,
    "stochastic depth as timm writes it": lambda: _StochasticDepth(drop_path),
    "stochastic depth as torchvision writes it": lambda: _StochasticDepth(stochastic_depth),
    "torch.nn.TransformerEncoder": networks.encoder,
    "LSTM, dropout on its outputs": _Recurrent,
}


def ready(name: str) -> nn.Module:
    """Return a network in eval mode.

    Its weights are larger than fresh ones and its norms have seen noise, so that its thinned
    networks disagree.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = NETWORKS[name]().train()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5 if parameter.dim() > 1 else 1)
            for _ in range(20):
                module(torch.randn(64, 1, 28, 28))
    return module.eval()


def study(passes: int, images: int, samples: int, batches: Sequence[int], rounds: int) -> Rows:
    """Compare each network's samples with plain passes, and time both; yields a row a network.

    Args:
        passes: of either, for the comparison.
        images: that are compared; pixels are noise.
        samples: T of the times.
        batches: images of the times.
        rounds: of the times.
    """
    x = torch.randn(max(images, *batches), 1, 28, 28, generator=torch.Generator().manual_seed(1))
    for name in NETWORKS:
        module = ready(name)
        noisy, sampler = networks.with_dropout(module), Sampler(module, x[:2])
        sampler.warm_up(x[:1])  # as the service does
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            plain = timing.passes(noisy, x[:images], follow(range(passes), name))
        found = compare(plain, sampler.summarize(x[:images], passes))
        speeds = {}
        for batch in batches:
            calls = {
                "loop": partial(timing.passes, noisy, x[:batch], range(samples)),
                "ours": partial(sampler.sample, x[:batch], samples),
            }
            times = timing.measure(calls, rounds, f"{name}, batch {batch}")
            speeds[f"loop/ours, batch {batch}"] = times["loop"] / times["ours"]
        yield {
            "network": name,
            "sites": len(sampler.sites),
            "path": sampler.path,
            **found,
            **speeds,
        }


def compare(plain: Tensor, ours: Summary) -> dict[str, float]:
    """Hold a summary against plain passes [T, B, C] in train mode.

    Returns:
        `variance ratio`: sums over images and classes, ours over the passes'; and `mean`: the
        largest distance of two means, in standard errors of that distance.
    """
    if ours.variance is None or ours.standard_error is None:
        raise ValueError("more samples are needed")
    mean, variance = plain.double().mean(0), plain.double().var(0)
    error = (variance / len(plain) + ours.standard_error**2).sqrt()
    return {
        "variance ratio": float(ours.variance.sum() / variance.sum()),
        "mean": float(((ours.mean - mean).abs() / error).max()),
    }
