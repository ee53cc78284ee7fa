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
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dropserve.models.montecarlo.scales import ScaledMasks
from dropserve.models.montecarlo.sites import Survey
from dropserve.models.montecarlo.thinned import Layer, Thinned
from dropserve.models.sequential import (
    DROPOUTS,
    ELEMENTWISE,
    Linear,
    Step,
    hooked,
    is_mask,
    leaves,
    mask,
    steps,
)

Way = Callable[[Tensor, ScaledMasks], Tensor]
"""`(what the prefix gave [B, ...], masks) -> logits [B, T, C]`."""

_ROWS = 2**20
"""Elements of the widest result that the dense way holds at once: 4 MiB of float32, or what one
sample of all images takes. A quarter of it takes up to a third longer for convolutions."""

_TILE = 2**18
"""Elements that the active way holds at once: 1 MiB of float32, or what one image takes."""

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
        widest: elements in the widest result of one image that depends on masks.
        dtype: of the head's weights and rows.
    """

    def __init__(
        self, leaves: Sequence[nn.Module], widest: int, dtype: torch.dtype = torch.float32
    ) -> None:
        cut = next(i for i, leaf in enumerate(leaves) if is_mask(leaf))
        self._dtype = dtype
        self._widest = widest
        self._overwrites = any(_may_overwrite(leaf) for leaf in leaves[:cut])
        self._prefix = list(steps(leaves[:cut], torch.float32))
        self._rest = list(steps(leaves[cut + 1 :], dtype))
        self._layers = _layers(leaves[cut:]) if dtype == torch.float32 else None

    @classmethod
    def of(
        cls, module: nn.Module, found: Survey, dtype: torch.dtype = torch.float32
    ) -> "Folded | None":
        """Fold a module of nested `nn.Sequential`s whose every mask is a dropout module among them.

        Args:
            module: in eval mode.
            found: what `trace` saw of it.
            dtype: of the head's weights and rows.

        Returns:
            None where the module is of another form.
        """
        named = list(leaves(module))
        masks = [name for name, leaf in named if is_mask(leaf)]
        plain = all(site.batch_dim == 0 and site.template[0] == 1 for site in found.sites)
        plain &= all(p.dtype == torch.float32 for p in module.parameters())
        if not plain or masks != [site.name for site in found.sites]:
            return None
        return cls([leaf for _, leaf in named], found.widest, dtype)

    def prefix(self, x: Tensor) -> Tensor:
        """Run what comes before the first mask: [B, ...] to [B, ...]."""
        if self._overwrites:
            x = x.clone()
        for step in self._prefix:
            x = step(x)
        return x

    def head(self, h: Tensor, scales: ScaledMasks) -> Tensor:
        """Run the rest under T masks, the cheapest way: [B, ...] to logits [B, T, C]."""
        h = h.to(self._dtype)
        _, way = min(self.ways(h, scales), key=lambda pair: pair[0])
        return way(h, scales)

    def ways(self, h: Tensor, scales: ScaledMasks) -> list[tuple[float, Way]]:
        """List the ways to run the head, each with its cost: multiply-adds and a price on calls."""
        if self._layers is None or h.is_cuda:  # a device that is fast once it has enough to do
            return [(0, self._dense)]
        images, units = h.shape
        first, samples, whole = self._layers[0], scales.samples, scales.whole
        width = len(first.bias)
        thinned = whole.thinned = whole.thinned or Thinned(self._layers, whole)
        active = _most_active(h.numpy())
        touched = samples * width + 2 * _TOUCH * (samples + width)  # read here, written there
        return [
            (samples * images * units * (width + _TOUCH), self._dense),
            (images * active * touched + (images + 2) * _CALL, partial(self._active, first)),
            (thinned.cost(images, scales), thinned),
        ]

    def _dense(self, h: Tensor, scales: ScaledMasks) -> Tensor:
        tile = max(1, _ROWS // max(1, len(h) * self._widest))
        logits = []
        for start in range(0, scales.samples, tile):
            first, *others = scales.by_row
            if tile < scales.samples:
                first, *others = (factor[start : start + tile] for factor in scales.by_row)
            rows = (h.unsqueeze(1) * first.to(h.dtype)).flatten(0, 1)
            logits.append(_rows(self._rest, rows, others, (h.shape[0], first.shape[0])))
        return torch.cat(logits, 1) if len(logits) > 1 else logits[0]

    def _active(self, first: Layer, h: Tensor, scales: ScaledMasks) -> Tensor:
        units = torch.from_numpy(_active_units(h.numpy()))
        samples, width = scales.samples, len(first.bias)
        widest = max(samples * width, units.shape[1] * (samples + width))
        tile = max(1, _TILE // max(1, widest))
        if tile >= len(h):
            return self._active_tile(first, h, units, scales)
        tiles = zip(torch.split(h, tile), torch.split(units, tile), strict=True)
        return torch.cat([self._active_tile(first, *pair, scales) for pair in tiles])

    def _active_tile(self, first: Layer, h: Tensor, units: Tensor, scales: ScaledMasks) -> Tensor:
        """Run images [B, units] over those of their units that `units` [B, n] lists."""
        listed = units.flatten()
        kept = scales.by_unit.index_select(0, listed).view(*units.shape, scales.samples)
        kept.mul_(h.gather(1, units).unsqueeze(2))
        right = first.weight.index_select(0, listed).view(*units.shape, len(first.bias))
        if len(h) > 1:
            rows = torch.bmm(kept.transpose(1, 2), right).add_(first.bias).flatten(0, 1)
        else:
            rows = torch.addmm(first.bias, kept[0].t(), right[0])
        return _rows(self._rest[1:], rows, scales.by_row[1:], (len(h), scales.samples))


def _may_overwrite(leaf: nn.Module) -> bool:
    """Say if a module may change its input: torch's own do where they are told to."""
    return any(
        getattr(part, "inplace", False)
        or hooked(part)
        or not type(part).__module__.startswith("torch.nn.")
        for part in leaf.modules()
    )


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
        if hooked(leaf):
            return None
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
