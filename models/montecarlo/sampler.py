"""Runs many thinned networks over one batch."""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from models.errors import SamplingError, UnsupportedModule
from models.montecarlo import masks as mask_source
from models.montecarlo.interception import Interception, Kind
from models.montecarlo.masks import MASK_KINDS, MaskKind
from models.montecarlo.sites import Site, survey

MAX_SEED = 2**63 - 1
_CHUNK_ELEMENTS = 2**22
"""Widest intermediate result held for one chunk of samples: 16 MiB of float32."""

Scales = tuple[Tensor, ...]
"""For each site, what its units are multiplied by: [T, *template], zero where dropped."""


class Sampler:
    """Monte Carlo dropout over one module (Gal and Ghahramani, 2016).

    Sample t is the same thinned network for every image of a batch, so masks cost T x units and
    not T x batch x units; each image alone still meets T draws from the right distribution.

    Args:
        module: maps images [B, ...] to logits [B, C]; in eval mode, and left as it is.
        example: a batch [B, ...] to look at the module with.

    Attributes:
        sites: the module's dropout calls, in the order of a forward pass.
        path: "vmap" (everything before the first mask runs once) or "loop" (a pass a sample),
            where the module cannot be vectorised.
        classes: C.

    Raises:
        UnsupportedModule: the module has no dropout, or one that no mask can reach.
        SamplingError: the module is in training mode.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self._module = module
        self._require_eval_mode()
        found = survey(module, example)
        self.sites: tuple[Site, ...] = found.sites
        self.classes = found.classes
        self._widest = found.widest
        self.path: Literal["vmap", "loop"] = self._choose_path(example[:1])

    @torch.inference_mode()
    def sample(
        self, x: Tensor, samples: int = 100, seed: int = 0, masks: MaskKind = "stratified"
    ) -> Tensor:
        """Run `samples` thinned networks over a batch.

        Args:
            x: images [B, ...].
            samples: T, at least 1.
            seed: 0 to 2^63-1; the masks are a pure function of it.
            masks: "stratified" or "independent" (see `models.montecarlo.masks`).

        Returns:
            Probabilities [T, B, C].

        Raises:
            SamplingError: an argument is out of range, or the module's dropout calls are not those
                that it made on the example.
        """
        self._require_eval_mode()
        if samples < 1:
            raise SamplingError(f"samples must be at least 1, not {samples}")
        if not 0 <= seed <= MAX_SEED:
            raise SamplingError(f"seed must be 0 to 2^63-1, not {seed}")
        if masks not in MASK_KINDS:
            raise SamplingError(f"masks must be one of {', '.join(MASK_KINDS)}, not {masks!r}")
        run = self._vectorised if self.path == "vmap" else self._loop
        chunk = max(1, _CHUNK_ELEMENTS // max(1, len(x) * self._widest))
        logits = [
            run(x, self._scales(masks, seed, range(t, min(t + chunk, samples)), x.device))
            for t in range(0, samples, chunk)
        ]
        return torch.cat(logits).float().softmax(-1)

    def thinned(self, x: Tensor, seed: int, masks: MaskKind, sample: int) -> Tensor:
        """Run one thinned network by a plain forward pass: sample number `sample` of `sample()`.

        Returns:
            Logits [B, C].
        """
        scales = self._scales(masks, seed, range(sample, sample + 1), x.device)
        return self._forward(x, tuple(scale[0] for scale in scales))

    def _require_eval_mode(self) -> None:
        if any(child.training for child in self._module.modules()):
            raise SamplingError("the module is in training mode: call module.eval() first")

    def _scales(self, masks: MaskKind, seed: int, samples: range, device: torch.device) -> Scales:
        """Draw the masks of some samples, ready to multiply by."""
        scales = []
        for index, site in enumerate(self.sites):
            keep = mask_source.draw(masks, seed, index, site.units, site.p, samples)
            scale = torch.from_numpy(keep).to(device, torch.float32).mul_(site.survivor)
            scales.append(scale.view(len(samples), *site.template))
        return tuple(scales)

    def _vectorised(self, x: Tensor, scales: Scales) -> Tensor:
        """Logits [T, B, C], the passes vectorised: what comes before the first mask runs once."""
        return torch.vmap(lambda *one: self._forward(x, one))(*scales)

    def _loop(self, x: Tensor, scales: Scales) -> Tensor:
        """Logits [T, B, C], one plain pass after another."""
        return torch.stack([self._forward(x, one) for one in zip(*scales, strict=True)])

    def _forward(self, x: Tensor, scales: Scales) -> Tensor:
        """Logits [B, C] of the thinned network that `scales` [*template] describe."""
        feed = _Feed(self.sites, scales)
        with Interception(feed):
            logits: Tensor = self._module(x)
        feed.finish()
        return logits

    @torch.inference_mode()
    def _choose_path(self, example: Tensor) -> Literal["vmap", "loop"]:
        """Take the vectorised path if it runs and agrees with the plain loop."""
        self._require_effect(example)
        scales = self._scales("independent", 0, range(3), example.device)
        expected = self._loop(example, scales)
        try:
            got = self._vectorised(example, scales)
            coarse = 4 * torch.finfo(got.dtype).eps
            torch.testing.assert_close(
                got, expected, rtol=max(1e-3, coarse), atol=max(1e-4, coarse)
            )
        except Exception as error:  # a module may fail under vmap in any way
            warnings.warn(
                f"Monte Carlo dropout runs one pass a sample: {_first_line(error)}", stacklevel=3
            )
            return "loop"
        return "vmap"

    def _require_effect(self, example: Tensor) -> None:
        """Refuse a module whose masks change nothing, as where in-place results are thrown away."""
        (all_kept, all_dropped) = (
            tuple(torch.full(site.template, value, device=example.device) for site in self.sites)
            for value in (1.0, 0.0)
        )
        if torch.equal(self._forward(example, all_kept), self._forward(example, all_dropped)):
            raise UnsupportedModule(
                "dropping every unit changes nothing: use the value that dropout returns, also "
                "where it is called with inplace=True"
            )


class _Feed:
    """Hands out the masks of one forward pass in the order of the sites."""

    def __init__(self, sites: tuple[Site, ...], scales: Scales) -> None:
        self._sites = sites
        self._scales = scales
        self._next = 0

    def __call__(self, kind: Kind, p: float, shape: torch.Size) -> Tensor:
        index, self._next = self._next, self._next + 1
        if index >= len(self._sites):
            raise SamplingError(f"the module called {kind} more often than on the example")
        site = self._sites[index]
        scale = None
        if (kind, p) == (site.kind, site.p):
            scale = site.fit(self._scales[index], shape)
        if scale is None:
            raise SamplingError(
                f"{site.name}: expected {site.kind} with p={site.p} over {list(site.template)} an "
                f"image, as on the example; the module called {kind} with p={p} over {list(shape)}"
            )
        return scale

    def finish(self) -> None:
        """Raise if the pass is over and masks are left."""
        if self._next != len(self._sites):
            missed = self._sites[self._next].name
            raise SamplingError(f"the module did not call {missed}, as it did on the example")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
