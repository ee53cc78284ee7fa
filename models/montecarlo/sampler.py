"""Runs many thinned networks over one batch."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dropserve.models.defaults import DEFAULT_SAMPLES, MaskKind, Precision
from dropserve.models.device import is_gpu, tile
from dropserve.models.errors import SamplingError, UnsupportedModule
from dropserve.models.montecarlo.interception import Interception
from dropserve.models.montecarlo.kernels import Kernel, Kernels
from dropserve.models.montecarlo.masks import BLOCK, MASK_KINDS
from dropserve.models.montecarlo.scaled_masks import MaskStore, ScaledMasks
from dropserve.models.montecarlo.sites import Site, require_close, trace
from dropserve.models.montecarlo.statistics import Statistics, Summary
from dropserve.models.regularizers import Law

_log = logging.getLogger(__name__)
MAX_SEED = 2**63 - 1
MAX_ERROR = 0.002  # that precision "auto" lets any predictive mean move
BATCHES = (1, 8, 64)  # numbers of images at which bfloat16 must be faster to be taken by "auto"
MIN_SPEEDUP = 1.2  # a smaller gain may be measurement noise
_ROUNDS = 5
_CHUNK_ELEMENTS = 2**21
"""Widest result that the vmap path holds at once: 8 MiB of float32, or what one sample of all
images takes. Half as much takes a fifth longer, twice as much no less."""

Seeds = int | Sequence[int]
"""Of the masks: one, or one for each image."""
Path = Literal["folded", "vmap", "loop"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Choice:
    """What a sampler computes in; the figures are None where nothing was measured."""

    dtype: Literal["float32", "bfloat16"]
    speedup: float | None = None  # of bfloat16 over float32, the least over `BATCHES`
    error: float | None = None  # most that bfloat16 moved a predictive mean


class Sampler:
    """Monte Carlo dropout over one module (Gal and Ghahramani, 2016).

    Sample t is the same thinned network for every image of a batch, so masks cost T x units and
    not T x batch x units; each image alone still meets T draws from the right distribution.

    The module maps images [B, ...] to logits [B, C]. It is in eval mode, and left as it is: masks
    are put into a copy in training mode. `example` is a batch [B, ...] to try it on. Make a new
    sampler when weights change.

    Attributes:
        training_copy: what runs with masks on every path but "folded"; it shares the weights.
        sites: its dropout calls, in the order of a forward pass.
        path: "folded" (sequential modules; the fastest), "vmap" (any other; like "folded" it runs
            once what comes before the first mask) or "loop" (one pass per sample, where the module
            cannot be vectorised).
        precision: what was chosen, and why (`choose_precision`).
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
        # The second image is noise, which shows a path that mixes images.
        noise = torch.randn(example[:1].shape, generator=torch.Generator().manual_seed(0))
        probe = torch.cat([example[:1], noise.to(example)])
        self._found = trace(module, probe)
        self.training_copy = self._found.training_copy
        self.sites: tuple[Site, ...] = self._found.sites
        self.classes = self._found.classes
        self._store = MaskStore(self.sites)
        self._dtype = torch.float32
        self._kernels: dict[torch.dtype, Kernels | None] = {}
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
        self.precision = choose_precision(
            precision,
            lambda dtype, images: self._probe_mean(probe, dtype, images),
            native=_multiplies_bfloat16(example.device),
        )
        self._dtype = getattr(torch, self.precision.dtype)
        self._kernels = {self._dtype: self._kernels.get(self._dtype)}

    def sample(
        self,
        x: Tensor,
        samples: int = DEFAULT_SAMPLES,
        seed: Seeds = 0,
        masks: MaskKind = "stratified",
    ) -> Tensor:
        """Run `samples` thinned networks over images [B, ...]: probabilities [T, B, C].

        The masks are a pure function of the seed, 0 to 2^63-1. Raises SamplingError if an argument
        is out of range, or the module's dropout calls are not those that it made on the example.
        """
        chunks = list(self.chunks(x, samples, seed, masks))
        return (torch.cat(chunks, 2) if len(chunks) > 1 else chunks[0]).permute(2, 1, 0)

    def summarize(
        self,
        x: Tensor,
        samples: int = DEFAULT_SAMPLES,
        seed: Seeds = 0,
        masks: MaskKind = "stratified",
        level: float = 0.9,
    ) -> Summary:
        """Summarise what `sample` returns, with an interval of that level."""
        statistics = Statistics(samples, masks, level)
        for chunk in self.chunks(x, samples, seed, masks):
            statistics.add(chunk)
        return statistics.summary()

    def chunks(
        self,
        x: Tensor,
        samples: int = DEFAULT_SAMPLES,
        seed: Seeds = 0,
        masks: MaskKind = "stratified",
    ) -> Iterator[Tensor]:
        """Yield what `sample` returns as probabilities [C, B, t], for `Statistics.add`.

        So memory stays bounded for any T.
        """
        self._require_eval_mode()
        if samples < 1:
            raise SamplingError(f"samples must be at least 1, not {samples}")
        if isinstance(seed, int):
            seeds = [(seed, len(x))]  # and of how many images each is
        else:
            seeds = [(each, len([*images])) for each, images in groupby(seed)] or [(0, 0)]
        for each, _ in seeds:
            if not 0 <= each <= MAX_SEED:
                raise SamplingError(f"seed must be 0 to 2^63-1, not {each}")
        if masks not in MASK_KINDS:
            raise SamplingError(f"masks must be one of {', '.join(MASK_KINDS)}, not {masks!r}")
        if sum(images for _, images in seeds) != len(x):
            raise SamplingError(f"{len(x)} images need one seed, or a seed each")
        return self._chunks(x, samples, seeds, masks)

    def _chunks(
        self, x: Tensor, samples: int, seeds: Sequence[tuple[int, int]], masks: MaskKind
    ) -> Iterator[Tensor]:
        kernel: Kernel | None = None
        for start in range(0, samples, self._store.chunk):
            chosen = range(start, min(start + self._store.chunk, samples))
            with torch.inference_mode():  # not across a yield: it belongs to the thread
                if kernel is None:
                    h, kernel = self._prepare(x)
                logits, done = [], 0
                for seed, images in seeds:
                    some = h[done : done + images] if images < len(x) else h
                    logits.append(kernel(some, self._store.get(masks, seed, chosen, x.device)))
                    done += images
                together = torch.cat(logits) if len(logits) > 1 else logits[0]
                chunk = together.float().permute(2, 0, 1).softmax(0)
            yield chunk

    def scaled_masks(
        self, masks: MaskKind, seed: int, chunk: range, device: torch.device
    ) -> ScaledMasks:
        """Return what the samples of a chunk multiply by."""
        return self._store.get(masks, seed, chunk, device)

    def warm_up(self, x: Tensor, samples: int = DEFAULT_SAMPLES) -> None:
        """Draw the default seed's first masks, for good, and run them over `x` [B, ...]."""
        with torch.inference_mode():
            chosen = range(min(samples, self._store.chunk))
            h, kernel = self._prepare(x)
            kernel(h, self._store.get("stratified", 0, chosen, x.device, pin=True))

    def forget_masks(self) -> None:
        """Free the memory of kept masks: they are drawn again when a seed comes back."""
        self._store.forget()

    def thinned(
        self, x: Tensor, seed: int, masks: MaskKind, sample: int, p: float | None = None
    ) -> Tensor:
        """Run one thinned network, number `sample` of `sample()`, by a plain forward pass.

        With a `p`, every site drops at that rate, but for alpha dropout (see `Bernoulli.at`). It is
        computed in float32, whatever the precision, like eval mode. Returns logits [B, C].
        """
        store = self._store
        if p is not None:
            store = MaskStore([replace(site, law=site.law.at(p)) for site in self.sites])
        drawn = store.draw(masks, seed, range(sample, sample + 1), x.device)
        return self._forward(x, tuple(factor[0] for factor in drawn.factors), torch.float32)

    def _require_eval_mode(self) -> None:
        if any(child.training for child in self._parts):
            raise SamplingError("the module is in training mode: call module.eval() first")

    def _prepare(self, x: Tensor) -> tuple[Tensor, Kernel]:
        """Do what no mask changes, once; return what the kernel maps with masks to logits."""
        kernels = self._kernels[self._dtype]
        if self.path == "folded" and kernels is not None:
            return kernels.prefix(x), kernels.run
        return x, self._vectorised if self.path == "vmap" else self._loop

    def _vectorised(self, x: Tensor, masks: ScaledMasks) -> Tensor:
        """Logits [B, T, C], the passes vectorised: what comes before the first mask runs once."""
        found = self._found
        most = tile(x.device, _CHUNK_ELEMENTS)
        chunk = max(1, most // max(1, len(x) * found.widest, found.widest_shared))
        return torch.vmap(
            lambda *one: self._forward(x, one, self._dtype),
            out_dims=1,
            chunk_size=min(chunk, masks.samples),
        )(*masks.factors)

    def _loop(self, x: Tensor, masks: ScaledMasks) -> Tensor:
        """Logits [B, T, C], one plain pass after another."""
        passes = [self._forward(x, one, self._dtype) for one in zip(*masks.factors, strict=True)]
        return torch.stack(passes, 1)

    def _forward(self, x: Tensor, factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Logits [B, C] of the thinned network that `factors` [*template] describe."""
        called = 0

        def next_noise(law: Law, shape: torch.Size) -> Tensor:
            nonlocal called
            if called >= len(self.sites):
                raise SamplingError(f"the module called {law.kind} more often than on the example")
            site, factor = self.sites[called], factors[called]
            called += 1
            drawn = site.fit(factor, shape) if law == site.law else None
            if drawn is None:
                raise SamplingError(
                    f"{site.name}: expected {site.kind} with p={site.p} over "
                    f"{list(site.template)} an image, as on the example; the module called "
                    f"{law.kind} with p={law.p} over {list(shape)}"
                )
            return drawn

        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits: Tensor = Interception(next_noise).run(self.training_copy, x)
        if called != len(self.sites):
            missed = self.sites[called].name
            raise SamplingError(f"the module did not call {missed}, as it did on the example")
        return logits

    @torch.inference_mode()
    def _choose_path(self, probe: Tensor) -> Path:
        """Take the fastest path that agrees with the plain loop."""
        self._kernels = {torch.float32: None}
        masks = self._store.draw("independent", 0, range(3), probe.device)
        expected = self._loop(probe, masks)
        with suppress(Exception):  # a module may fail in any way; the next path may do
            kernels = Kernels.of(self._module, self._found)
            if kernels is not None:
                h = kernels.prefix(probe)
                for _, kernel in kernels.choices(h, masks):
                    require_close(kernel(h, masks), expected)
                self._kernels = {torch.float32: kernels}
                return "folded"
        try:
            require_close(self._vectorised(probe, masks), expected)
        except Exception as error:  # a module may fail under vmap in any way
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.warning(f"Monte Carlo dropout runs one pass a sample: {first_line}")
            return "loop"
        return "vmap"

    def _probe_mean(self, probe: Tensor, dtype: torch.dtype, images: int) -> Tensor:
        """Compute predictive means [B, C] in `dtype`, with masks that are kept as when serving."""
        if dtype not in self._kernels:
            folded = self.path == "folded"
            self._kernels[dtype] = Kernels.of(self._module, self._found, dtype) if folded else None
        self._dtype = dtype
        self._store.get("stratified", 0, range(2 * BLOCK), probe.device, pin=True)
        some = torch.arange(images, device=probe.device) % 2
        return self.summarize(probe[some], 2 * BLOCK).mean

    @torch.inference_mode()
    def _find_layout(self, probe: Tensor) -> None:
        """Find where masks lie whose batch dimension holds several rows an image."""
        factors = self._store.draw("independent", 0, range(1), probe.device).factors
        one = tuple(factor[0] for factor in factors)
        alone = torch.cat([self._forward(image, one, torch.float32) for image in probe[:, None]])
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
        kept, dropped = (
            self._forward(
                probe,
                tuple(torch.full(site.template, value, device=probe.device) for site in self.sites),
                torch.float32,
            )
            for value in (1.0, 0.0)
        )
        if torch.equal(kept, dropped):
            raise UnsupportedModule(
                "dropping every unit changes nothing: use the value that dropout returns, also "
                "where it is called with inplace=True"
            )


def choose_precision(
    asked: Precision,
    run: Callable[[torch.dtype, int], Tensor],
    *,
    native: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Settle on a precision, for "auto" by timing both in turn.

    "auto" takes bfloat16 only where the device multiplies it itself, it is faster by `MIN_SPEEDUP`
    at each of `BATCHES`, and no predictive mean moves by more than `MAX_ERROR`. `run` computes
    predictive means of so many images; UnsupportedModule if bfloat16 was asked for and it fails.
    """
    if asked == "float32" or (asked == "auto" and not native):
        return Choice("float32")
    speedup, error = float("inf"), 0.0
    for images in BATCHES:
        try:
            exact, rough = run(torch.float32, images), run(torch.bfloat16, images)
        except Exception as failure:  # a module may fail in any way
            if asked == "auto":
                return Choice("float32")
            advice = f"the module cannot compute in bfloat16: {failure}"
            raise UnsupportedModule(advice) from failure
        ratios = []
        for _ in range(_ROUNDS):
            times = [clock()]
            for dtype in (torch.float32, torch.bfloat16):
                run(dtype, images)
                times.append(clock())
            ratios.append((times[1] - times[0]) / (times[2] - times[1]))
        speedup = min(speedup, median(ratios))
        error = float(np.maximum(error, float((exact - rough).abs().max())))  # NaN stays
        if asked == "auto" and not (speedup >= MIN_SPEEDUP and error <= MAX_ERROR):
            return Choice("float32", speedup, error)
    return Choice("bfloat16", speedup, error)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Say if a device multiplies bfloat16 so much faster that no chance of timing decides.

    Of processors that is those with AMX. With avx512_bf16 alone the gain is near the margin for
    some batches and a loss for others, so processes on one machine would choose differently.
    """
    if is_gpu(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: bool = torch.cpu._is_amx_tile_supported()  # noqa: SLF001  no public name
    return found
