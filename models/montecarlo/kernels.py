"""The fast path of sequential networks: what is shared between samples is done once.

What comes before the first mask runs once. After it, a mask is shared by all images. That leaves
three kernels for the same figures, of which `Kernels.run` takes the cheapest:

- dense: samples and images make rows of one batch; multiply by the masks, then one product over
  T x B rows. For anything that maps rows.
- active: only the units that are not zero in an image. ReLU leaves most at zero, and a unit at zero
  is zero in every thinned network. For few images.
- thinned: dropout samples one of 2^n thinned networks (Srivastava et al., 2014, section 1). Their
  weights are gathered: those between units that are kept on both sides of a layer, at p = 1/2 a
  quarter. Of the first layer even less: dropped units are subtracted from what the whole layer
  gives, which is the same for all samples, and with p up to one half they are the fewer. For many
  images.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropserve.models.device import is_gpu, tile
from dropserve.models.montecarlo.scaled_masks import ScaledMasks
from dropserve.models.montecarlo.sites import Trace
from dropserve.models.regularizers import Bernoulli
from dropserve.models.sequential import (
    Linear,
    Mask,
    Step,
    as_mask,
    does_nothing,
    hooked,
    leaves,
    steps,
)

Kernel = Callable[[Tensor, ScaledMasks], Tensor]
"""`(what the prefix gave [B, ...], masks) -> logits [B, T, C]`."""

_ROWS = 2**20
"""Elements of the widest result that the dense kernel holds at once: 4 MiB of float32, or what one
sample of all images takes. A quarter of it takes up to a third longer for convolutions."""

_TILE = 2**18  # elements that the active kernel holds at once, or what one image takes
_GROUP = 20  # thinned networks run together, padded to the size of the largest of them
_IMAGES = 64  # images that thinned networks are run on together
_COLUMNS = 16  # fewest images of a product: with fewer it takes three times as long
_MAX_WEIGHTS = 2**23  # of all thinned networks together: 32 MiB

# Costs in multiply-adds:
_CALL = 3 * 2**19  # of an image to the active kernel besides its products: some 30 us
_TOUCH = 20  # of reading or writing a number outside of a product
_READ = 40  # of reading a weight of a thinned network
_MULTIPLY = 1.5  # of such a weight for an image: itself, and what is gathered for it
_GATHER = 150  # of gathering such a weight

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)
"""Elementwise modules, which accept any memory layout."""


@dataclass(frozen=True)
class _Layer:
    """A linear layer, weight [in, out], and what follows it: activations, and perhaps a mask."""

    weight: Tensor
    bias: Tensor
    activations: list[Step]
    masked: bool = False

    def activate(self, y: Tensor) -> Tensor:
        for activation in self.activations:
            y = activation(y)
        return y


class Kernels:
    """A sequential module, cut at its first dropout; weights and rows after it are of `dtype`."""

    def __init__(self, leaves: Sequence[nn.Module], found: Trace, dtype: torch.dtype) -> None:
        masks = ((i, as_mask(leaf, dtype)) for i, leaf in enumerate(leaves))
        cut, self._first = next((i, mask) for i, mask in masks if mask is not None)
        self._dtype = dtype
        self._widest = found.widest
        self._overwrites = any(_may_overwrite(leaf) for leaf in leaves[:cut])
        self._prefix = list(steps(leaves[:cut], torch.float32))
        self._rest = list(steps(leaves[cut + 1 :], dtype))
        self._layers = _layers(leaves[cut:]) if dtype == torch.float32 else []
        laws = [site.law for site in found.sites]
        rates = [law.p for law in laws if isinstance(law, Bernoulli)]
        self._drops = len(rates) == len(laws)  # units, at every site
        self._survivors = [law.kept for law in laws if isinstance(law, Bernoulli)]
        self._complement = self._drops and rates[0] <= 0.5
        self._thinned_weights = _thinned_weights(self._layers, rates) if self._drops else 0.0
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, module: nn.Module, found: Trace, dtype: torch.dtype = torch.float32
    ) -> "Kernels | None":
        """Take a module in eval mode if it is nested `nn.Sequential`s, every mask among them."""
        named = list(leaves(module))
        masks = [name for name, leaf in named if as_mask(leaf)]
        plain = all(site.batch_dim in (0, None) and site.template[0] == 1 for site in found.sites)
        plain &= all(p.dtype == torch.float32 for p in module.parameters())
        if not plain or masks != [site.module for site in found.sites]:
            return None
        return cls([leaf for _, leaf in named], found, dtype)

    def prefix(self, x: Tensor) -> Tensor:
        """Run what comes before the first mask: [B, ...] to [B, ...]."""
        if self._overwrites:
            x = x.clone()
        for step in self._prefix:
            x = step(x)
        return x

    def run(self, h: Tensor, masks: ScaledMasks) -> Tensor:
        """Run the rest under T masks by the cheapest kernel: [B, ...] to logits [B, T, C]."""
        h = h.to(self._dtype)
        _, kernel = min(self.choices(h, masks), key=lambda pair: pair[0])
        return kernel(h, masks)

    def choices(self, h: Tensor, masks: ScaledMasks) -> list[tuple[float, Kernel]]:
        """List the kernels with their costs, so that the same request takes the same every time.

        Gathering weights counts even if it is done, but for masks that are pinned.
        """
        if not self._layers or is_gpu(h.device):  # fast once it has enough to do
            return [(0, self._dense)]
        images, units = h.shape
        samples, width = masks.samples, len(self._layers[0].bias)
        touched = samples * width + 2 * _TOUCH * (samples + width)  # read here, written there
        weights = self._thinned_weights * samples
        gathering = 0 if masks.parent.pinned else _GATHER
        thinned = weights * (_READ + _MULTIPLY * max(images, _COLUMNS) + gathering)
        choices: list[tuple[float, Kernel]] = [
            (samples * images * units * (width + _TOUCH), self._dense),
            (images * _most_active(h.numpy()) * touched + (images + 2) * _CALL, self._active),
        ]
        if self._drops:
            choices.append((thinned if weights <= _MAX_WEIGHTS else float("inf"), self._thinned))
        return choices

    def _dense(self, h: Tensor, masks: ScaledMasks) -> Tensor:
        step = max(1, tile(h.device, _ROWS) // max(1, len(h) * self._widest))
        logits, steps, after = list[Tensor](), self._rest, None
        if self._first.combine is torch.add and isinstance(steps[0], Linear):
            after, *steps = steps
        for start in range(0, masks.samples, step):
            some = slice(start, start + step)
            first, *others = (noise[some].squeeze(1) for noise in masks.drawn)
            if isinstance(after, Linear):  # (h + noise) W = h W + noise W: products of few rows
                made = after(h).unsqueeze(1) + first.to(h.dtype) @ after.weight
            else:
                made = self._first.sample(h.unsqueeze(1), first)
            rows, grid = made.flatten(0, 1), (len(h), len(first))
            logits.append(_run_rows(steps, rows, others, grid))
        return torch.cat(logits, 1) if len(logits) > 1 else logits[0]

    def _active(self, h: Tensor, masks: ScaledMasks) -> Tensor:
        units = torch.from_numpy(_active_units(h.numpy()))
        first, samples = self._layers[0], masks.samples
        width = len(first.bias)
        most = max(1, _TILE // max(1, samples * width, units.shape[1] * (samples + width)))
        tiles = [(h, units)]
        if most < len(h):
            tiles = [*zip(torch.split(h, most), torch.split(units, most), strict=True)]
        logits = []
        for some, listed in tiles:
            images, flat = len(some), listed.flatten()
            kept = masks.factors[0].view(samples, -1).index_select(1, flat)
            kept = kept.view(samples, images, -1).mul_(some.gather(1, listed))
            right = first.weight.index_select(0, flat).view(images, -1, width)
            if images > 1:
                rows = torch.bmm(kept.transpose(0, 1), right).add_(first.bias).flatten(0, 1)
            else:
                rows = torch.addmm(first.bias, kept.squeeze(1), right.squeeze(0))
            others = [factor.squeeze(1) for factor in masks.factors[1:]]
            logits.append(_run_rows(self._rest[1:], rows, others, (images, samples)))
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _thinned(self, h: Tensor, masks: ScaledMasks) -> Tensor:
        parent = masks.parent
        with self._lock:
            for start in range(len(parent.thinned) * _GROUP, masks.samples, _GROUP):
                parent.thinned.append(self._gather(parent, slice(start, start + _GROUP)))
        whole, rest = divmod(masks.samples, _GROUP)
        groups = parent.thinned[:whole]
        if rest:
            groups.append(tuple(tensor[:rest] for tensor in parent.thinned[whole]))
        logits = [self._run_thinned(images, groups) for images in torch.split(h, _IMAGES)]
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _run_thinned(self, h: Tensor, groups: Iterable[tuple[Tensor, ...]]) -> Tensor:
        asked, first, whole = len(h), self._layers[0], None
        h = F.pad(h, (0, 0, 0, max(0, _COLUMNS - asked)))
        images = len(h)
        columns = _with_zeros(h.t())
        if self._complement:
            whole = h.new_zeros(len(first.bias) + 1, images)
            bias, alpha = first.bias.unsqueeze(1), self._survivors[0]
            torch.addmm(bias, first.weight.t(), columns[:-1], alpha=alpha, out=whole[:-1])
        logits = []
        for inputs, outputs, *tensors in groups:
            y = columns.index_select(0, inputs.flatten()).view(*inputs.shape, images)
            weights_and_biases = zip(tensors[::2], tensors[1::2], strict=True)
            for layer, (weight, bias) in zip(self._layers, weights_and_biases, strict=True):
                if layer is first and whole is not None:
                    made = whole.index_select(0, outputs.flatten())
                    y = made.view(*outputs.shape, images).baddbmm_(weight, y)
                else:
                    y = torch.baddbmm(bias, weight, y)
                y = layer.activate(y)
            logits.append(y)
        return torch.cat(logits)[..., :asked].permute(2, 0, 1)

    def _gather(self, masks: ScaledMasks, samples: slice) -> tuple[Tensor, ...]:
        """Gather the thinned networks of t samples.

        Returns inputs [t, in], the units that the first layer reads, one past the last for none;
        outputs [t, out], those that it makes; and weight [t, out, in], bias [t, out, 1] a layer.
        """
        first, *others = (factor[samples].flatten(1) for factor in masks.factors)
        following = zip(others, self._survivors[1:], strict=True)
        read = _list_units((first == 0) == self._complement)
        factor = self._survivors[0] * (-1 if self._complement else 1)
        units, tensors = [read], []
        for layer in self._layers:
            made, survivor = torch.arange(len(layer.bias)).expand(len(read), -1), 1.0
            if layer.masked:
                following_mask, survivor = next(following)
                made = _list_units(following_mask != 0)
            weight = _with_zeros(_with_zeros(layer.weight).t()).t().mul(factor).contiguous()
            gathered = [
                weight.index_select(0, rows).index_select(1, columns)
                for rows, columns in zip(read, made, strict=True)
            ]
            tensors += [torch.stack(gathered).transpose(1, 2), _with_zeros(layer.bias)[made, None]]
            units.append(made)
            read, factor = made, survivor
        return *units[:2], *tensors


def _run_rows(
    steps: Iterable[Step], rows: Tensor, factors: Iterable[Tensor], grid: tuple[int, int]
) -> Tensor:
    """Run steps over rows [B * T, ...], (B, T) = `grid`, with masks [T, ...]: [B, T, C]."""
    remaining, fresh = iter(factors), True
    for step in steps:
        if isinstance(step, Mask):
            shaped = rows.view(*grid, *rows.shape[1:])
            rows = step.sample(shaped, next(remaining), fresh=fresh).flatten(0, 1)
        else:
            rows = step(rows)
        fresh = step is torch.relu_ or isinstance(step, Linear | Mask)
    return rows.view(*grid, *rows.shape[1:])


def _layers(leaves: Sequence[nn.Module]) -> list[_Layer]:
    """Group modules, the first a mask, as linear layers with masks between; [] if they differ."""
    found: list[_Layer] = []
    for leaf in leaves[1:]:
        mask = as_mask(leaf)
        if hooked(leaf):
            return []
        if type(leaf) is nn.Linear:
            linear = Linear(leaf, torch.float32)
            found.append(_Layer(linear.weight, linear.bias, []))
        elif not found or found[-1].masked:
            return []
        elif mask is not None and _multiplies(mask):
            found[-1] = replace(found[-1], masked=True)
        elif isinstance(leaf, _ACTIVATIONS):
            found[-1].activations.extend(steps([leaf], torch.float32, fresh=True))
        elif not does_nothing(leaf):
            return []
    first = as_mask(leaves[0])
    if first is None or not _multiplies(first) or not found:
        return []
    return [] if found[-1].masked or found[-1].activations else found


def _multiplies(mask: Mask) -> bool:
    """Say if a unit at zero stays at zero."""
    return type(mask) is Mask and mask.combine is torch.mul


def _may_overwrite(leaf: nn.Module) -> bool:
    """Say if a module may change its input: torch's own do with `inplace=True`."""
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
    """Count the units that are not zero in the image that has most of them."""
    return int(np.count_nonzero(h, axis=1).max(initial=0))


def _thinned_weights(layers: Iterable[_Layer], dropped: Iterable[float]) -> float:
    """Count the weights of a thinned network, on average over masks of such rates."""
    rates = iter(dropped)
    p = next(rates)
    inputs, total = min(p, 1 - p), 0.0
    for layer in layers:
        outputs = 1 - next(rates) if layer.masked else 1.0
        total += inputs * outputs * layer.weight.numel()
        inputs = outputs
    return total


def _list_units(which: Tensor) -> Tensor:
    """List the units that are True in each row of [t, units], filled up with one past the last."""
    counts = which.sum(1)
    order = which.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(counts.max())]
    place = torch.arange(order.shape[1], device=which.device)
    return order.masked_fill(place >= counts.unsqueeze(1), which.shape[1])


def _with_zeros(x: Tensor) -> Tensor:
    """Append a row of zeros: what index `len(x)` reads."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
