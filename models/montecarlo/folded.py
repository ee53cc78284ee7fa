"""The fast path of sequential networks: what is shared between samples is done once.

What comes before the first mask runs once. After it, samples and images make rows of one batch,
and a mask is shared by all images. That leaves three ways to the same figures (see `Folded.head`):

- dense: multiply by the masks, then one product over T x B rows. For anything that maps rows.
- active: an image at a time, over the units that are not zero in it. ReLU leaves most at zero, and
  a unit at zero is zero in every thinned network. For few images.
- thinned: the thinned networks themselves, with weights only for the units that they keep. Of the
  first layer even less: dropped units are subtracted from what the whole layer gives, which is the
  same for all samples, and with p up to one half they are the fewer. For many images.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.dropout import InvertedDropout, SpatialDropout
from models.montecarlo.scales import Scales
from models.montecarlo.sites import Site
from models.montecarlo.thinned import Layer, Step, Thinned

Way = Callable[[Tensor, Scales], Tensor]
"""`(what the prefix gave [B, ...], masks) -> logits [B, T, C]`."""

_TILE = 2**18
"""Elements of a tile's widest intermediate result: 1 MiB of float32, to stay in the cache."""

_CALL = 2**20
"""What an image costs the active way besides its products, in multiply-adds: some 50 us."""

_ELEMENTWISE = (nn.Dropout, InvertedDropout)
_DROPOUTS = (*_ELEMENTWISE, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, SpatialDropout)
"""Modules that multiply by a mask in train mode and do nothing in eval mode."""

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)
"""Modules that treat every number alike, however the numbers lie."""


class Folded:
    """A sequential module, cut at its first dropout.

    Args:
        leaves: its modules, in eval mode, in order; one of them is a dropout.
        dtype: of the head's weights and rows.
    """

    def __init__(self, leaves: Sequence[nn.Module], dtype: torch.dtype = torch.float32) -> None:
        cut = next(i for i, leaf in enumerate(leaves) if _is_mask(leaf))
        self._dtype = dtype
        self._prefix = list(_steps(leaves[:cut], torch.float32))
        self._rest = list(_steps(leaves[cut + 1 :], dtype))
        self._layers = _layers(leaves[cut:]) if dtype == torch.float32 else None

    @classmethod
    def of(
        cls, module: nn.Module, sites: Sequence[Site], dtype: torch.dtype = torch.float32
    ) -> "Folded | None":
        """Fold a module of nested `nn.Sequential`s whose every mask is a dropout module among them.

        Args:
            module: in eval mode.
            sites: what `survey` found in it.
            dtype: of the head's weights and rows.

        Returns:
            None where the module is of another form.
        """
        named = list(_leaves(module))
        masks = [name for name, leaf in named if _is_mask(leaf)]
        plain = all(site.batch_dim == 0 and site.template[0] == 1 for site in sites)
        plain &= all(p.dtype == torch.float32 for p in module.parameters())
        if not plain or masks != [site.name for site in sites]:
            return None
        return cls([leaf for _, leaf in named], dtype)

    def prefix(self, x: Tensor) -> Tensor:
        """Run what comes before the first mask: [B, ...] to [B, ...]."""
        for step in self._prefix:
            x = step(x)
        return x

    def head(self, h: Tensor, scales: Scales) -> Tensor:
        """Run the rest under T masks, the cheapest way: [B, ...] to logits [B, T, C]."""
        h = h.to(self._dtype)
        _, way = min(self.ways(h, scales), key=lambda pair: pair[0])
        return way(h, scales)

    def ways(self, h: Tensor, scales: Scales) -> list[tuple[float, Way]]:
        """List the ways to run the head, each with its cost: multiply-adds and a price on calls."""
        if self._layers is None or h.is_cuda:  # a device that is fast once it has enough to do
            return [(0, self._dense)]
        images, units = h.shape
        width = self._layers[0].weight.shape[1]
        if scales.thinned is None:
            scales.thinned = Thinned(self._layers, scales)
        return [
            (scales.samples * images * units * width, self._dense),
            (scales.samples * int(h.count_nonzero()) * width + images * _CALL, self._active),
            (scales.thinned.cost(images), scales.thinned),
        ]

    def _dense(self, h: Tensor, scales: Scales) -> Tensor:
        tile = max(1, _TILE // max(1, h.numel()))
        logits = []
        for start in range(0, scales.samples, tile):
            first, *others = (factor[start : start + tile] for factor in scales.factors)
            rows = (h.unsqueeze(1) * first.squeeze(1)).flatten(0, 1)
            logits.append(_rows(self._rest, rows, others, len(h)))
        return torch.cat(logits, 1)

    def _active(self, h: Tensor, scales: Scales) -> Tensor:
        linear, *rest = self._rest
        if not isinstance(linear, _Linear):
            raise TypeError(linear)
        by_unit = scales.by_unit
        tile = max(1, _TILE // (scales.samples * len(linear.bias)))
        logits = []
        for images in torch.split(h, tile):
            rows = h.new_empty(len(images), scales.samples, len(linear.bias))
            for image, out in zip(images, rows, strict=True):
                units = image.nonzero().squeeze(1)
                kept = by_unit.index_select(0, units)
                kept.mul_(image.index_select(0, units).unsqueeze(1))
                torch.addmm(linear.bias, kept.t(), linear.weight.index_select(0, units), out=out)
            logits.append(_rows(rest, rows.flatten(0, 1), scales.factors[1:], len(images)))
        return torch.cat(logits)


class _Linear:
    """A linear layer whose weight lies [in, out]: products of few rows take a third of the time."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight = layer.weight.detach().t().to(dtype).contiguous()
        bias = self.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        self.bias = bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return x @ self.weight + self.bias
        return torch.addmm(self.bias, x, self.weight)


def _mask(x: Tensor) -> Tensor:
    """Stand for a mask in a list of steps."""
    raise AssertionError(x)


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """List what is inside nested `nn.Sequential`s, in order, with its full name."""
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for child, inner in module._modules.items():  # noqa: SLF001  named_children() skips repetitions
        if inner is not None:
            yield from _leaves(inner, f"{name}.{child}" if name else child)


def _is_mask(leaf: nn.Module) -> bool:
    return isinstance(leaf, _DROPOUTS) and leaf.p > 0


def _steps(leaves: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[Step]:
    """Turn modules into what runs them; a ReLU overwrites what a linear layer has just made."""
    fresh = False
    for leaf in leaves:
        if _is_mask(leaf):
            yield _mask
        elif type(leaf) is nn.Linear:
            yield _Linear(leaf, dtype)
        elif type(leaf) is nn.ReLU and fresh:
            yield torch.relu_
        elif not isinstance(leaf, _DROPOUTS):
            yield leaf if dtype == torch.float32 else copy.deepcopy(leaf).to(dtype)
        fresh = type(leaf) is nn.Linear


def _rows(steps: Sequence[Step], rows: Tensor, factors: Sequence[Tensor], images: int) -> Tensor:
    """Run steps over rows [images * T, ...] with masks [T, 1, ...]: logits [images, T, C]."""
    remaining = iter(factors)
    for step in steps:
        if step is _mask:
            grid = rows.view(images, -1, *rows.shape[1:])
            rows = (grid * next(remaining).squeeze(1)).flatten(0, 1)
        else:
            rows = step(rows)
    return rows.view(images, -1, *rows.shape[1:])


def _layers(leaves: Sequence[nn.Module]) -> list[Layer] | None:
    """See modules, the first a mask, as linear layers with masks between them, if they are."""
    found: list[Layer] = []
    for leaf in leaves[1:]:
        if type(leaf) is nn.Linear:
            linear = _Linear(leaf, torch.float32)
            found.append(Layer(linear.weight, linear.bias, [], masked=False))
        elif not found or found[-1].masked:
            return None
        elif isinstance(leaf, _ELEMENTWISE) and leaf.p > 0:
            found[-1] = replace(found[-1], masked=True)
        elif isinstance(leaf, _ACTIVATIONS):
            found[-1].activations.append(leaf)
        elif not isinstance(leaf, _DROPOUTS):
            return None
    if type(leaves[0]) not in _ELEMENTWISE or not found:
        return None
    return None if found[-1].masked or found[-1].activations else found
