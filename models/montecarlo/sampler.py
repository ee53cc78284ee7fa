"""Runs many thinned networks over one batch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dropserve.models.errors import SamplingError, UnsupportedModule
from dropserve.models.montecarlo.folded import Folded
from dropserve.models.montecarlo.interception import Interception, Kind
from dropserve.models.montecarlo.masks import BLOCK, MASK_KINDS, MaskKind
from dropserve.models.montecarlo.precision import Choice, Precision, choose, is_native
from dropserve.models.montecarlo.scales import MaskStore, ScaledMasks
from dropserve.models.montecarlo.sites import Site, require_close, trace
from dropserve.models.montecarlo.statistics import Statistics, Summary

_log = logging.getLogger(__name__)
MAX_SEED = 2**63 - 1
_CHUNK_ELEMENTS = 2**21
"""Widest result that the vmap path holds at once: 8 MiB of float32, or what one sample of all
images takes. Half as much takes a fifth longer, twice as much no less."""

Path = Literal["folded", "vmap", "loop"]


class Sampler:
    """Monte Carlo dropout over one module (Gal and Ghahramani, 2016).

    Sample t is the same thinned network for every image of a batch, so masks cost T x units and
    not T x batch x units; each image alone still meets T draws from the right distribution.

    Args:
        module: maps images [B, ...] to logits [B, C]; in eval mode, and left as it is: masks are
            put into a copy in training mode. A sampler is made anew when weights change.
        example: a batch [B, ...] to look at the module with.
        precision: of the computation; "auto" takes bfloat16 where it is faster here and hardly
            changes the answer (`dropserve.models.montecarlo.precision`).

    Attributes:
        training_copy: what runs with masks on every path but "folded"; it shares the weights.
        sites: its dropout calls, in the order of a forward pass.
        path: "folded" (sequential modules; the fastest), "vmap" (any other; like "folded" it runs
            once what comes before the first mask) or "loop" (a pass a sample, where the module
            cannot be vectorised).
        precision: what was chosen, and why.
        classes: C.

    Raises:
        UnsupportedModule: the module has no dropout, or one that no mask can reach.
        SamplingError: the module is in training mode.
    """

    def __init__(
        self, module: nn.Module, example: Tensor, precision: Precision = "float32"
    ) -> None:
        self._module = module
        self._parts = tuple(module.modules())
        self._require_eval_mode()
        probe = _probe(example)
        self._found = trace(module, probe)
        self.training_copy = self._found.training_copy
        self.sites: tuple[Site, ...] = self._found.sites
        self.classes = self._found.classes
        self._store = MaskStore(self.sites)
        self._folded: Folded | None = None
        self._dtype = torch.float32
        try:
            self._require_effect(probe)
            self._find_layout(probe)
            self.path: Path = self._choose_path(probe)
        except UnsupportedModule:
            raise
        except SamplingError as error:
            raise UnsupportedModule(
                f"the module's dropout calls depend on masks or on the images: {error}"
            ) from error
        self.precision: Choice = choose(
            precision, partial(self._at, probe), native=is_native(example.device)
        )

    def sample(
        self, x: Tensor, samples: int = 100, seed: int = 0, masks: MaskKind = "stratified"
    ) -> Tensor:
        """Run `samples` thinned networks over a batch and keep what each one says.

        Args:
            x: images [B, ...].
            samples: T, at least 1.
            seed: 0 to 2^63-1; the masks are a pure function of it.
            masks: "stratified" or "independent" (see `dropserve.models.montecarlo.masks`).

        Returns:
            Probabilities [T, B, C].

        Raises:
            SamplingError: an argument is out of range, or the module's dropout calls are not those
                that it made on the example.
        """
        chunks = list(self.chunks(x, samples, seed, masks))
        return (torch.cat(chunks, 2) if len(chunks) > 1 else chunks[0]).permute(2, 1, 0)

    def summarize(
        self,
        x: Tensor,
        samples: int = 100,
        seed: int = 0,
        masks: MaskKind = "stratified",
        level: float = 0.9,
    ) -> Summary:
        """Run `samples` thinned networks over a batch and keep what they say together.

        Takes what `sample` takes, and the `level` of the interval.
        """
        statistics = Statistics(samples, masks, level)
        for chunk in self.chunks(x, samples, seed, masks):
            statistics.add(chunk)
        return statistics.summary()

    def chunks(
        self, x: Tensor, samples: int = 100, seed: int = 0, masks: MaskKind = "stratified"
    ) -> Iterator[Tensor]:
        """Run thinned networks a few at a time, so that memory stays bounded for any T.

        Takes what `sample` takes.

        Yields:
            Probabilities [C, B, t] of the next samples, for `Statistics.add`.
        """
        self._require_eval_mode()
        if samples < 1:
            raise SamplingError(f"samples must be at least 1, not {samples}")
        if not 0 <= seed <= MAX_SEED:
            raise SamplingError(f"seed must be 0 to 2^63-1, not {seed}")
        if masks not in MASK_KINDS:
            raise SamplingError(f"masks must be one of {', '.join(MASK_KINDS)}, not {masks!r}")
        return self._chunks(x, samples, seed, masks)

    def _chunks(self, x: Tensor, samples: int, seed: int, masks: MaskKind) -> Iterator[Tensor]:
        run = None
        for start in range(0, samples, self._store.chunk):
            with torch.inference_mode():  # not across a yield: it belongs to the thread
                run = run or self._prepared(x)
                chosen = range(start, min(start + self._store.chunk, samples))
                logits = run(self._store.get(masks, seed, chosen, x.device))
                chunk = logits.float().permute(2, 0, 1).softmax(0)
            yield chunk

    def scales(self, masks: MaskKind, seed: int, chunk: range, device: torch.device) -> ScaledMasks:
        """Return what the samples of a chunk multiply by."""
        return self._store.get(masks, seed, chunk, device)

    def warm_up(self, x: Tensor, samples: int = 100) -> None:
        """Draw the default seed's first masks, for good, and run them over `x` [B, ...]."""
        with torch.inference_mode():
            chosen = range(min(samples, self._store.chunk))
            self._prepared(x)(self._store.get("stratified", 0, chosen, x.device, pin=True))

    def thinned(
        self, x: Tensor, seed: int, masks: MaskKind, sample: int, p: float | None = None
    ) -> Tensor:
        """Run one thinned network by a plain forward pass: sample number `sample` of `sample()`.

        With a `p`, every site drops at that rate, but for alpha dropout (see `Site.at`). It is
        computed in float32, whatever the precision, like eval mode.

        Returns:
            Logits [B, C].
        """
        store = self._store if p is None else MaskStore([site.at(p) for site in self.sites])
        scales = store.draw(masks, seed, range(sample, sample + 1), x.device)
        return self._forward(x, tuple(factor[0] for factor in scales.factors), torch.float32)

    def _require_eval_mode(self) -> None:
        if any(child.training for child in self._parts):
            raise SamplingError("the module is in training mode: call module.eval() first")

    def _prepared(self, x: Tensor) -> Callable[[ScaledMasks], Tensor]:
        """Do what no mask changes, once; the rest maps masks to logits [B, T, C]."""
        if self.path == "folded" and self._folded is not None:
            return partial(self._folded.head, self._folded.prefix(x))
        return partial(self._vectorised if self.path == "vmap" else self._loop, x)

    def _vectorised(self, x: Tensor, scales: ScaledMasks) -> Tensor:
        """Logits [B, T, C], the passes vectorised: what comes before the first mask runs once."""
        chunk = max(1, _CHUNK_ELEMENTS // max(1, len(x) * self._found.widest))
        return torch.vmap(
            lambda *one: self._forward(x, one, self._dtype),
            out_dims=1,
            chunk_size=min(chunk, scales.samples),
        )(*scales.factors)

    def _loop(self, x: Tensor, scales: ScaledMasks) -> Tensor:
        """Logits [B, T, C], one plain pass after another."""
        passes = [self._forward(x, one, self._dtype) for one in zip(*scales.factors, strict=True)]
        return torch.stack(passes, 1)

    def _forward(self, x: Tensor, factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Logits [B, C] of the thinned network that `factors` [*template] describe."""
        feed = _MaskIterator(self.sites, factors)
        low = dtype != torch.float32
        with torch.autocast(x.device.type, dtype, enabled=low):
            logits: Tensor = Interception(feed).run(self.training_copy, x)
        feed.finish()
        return logits

    @torch.inference_mode()
    def _choose_path(self, probe: Tensor) -> Path:
        """Take the fastest path that agrees with the plain loop."""
        scales = self._store.draw("independent", 0, range(3), probe.device)
        expected = self._loop(probe, scales)
        try:
            folded = Folded.of(self._module, self._found)
            if folded is not None:
                h = folded.prefix(probe)
                for _, way in folded.ways(h, scales):
                    require_close(way(h, scales), expected)
                self._folded = folded
                return "folded"
        except Exception:  # noqa: S110  a module may fail in any way; the next path may do
            pass
        try:
            require_close(self._vectorised(probe, scales), expected)
        except Exception as error:  # a module may fail under vmap in any way
            _log.warning(f"Monte Carlo dropout runs one pass a sample: {_first_line(error)}")
            return "loop"
        return "vmap"

    def _at(self, probe: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Compute in `dtype` from now on; return a call that gives a predictive mean [B, C]."""
        self._dtype = dtype
        if self.path == "folded":
            self._folded = Folded.of(self._module, self._found, dtype)
        return lambda: self.summarize(probe, 2 * BLOCK).mean

    @torch.inference_mode()
    def _find_layout(self, probe: Tensor) -> None:
        """Find where masks lie whose batch dimension holds several rows an image.

        Raises:
            UnsupportedModule: an image's logits depend on the others of its batch.
        """
        factors = self._store.draw("independent", 0, range(1), probe.device).factors
        one = tuple(factor[0] for factor in factors)
        alone = torch.cat(
            [self._forward(image, one, torch.float32) for image in torch.split(probe, 1)]
        )
        for inside in (False, True):
            self.sites = tuple(replace(site, images_inside=inside) for site in self.sites)
            with suppress(AssertionError):
                return require_close(self._forward(probe, one, torch.float32), alone)
        raise UnsupportedModule(
            "an image's logits depend on the other images of its batch: let every layer treat "
            "images one by one, and keep the batch in one dimension"
        )

    @torch.inference_mode()
    def _require_effect(self, probe: Tensor) -> None:
        """Refuse a module whose masks change nothing, as where in-place results are thrown away."""
        (all_kept, all_dropped) = (
            tuple(torch.full(site.template, value, device=probe.device) for site in self.sites)
            for value in (1.0, 0.0)
        )
        kept, dropped = (self._forward(probe, m, torch.float32) for m in (all_kept, all_dropped))
        if torch.equal(kept, dropped):
            raise UnsupportedModule(
                "dropping every unit changes nothing: use the value that dropout returns, also "
                "where it is called with inplace=True"
            )


class _MaskIterator:
    """Hands out the masks of one forward pass in the order of the sites."""

    def __init__(self, sites: tuple[Site, ...], factors: tuple[Tensor, ...]) -> None:
        self._sites = sites
        self._factors = factors
        self._next = 0

    def __call__(self, kind: Kind, p: float, shape: torch.Size) -> Tensor:
        index, self._next = self._next, self._next + 1
        if index >= len(self._sites):
            raise SamplingError(f"the module called {kind} more often than on the example")
        site = self._sites[index]
        scale = None
        if (kind, p) == (site.kind, site.p):
            scale = site.fit(self._factors[index], shape)
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


def _probe(example: Tensor) -> Tensor:
    """Put noise beside the first image of `example`: two images that no path may mix up."""
    noise = torch.randn(example[:1].shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([example[:1], noise.to(example)])
