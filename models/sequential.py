"""Sequential networks in eval mode as a list of steps: about half the time on a CPU.

The results are the same to rounding. Batch normalisation is fused into the layer before it, ReLU
overwrites what a linear layer has just made, and weights are stored as products of few rows read
them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dropserve.models.device import is_gpu
from dropserve.models.regularizers import DropConnect, Elementwise

Step = Callable[[Tensor], Tensor]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Modules that multiply by a mask in train mode and do nothing in eval mode."""


@dataclass(eq=False)
class Mask:
    """A layer of noise among steps: called it is eval mode, `combine(x, noise)` train mode.

    `mean` is that of the noise, None where eval mode is the identity; `kept` as of `scaled`.
    """

    combine: Callable[..., Tensor] = torch.mul
    mean: float | None = None
    kept: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Map x as in eval mode."""
        return x if self.mean is None else self.combine(x, self.mean)

    def sample(self, x: Tensor, noise: Tensor, *, fresh: bool = False) -> Tensor:
        """Put the noise [T, ...] of T samples into x [B, T or 1, ...], in place if it is fresh."""
        noise = scaled(noise, self.kept).to(x.dtype)
        return self.combine(x, noise, out=x if fresh else None)


class WeightMask(Mask):
    """A `DropConnect` layer among steps: each sample has weights of its own."""

    def __init__(self, layer: DropConnect, dtype: torch.dtype) -> None:
        super().__init__(kept=layer.law.kept)
        self._weight, self._bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] by the mean weights."""
        return F.linear(x, self._weight, self._bias)

    def sample(self, x: Tensor, noise: Tensor, *, fresh: bool = False) -> Tensor:  # noqa: ARG002
        """Map x [B, T or 1, in] to [B, T, out]: sample by sample, so that weights stay in cache."""
        result = x.new_empty(len(x), len(noise), len(self._weight))
        own = torch.empty_like(self._weight, memory_format=torch.contiguous_format)
        bools = noise.dtype == torch.bool
        kept = self.kept if bools else 1.0
        for t, drawn in enumerate(noise.flatten(0, -3)):
            if bools and own.dtype == torch.float32 and not is_gpu(own.device):  # as in `scaled`
                np.multiply(self._weight.numpy(), drawn[:, :-1].numpy(), out=own.numpy())
            else:
                torch.mul(self._weight, drawn[:, :-1], out=own)
            rows, bias = x[:, t if x.shape[1] > 1 else 0], self._bias * drawn[:, -1]
            torch.addmm(bias, rows, own.T, beta=kept, alpha=kept, out=result[:, t])
        return result


class Linear:
    """A linear layer with its weight as [in, out]: a third of the time for few rows."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight = layer.weight.detach().t().to(dtype).contiguous()
        bias = self.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        self.bias = bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if x.dim() != 2:
            return x @ self.weight + self.bias
        return torch.addmm(self.bias, x, self.weight)


def convert_memory_format(module: nn.Module) -> nn.Module:
    """Store a module's weights the way inference on a CPU reads them; return the module.

    Convolutions with channels last take a third of the time, pooling included. What `steps` makes
    then shares its linear weights with the module.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.weight.data = layer.weight.data.t().contiguous().t()
        elif isinstance(layer, nn.Conv2d):
            # a copy: with one input channel, .contiguous() would see nothing to do
            last = torch.empty_like(layer.weight.data, memory_format=torch.channels_last)
            layer.weight.data = last.copy_(layer.weight.data)
    return module


def compile_for_inference(module: nn.Module, example: Tensor) -> Step:
    """Return a faster equivalent of a module in eval mode, or the module if it is not sequential.

    The two are compared on `example`, a batch of inputs.
    """
    flat = list(steps([leaf for _, leaf in leaves(module)], example.dtype))

    def run(x: Tensor) -> Tensor:
        for step in flat:
            x = step(x)
        return x

    if len(flat) < 2 or example.dtype != torch.float32:
        return module
    with torch.inference_mode():
        got, expected = run(example.clone()), module(example.clone())  # which both may overwrite
        close = torch.allclose(got, expected, rtol=1e-3, atol=1e-4)
    return run if close else module


def leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """List the modules inside nested `nn.Sequential`s, in order, with their full names."""
    if type(module) is not nn.Sequential or hooked(module):
        yield name, module
        return
    for child, inner in module._modules.items():  # noqa: SLF001  named_children() skips repetitions
        if inner is not None:
            yield from leaves(inner, f"{name}.{child}" if name else child)


def as_mask(leaf: nn.Module, dtype: torch.dtype = torch.float32) -> Mask | None:
    """Return the step of a module that draws noise, in which it computes; None: it draws none."""
    if type(leaf) is DropConnect and leaf.is_noisy and not leaf.matches_moments:
        return WeightMask(leaf, dtype)
    if isinstance(leaf, _DROPOUTS) and 0 < leaf.p < 1:
        return Mask(kept=1 / (1 - leaf.p))
    if isinstance(leaf, Elementwise) and leaf.is_noisy:
        mean = None if leaf.is_identity else leaf.law.mean
        return Mask(leaf.combine, mean, leaf.law.kept)
    return None


def scaled(noise: Tensor, kept: float) -> Tensor:
    """Turn a mask of bools into what is multiplied by; other noise is returned as it is."""
    if noise.dtype != torch.bool:
        return noise
    if is_gpu(noise.device):
        return noise * kept
    # NumPy multiplies bools by a number three times as fast as torch converts them
    return torch.from_numpy(np.multiply(noise.numpy(), np.float32(kept), dtype=np.float32))


def does_nothing(leaf: nn.Module) -> bool:
    """Say if a module is a dropout that is the identity in both modes."""
    if isinstance(leaf, Elementwise):
        return not leaf.is_noisy and leaf.is_identity
    return isinstance(leaf, _DROPOUTS) and leaf.p == 0


def steps(
    leaves: Sequence[nn.Module], dtype: torch.dtype, *, fresh: bool = False
) -> Iterator[Step]:
    """Turn modules in eval mode into steps that compute in `dtype`; layers of noise become `Mask`s.

    `fresh` says that the first step may overwrite its input.
    """
    for leaf in _fused(leaves):
        plain = not hooked(leaf)
        if mask := as_mask(leaf, dtype):
            yield mask
        elif type(leaf) is nn.Linear and plain:
            yield Linear(leaf, dtype)
        elif type(leaf) is nn.ReLU and plain:
            yield torch.relu_ if fresh else torch.relu
        elif type(leaf) is nn.Flatten and plain:
            yield partial(torch.flatten, start_dim=leaf.start_dim, end_dim=leaf.end_dim)
        elif not does_nothing(leaf) or not plain:
            kept = next(iter(leaf.parameters()), None)
            yield leaf if kept is None or kept.dtype == dtype else copy.deepcopy(leaf).to(dtype)
        fresh = plain and type(leaf) in (nn.Linear, nn.Conv1d, nn.Conv2d)


def _fused(leaves: Sequence[nn.Module]) -> Iterator[nn.Module]:
    remaining = list(leaves)
    while remaining:
        leaf = remaining.pop(0)
        fused = _fuse(leaf, remaining[0]) if remaining else None
        if fused is not None:
            remaining.pop(0)
        yield fused or leaf


def _fuse(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    batch_norm = isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.running_mean is not None
    if not batch_norm or hooked(layer) or hooked(norm):
        return None
    pair = (type(layer), type(norm))
    if pair in ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d)):
        fused: nn.Module = fuse_conv_bn_eval(layer, norm)  # type: ignore[type-var, arg-type]
        return convert_memory_format(fused)
    by_feature = norm.num_features == getattr(layer, "out_features", None)  # else by token
    if pair == (nn.Linear, nn.BatchNorm1d) and norm.affine and by_feature:
        return fuse_linear_bn_eval(layer, norm)  # type: ignore[type-var, arg-type]
    return None


def hooked(module: nn.Module) -> bool:
    """Say if calling the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001  no other way
