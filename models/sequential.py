"""Sequential networks in eval mode as a list of steps: about half the time on a CPU.

The results are the same to rounding. Batch normalisation is fused into the layer before it, ReLU
overwrites what a linear layer has just made, and weights are stored as products of few rows read
them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dropserve.models.dropout import InvertedDropout, SpatialDropout

Step = Callable[[Tensor], Tensor]

ELEMENTWISE = (nn.Dropout, InvertedDropout)
DROPOUTS = (*ELEMENTWISE, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, SpatialDropout)
"""Modules that multiply by a mask in train mode and do nothing in eval mode."""


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


def is_mask(leaf: nn.Module) -> bool:
    """Say if a module drops units in train mode."""
    return isinstance(leaf, DROPOUTS) and leaf.p > 0


def mask(x: Tensor) -> Tensor:
    """Mark a dropout in a list of steps: in eval mode, the identity."""
    return x


def steps(
    leaves: Sequence[nn.Module], dtype: torch.dtype, *, fresh: bool = False
) -> Iterator[Step]:
    """Turn modules in eval mode into steps that compute in `dtype`; each dropout becomes `mask`.

    `fresh` says that the first step may overwrite its input.
    """
    for leaf in _fused(leaves):
        plain = not hooked(leaf)
        if is_mask(leaf):
            yield mask
        elif type(leaf) is nn.Linear and plain:
            yield Linear(leaf, dtype)
        elif type(leaf) is nn.ReLU and plain:
            yield torch.relu_ if fresh else torch.relu
        elif type(leaf) is nn.Flatten and plain:
            yield partial(torch.flatten, start_dim=leaf.start_dim, end_dim=leaf.end_dim)
        elif not isinstance(leaf, DROPOUTS) or not plain:
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
