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

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.montecarlo.scales import Scales
from models.montecarlo.sites import Site
from models.montecarlo.thinned import Layer, Thinned
from models.sequential import DROPOUTS, ELEMENTWISE, Linear, Step, is_mask, leaves, mask, steps

Way = Callable[[Tensor, Scales], Tensor]
"""`(what the prefix gave [B, ...], masks) -> logits [B, T, C]`."""

_TILE = 2**18
"""Elements of a tile's widest intermediate result: 1 MiB of float32, to stay in the cache."""

_CALL = 3 * 2**19
"""What an image costs the active way besides its products, in multiply-adds: some 30 us."""

_TOUCH = 20
"""What reading or writing a number outside of a product costs, in multiply-adds."""

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)
"""Modules that treat every number alike, however the numbers lie."""


class Folded:
    """A sequential module, cut at its first dropout.

    Args:
        leaves: its modules, in eval mode, in order; one of them is a dropout.
        dtype: of the head's weights and rows.
    """

    def __init__(self, leaves: Sequence[nn.Module], dtype: torch.dtype = torch.float32) -> None:
        cut = next(i for i, leaf in enumerate(leaves) if is_mask(leaf))
        self._dtype = dtype
        self._overwrites = any(getattr(leaf, "inplace", False) for leaf in leaves[:cut])
        self._prefix = list(steps(leaves[:cut], torch.float32))
        self._rest = list(steps(leaves[cut + 1 :], dtype))
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
        named = list(leaves(module))
        masks = [name for name, leaf in named if is_mask(leaf)]
        plain = all(site.batch_dim == 0 and site.template[0] == 1 for site in sites)
        plain &= all(p.dtype == torch.float32 for p in module.parameters())
        if not plain or masks != [site.name for site in sites]:
            return None
        return cls([leaf for _, leaf in named], dtype)

    def prefix(self, x: Tensor) -> Tensor:
        """Run what comes before the first mask: [B, ...] to [B, ...]."""
        if self._overwrites:
            x = x.clone()
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
        samples, width = scales.samples, self._layers[0].weight.shape[1]
        whole = scales.whole
        thinned = whole.thinned = whole.thinned or Thinned(self._layers, whole)
        active = _most_active(h.numpy())
        touched = samples * width + 2 * _TOUCH * (samples + width)  # read here, written there
        return [
            (samples * images * units * (width + _TOUCH), self._dense),
            (images * active * touched + (images + 2) * _CALL, self._active),
            (thinned.cost(images, scales), thinned),
        ]

    def _dense(self, h: Tensor, scales: Scales) -> Tensor:
        tile = max(1, _TILE // max(1, h.numel()))
        logits = []
        for start in range(0, scales.samples, tile):
            first, *others = scales.by_row
            if tile < scales.samples:
                first, *others = (factor[start : start + tile] for factor in scales.by_row)
            rows = (h.unsqueeze(1) * first.to(h.dtype)).flatten(0, 1)
            logits.append(_rows(self._rest, rows, others, (h.shape[0], first.shape[0])))
        return torch.cat(logits, 1) if len(logits) > 1 else logits[0]

    def _active(self, h: Tensor, scales: Scales) -> Tensor:
        units = torch.from_numpy(_active_units(h.numpy()))
        samples, width = scales.samples, self._layers[0].weight.shape[1] if self._layers else 0
        widest = max(samples * width, units.shape[1] * (samples + width))
        tile = max(1, _TILE // max(1, widest))
        if tile >= len(h):
            return self._active_tile(h, units, scales)
        tiles = zip(torch.split(h, tile), torch.split(units, tile), strict=True)
        return torch.cat([self._active_tile(*pair, scales) for pair in tiles])

    def _active_tile(self, h: Tensor, units: Tensor, scales: Scales) -> Tensor:
        """Run images [B, units] over those of their units that `units` [B, n] lists."""
        linear, *rest = self._rest
        if not isinstance(linear, Linear):
            raise TypeError(linear)
        listed, n = units.flatten(), units.shape[1]
        kept = scales.by_unit.index_select(0, listed).view(-1, n, scales.samples)
        kept.mul_(h.gather(1, units).unsqueeze(2))
        right = linear.weight.index_select(0, listed).view(len(h), n, -1)
        if len(h) > 1:
            rows = torch.bmm(kept.transpose(1, 2), right).add_(linear.bias).flatten(0, 1)
        else:
            rows = torch.addmm(linear.bias, kept[0].t(), right[0])
        return _rows(rest, rows, scales.by_row[1:], (len(h), scales.samples))


def _active_units(h: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """List the units of each image that are not zero: [B, units] to [B, n].

    An image of fewer is filled up with units that are zero in it, and so change nothing.
    """
    if len(h) == 1:
        return np.flatnonzero(h)[None]
    order = (h == 0).view(np.uint8).argsort(axis=1, kind="stable")
    return np.ascontiguousarray(order[:, : _most_active(h)])


def _most_active(h: npt.NDArray[np.float32]) -> int:
    """Count the units [B, units] that are not zero, in the image that has most of them."""
    return int(np.count_nonzero(h, axis=1).max(initial=0))


def _rows(
    steps: Sequence[Step], rows: Tensor, factors: Sequence[Tensor], grid: tuple[int, int]
) -> Tensor:
    """Run steps over rows [B * T, ...], (B, T) = `grid`, with masks [T, ...]: [B, T, C].

    The rows may be overwritten.
    """
    remaining = iter(factors)
    ours = True
    for step in steps:
        if step is mask:
            shaped, factor = rows.view(*grid, *rows.shape[1:]), next(remaining).to(rows.dtype)
            rows = (shaped.mul_(factor) if ours else shaped * factor).flatten(0, 1)
        else:
            rows = step(rows)
        ours = step in (mask, torch.relu_) or isinstance(step, Linear)
    return rows.view(*grid, *rows.shape[1:])


def _layers(leaves: Sequence[nn.Module]) -> list[Layer] | None:
    """See modules, the first a mask, as linear layers with masks between them, if they are."""
    found: list[Layer] = []
    for leaf in leaves[1:]:
        if type(leaf) is nn.Linear:
            linear = Linear(leaf, torch.float32)
            found.append(Layer(linear.weight, linear.bias, [], masked=False))
        elif not found or found[-1].masked:
            return None
        elif isinstance(leaf, ELEMENTWISE) and leaf.p > 0:
            found[-1] = replace(found[-1], masked=True)
        elif isinstance(leaf, _ACTIVATIONS):
            found[-1].activations.extend(steps([leaf], torch.float32, fresh=True))
        elif not isinstance(leaf, DROPOUTS):
            return None
    if type(leaves[0]) not in ELEMENTWISE or not found:
        return None
    return None if found[-1].masked or found[-1].activations else found
