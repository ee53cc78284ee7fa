"""Thinned networks as networks of their own, smaller than the one they are cut from.

Srivastava et al. (2014), section 1: dropout samples one of 2^n thinned networks. Where a mask is
shared by a batch of images, that can be taken literally: a layer's weight is cut down to the units
that are kept on both its sides, and what a mask would set to zero is never computed. At p = 1/2 on
both sides that leaves a quarter.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dropserve.models.montecarlo.scales import ScaledMasks
from dropserve.models.montecarlo.sites import Site
from dropserve.models.sequential import Step

_GROUP = 20
"""Samples run together, cut to the size of the largest of them."""

_IMAGES = 64
"""Images run together."""

_READ = 40
"""What reading a weight costs, in multiply-adds."""

_MULTIPLY = 1.5
"""What a weight costs an image, in multiply-adds: itself, and what is gathered for it."""

_CUT = 150
"""What cutting out one weight costs, in multiply-adds."""

_MAX_WEIGHTS = 2**23
"""Most weights of all thinned networks together: 32 MiB."""


@dataclass(frozen=True)
class Layer:
    """A linear layer and what follows it.

    Attributes:
        weight: [in, out].
        bias: [out].
        activations: element by element.
        masked: whether a mask follows.
    """

    weight: Tensor
    bias: Tensor
    activations: list[Step]
    masked: bool


@dataclass(frozen=True)
class _Cut:
    """A layer of some thinned networks: weight [t, out, in] and bias [t, out, 1]."""

    weight: Tensor
    bias: Tensor
    activations: list[Step]


@dataclass(frozen=True)
class _Group:
    """Some thinned networks.

    Attributes:
        inputs: [t, in], units that the first layer's cut reads; one past the last for none.
        outputs: [t, out], units that it makes.
        cuts: the layers.
    """

    inputs: Tensor
    outputs: Tensor
    cuts: list[_Cut]

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        cut = sum(c.weight.nbytes + c.bias.nbytes for c in self.cuts)
        return self.inputs.nbytes + self.outputs.nbytes + cut

    def head(self, samples: int) -> "_Group":
        """Return the first of them."""
        cuts = [replace(c, weight=c.weight[:samples], bias=c.bias[:samples]) for c in self.cuts]
        return _Group(self.inputs[:samples], self.outputs[:samples], cuts)


class Thinned:
    """Thinned networks of linear layers; the first layer's inputs are masked.

    Args:
        layers: of the network that they are cut from.
        scales: the masks.
    """

    def __init__(self, layers: Sequence[Layer], scales: ScaledMasks) -> None:
        self._layers = layers
        self._groups: list[_Group] = []
        self._lock = threading.Lock()
        first = scales.sites[0]
        self._complement = first.p <= 0.5
        self._survivor = first.survivor
        self._weights = _weights_a_sample(layers, scales.sites)

    @property
    def nbytes(self) -> int:
        """Memory that they take, as far as they are cut out."""
        return sum(group.nbytes for group in self._groups)

    def cost(self, images: int, scales: ScaledMasks) -> float:
        """Estimate the multiply-adds for some images; infinite if there are too many weights.

        Cutting counts even if it is done, but for masks that stay: the same images and seed go the
        same way every time.
        """
        if self._weights * scales.samples > _MAX_WEIGHTS:
            return float("inf")
        cutting = 0 if scales.whole.pinned else _CUT
        return self._weights * scales.samples * (_READ + _MULTIPLY * images + cutting)

    def __call__(self, h: Tensor, scales: ScaledMasks) -> Tensor:
        """Run what comes after the first mask: [B, units] to logits [B, T, C].

        Args:
            h: what the first mask is put on.
            scales: the masks, or the first of them.
        """
        groups = self._first(scales.samples, scales.whole)
        logits = [self._run(groups, images) for images in torch.split(h, _IMAGES)]
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _first(self, samples: int, scales: ScaledMasks) -> list[_Group]:
        """Return the networks of the first samples; cut out those that no one asked for before."""
        whole, rest = divmod(samples, _GROUP)
        with self._lock:
            for i in range(len(self._groups), whole + (rest > 0)):
                self._groups.append(self._cut(scales, slice(_GROUP * i, _GROUP * (i + 1))))
        groups = self._groups[:whole]
        if rest:
            groups = [*groups, self._groups[whole].head(rest)]
        return groups

    def _run(self, groups: Sequence[_Group], h: Tensor) -> Tensor:
        images = len(h)
        columns = _with_nothing(h.t())
        first = self._layers[0]
        whole = None
        if self._complement:
            whole = h.new_zeros(len(first.bias) + 1, images)
            torch.addmm(
                first.bias.unsqueeze(1),
                first.weight.t(),
                columns[:-1],
                alpha=self._survivor,
                out=whole[:-1],
            )
        logits = []
        for group in groups:
            read = columns.index_select(0, group.inputs.flatten())
            read = read.view(*group.inputs.shape, images)
            cut, *others = group.cuts
            if whole is None:
                y = torch.baddbmm(cut.bias, cut.weight, read)
            else:
                y = whole.index_select(0, group.outputs.flatten())
                y = y.view(*group.outputs.shape, images).baddbmm_(cut.weight, read)
            y = _activate(y, cut)
            for layer in others:
                y = _activate(torch.baddbmm(layer.bias, layer.weight, y), layer)
            logits.append(y)
        return torch.cat(logits).permute(2, 0, 1)

    def _cut(self, scales: ScaledMasks, samples: slice) -> _Group:
        """Cut the networks of some samples out."""
        first, *others = (factor[samples].flatten(1) for factor in scales.factors)
        masks = iter(others)
        survivors = iter([site.survivor for site in scales.sites[1:]])
        inputs = read = _chosen((first == 0) == self._complement)
        factor = -self._survivor if self._complement else self._survivor
        cuts, makes = [], []
        for layer in self._layers:
            if layer.masked:
                made = _chosen(next(masks) != 0)
            else:
                made = torch.arange(len(layer.bias), device=read.device).expand(len(read), -1)
            weight = _with_nothing(_with_nothing(layer.weight).t()).t().mul(factor).contiguous()
            one_by_one = [
                weight.index_select(0, rows).index_select(1, columns)
                for rows, columns in zip(read, made, strict=True)
            ]
            bias = _with_nothing(layer.bias)[made].unsqueeze(2)
            cuts.append(_Cut(torch.stack(one_by_one).transpose(1, 2), bias, layer.activations))
            makes.append(made)
            read = made
            factor = next(survivors) if layer.masked else 1.0
        return _Group(inputs, makes[0], cuts)


def _activate(y: Tensor, layer: _Cut) -> Tensor:
    for activation in layer.activations:
        y = activation(y)
    return y


def _weights_a_sample(layers: Sequence[Layer], sites: Sequence[Site]) -> float:
    """Count the weights of a thinned network, on average over masks."""
    rates = iter([site.p for site in sites])
    p = next(rates)
    inputs, total = min(p, 1 - p), 0.0
    for layer in layers:
        outputs = 1 - next(rates) if layer.masked else 1.0
        total += inputs * outputs * layer.weight.numel()
        inputs = outputs
    return total


def _chosen(which: Tensor) -> Tensor:
    """List the units that are True in each row of [t, units], filled up with one past the last."""
    counts = which.sum(1)
    order = which.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(counts.max())]
    place = torch.arange(order.shape[1], device=which.device)
    return order.masked_fill(place >= counts.unsqueeze(1), which.shape[1])


def _with_nothing(x: Tensor) -> Tensor:
    """Append a row of zeros: what index `len(x)` reads."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
