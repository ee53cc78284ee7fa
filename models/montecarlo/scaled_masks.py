"""Noise as tensors, drawn when it is first needed and kept for the seeds used last."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from dropserve.models.defaults import MaskKind
from dropserve.models.device import to_device
from dropserve.models.montecarlo.masks import BLOCK, draw, draw_normal
from dropserve.models.montecarlo.sites import Site
from dropserve.models.regularizers import Gaussian
from dropserve.models.sequential import scaled

CHUNK = 100
"""Most samples run at once: whole blocks, a few milliseconds' work for a small network."""
_MAX_ELEMENTS = 2**22  # units of one chunk of samples: 16 MiB of float32
_LARGE = 2**15  # units of a site, weights say, whose masks are kept as bools: a quarter as large
_MAX_BYTES = 64 * 2**20  # kept of masks, besides those that are pinned and those in use

_Key = tuple[MaskKind, int, int, torch.device]


class ScaledMasks:
    """The noise of T thinned networks: for each site [T, *template], zero for a dropped unit.

    If they are `pinned` they are never evicted, so that what is made of them is made only once:
    groups of `thinned` networks, as `Kernels` gathers them.
    """

    def __init__(
        self,
        drawn: Sequence[Tensor],
        kept: Sequence[float],
        parent: "ScaledMasks | None" = None,
    ) -> None:
        self.drawn = tuple(drawn)  # masks of large sites are bools
        self._kept = kept  # what the elements of a mask of bools stand for where it is True
        self.samples = drawn[0].shape[0]
        self._parent = parent  # not itself: a reference cycle would delay the freeing of memory
        self.pinned = False
        self.thinned: list[tuple[Tensor, ...]] = []

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The noise as floating-point numbers."""
        return tuple(map(scaled, self.drawn, self._kept))

    @property
    def parent(self) -> "ScaledMasks":
        """The masks that these are the first of, or these: it keeps what is made of them."""
        return self._parent or self

    @property
    def nbytes(self) -> int:
        """Memory that they take, with what was made of them."""
        made = sum(tensor.nbytes for group in self.thinned for tensor in group)
        return made + sum(drawn.nbytes for drawn in self.drawn)

    def first(self, samples: int) -> "ScaledMasks":
        """Return those of the first samples, in the same memory."""
        if samples == self.samples:
            return self
        return ScaledMasks([drawn[:samples] for drawn in self.drawn], self._kept, self.parent)


class MaskStore:
    """Draws masks of some sites, and keeps the latest.

    `chunk` is the most samples of one call of `get`: whole blocks, as `Statistics` wants them.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._kept: dict[_Key, ScaledMasks] = {}
        self._bytes: dict[_Key, int] = {}  # of what may go, in the order of last use
        self._latest: _Key | None = None
        self._lock = threading.Lock()
        blocks = min(CHUNK, _MAX_ELEMENTS // sum(site.units for site in sites)) // BLOCK
        self.chunk = max(1, blocks) * BLOCK

    def get(
        self, kind: MaskKind, seed: int, samples: range, device: torch.device, pin: bool = False
    ) -> ScaledMasks:
        """Return the masks of a chunk of samples; `pin` never evicts them."""
        key = (kind, seed, samples.start, device)
        with self._lock:
            if self._latest is not None and not self._kept[self._latest].pinned:
                # what was in use until now: kernels have made something of it since
                self._bytes[self._latest] = self._kept[self._latest].nbytes
            self._bytes.pop(key, None)
            kept = self._kept.get(key)
            if kept is None or kept.samples < len(samples):
                pin |= kept is not None and kept.pinned
                kept = self._kept[key] = self.draw(kind, seed, samples, device)
            kept.pinned |= pin
            self._latest = key
            while sum(self._bytes.values()) > _MAX_BYTES:
                oldest = next(iter(self._bytes))
                del self._bytes[oldest], self._kept[oldest]
        return kept.first(len(samples))

    def forget(self) -> None:
        """Drop all masks that are neither pinned nor in use."""
        with self._lock:
            for key in self._bytes:
                del self._kept[key]
            self._bytes.clear()

    def draw(self, kind: MaskKind, seed: int, samples: range, device: torch.device) -> ScaledMasks:
        """Draw masks on the CPU, alike for every device, and keep nothing."""
        drawn = []
        for index, site in enumerate(self._sites):
            law = site.law
            if isinstance(law, Gaussian):
                normal = draw_normal(kind, seed, index, site.units, samples)
                noise = torch.from_numpy(normal).mul_(law.std).add_(law.mean)
            else:
                noise = torch.from_numpy(draw(kind, seed, index, site.units, law.p, samples))
            drawn.append(noise.view(len(samples), *site.template))
        kept = [site.law.kept for site in self._sites]
        placed = zip(to_device(drawn, device), self._sites, kept, strict=True)
        return ScaledMasks([n if s.units > _LARGE else scaled(n, k) for n, s, k in placed], kept)
