"""Masks as tensors, drawn when they are first needed and kept for the seeds used last."""

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dropserve.models.montecarlo import masks
from dropserve.models.montecarlo.masks import MaskKind
from dropserve.models.montecarlo.sites import Site

if TYPE_CHECKING:
    from dropserve.models.montecarlo.thinned import Thinned

_MAX_BYTES = 64 * 2**20
"""Most that a sampler keeps of masks, besides those drawn at load and those in use."""

_MAX_ELEMENTS = 2**22
"""Units of one chunk of samples: 16 MiB of float32."""

_Key = tuple[MaskKind, int, int, torch.device]

CHUNK = 100
"""Most samples run at once: whole blocks, a few milliseconds' work for a small network."""


class ScaledMasks:
    """What T thinned networks multiply by at each site.

    Args:
        sites: of the module.
        factors: for each site [T, *template]: zero where a unit is dropped, else `site.survivor`.
        whole: of which these are the first samples; None: of nothing larger.

    Attributes:
        samples: T.
        pinned: whether they stay, so that what is made of them once need not be made again.
        thinned: what the folded path makes of them.
    """

    def __init__(
        self, sites: Sequence[Site], factors: tuple[Tensor, ...], whole: "ScaledMasks | None" = None
    ) -> None:
        self.sites = sites
        self.factors = factors
        self.samples = factors[0].shape[0]
        self._whole = whole
        self.pinned = False
        self.thinned: Thinned | None = None
        self._heads: dict[int, ScaledMasks] = {}

    @property
    def whole(self) -> "ScaledMasks":
        """Itself, or what it is a part of: what is made of masks is made of these, and kept."""
        return self._whole or self

    @property
    def nbytes(self) -> int:
        """Memory that they take, with what was made of them."""
        derived = self.thinned.nbytes if self.thinned is not None else 0
        if "by_unit" in self.__dict__:
            derived += self.by_unit.nbytes
        return sum(factor.nbytes for factor in self.factors) + derived

    @cached_property
    def by_row(self) -> tuple[Tensor, ...]:
        """For each site whose batch dimension is the first: [T, ...], for rows of samples."""
        return tuple(factor.squeeze(1) for factor in self.factors)

    @cached_property
    def by_unit(self) -> Tensor:
        """The first site's factors, a row a unit: [units, T]."""
        if self.whole is not self:
            return self.whole.by_unit[:, : self.samples]
        return self.factors[0].flatten(1).t().contiguous()

    def head(self, samples: int) -> "ScaledMasks":
        """Return those of the first samples."""
        if samples == self.samples:
            return self
        if samples not in self._heads:
            factors = tuple(factor[:samples] for factor in self.factors)
            self._heads[samples] = ScaledMasks(self.sites, factors, self.whole)
        return self._heads[samples]

    def let_go(self) -> None:
        """Forget its heads: each holds the whole, so no memory would be free until both are."""
        self._heads.clear()


class MaskStore:
    """Draws `ScaledMasks`, and keeps the latest.

    What is made of masks grows while they are in use: they are measured when others are asked for.

    Args:
        sites: of the module.
        dtype: of the factors.
    """

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype = torch.float32) -> None:
        self._sites = sites
        self._dtype = dtype
        self._kept: dict[_Key, ScaledMasks] = {}  # in the order of their last use
        self._loose: dict[_Key, int] = {}  # those that may go, in the same order: their bytes
        self._held = 0  # the sum of those
        self._latest: _Key | None = None
        self._lock = threading.Lock()
        units = sum(site.units for site in sites)
        blocks = min(CHUNK, _MAX_ELEMENTS // units) // masks.BLOCK
        self.chunk = max(1, blocks) * masks.BLOCK
        """Samples of a chunk: whole blocks, as `Statistics` wants them."""

    def get(
        self, kind: MaskKind, seed: int, samples: range, device: torch.device, pin: bool = False
    ) -> ScaledMasks:
        """Return the masks of some samples.

        Args:
            kind: "stratified" or "independent".
            seed: 0 to 2^63-1.
            samples: which; a chunk of them.
            device: where the tensors are to be.
            pin: keep them for good.
        """
        key = (kind, seed, samples.start, device)
        with self._lock:
            self._measure_latest()
            self._held -= self._loose.pop(key, 0)
            scales = kept = self._kept.pop(key, None)
            if scales is None or scales.samples < len(samples):
                if kept is not None:
                    kept.let_go()
                scales = self.draw(kind, seed, samples, device)
                scales.pinned = kept is not None and kept.pinned
            scales.pinned |= pin
            self._kept[key] = scales
            self._latest = key
            self._forget()
        return scales.head(len(samples))

    def draw(self, kind: MaskKind, seed: int, samples: range, device: torch.device) -> ScaledMasks:
        """Draw masks and keep nothing."""
        factors = []
        for index, site in enumerate(self._sites):
            keep = masks.draw(kind, seed, index, site.units, site.p, samples)
            factor = torch.from_numpy(keep).to(device, self._dtype).mul_(site.survivor)
            factors.append(factor.view(len(samples), *site.template))
        return ScaledMasks(self._sites, tuple(factors))

    def _measure_latest(self) -> None:
        """Count what was in use until now."""
        key, self._latest = self._latest, None
        if key is not None and not self._kept[key].pinned:
            self._loose[key] = self._kept[key].nbytes
            self._held += self._loose[key]

    def _forget(self) -> None:
        """Drop what was used longest ago, until the rest is small enough."""
        while self._held > _MAX_BYTES:
            key = next(iter(self._loose))
            self._held -= self._loose.pop(key)
            self._kept.pop(key).let_go()
