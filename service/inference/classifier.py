"""One loaded version of a model, and the tasks that it can run."""

from base64 import b64encode
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import thread_time
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dropserve.models import checkpoint
from dropserve.models.comparison import Moments, compare
from dropserve.models.defaults import DEFAULT_SAMPLES, MaskKind
from dropserve.models.device import OneStepAhead, is_gpu, to_cpu, to_device
from dropserve.models.errors import NoDropout
from dropserve.models.montecarlo import (
    Precision,
    Sample,
    Sampler,
    Statistics,
    Summary,
    stream_samples,
)
from dropserve.models.sequential import compile_for_inference, convert_memory_format
from dropserve.service.errors import InvalidRequest, ServerError
from dropserve.service.inference.decoder import Pixels
from dropserve.service.schemas import MEASURES

_CPU = torch.device("cpu")
_INLINE = 0.005
"""Seconds that a step may block the event loop: as long as Python lets a thread block another."""
_SLOW = 1.0
"""Seconds after which a task is slow without another try."""
_PART = 64
"""Images sampled together: enough to be fast, few enough that other jobs can run in between."""
NOT_FINITE = "the network's output is not finite for this image"
Answer = Mapping[str, Any]
"""Ready for JSON, with NumPy float32 for numbers."""
Steps = Generator[None, None, list[Answer]]


@dataclass(frozen=True)
class Predict:
    """Eval mode."""


@dataclass(frozen=True)
class Uncertainty:
    """Monte Carlo dropout."""

    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    masks: MaskKind = "stratified"
    level: float = 0.9
    include_samples: bool = False


@dataclass(frozen=True)
class Stream(Uncertainty):
    """Monte Carlo dropout over one image, sample by sample."""


@dataclass(frozen=True)
class Compare:
    """Train mode beside eval mode."""

    passes: int = 8
    seed: int = 0
    p: float | None = None


Task = Predict | Uncertainty | Compare


class Classifier:
    """One version of a model: loaded from its folder at `path`, verified, and run once.

    `factories` are those that its checkpoint may import; `precision` is of Monte Carlo dropout. On
    a GPU a batch is one copy of pixels in and one of answers out; masks of a new seed are one more.

    Raises:
        CheckpointError, UnsupportedModule: it cannot be served; says why.

    Attributes:
        preprocessing: what makes an image into pixels [C, H, W]; any thread may call it.
        examples: images of the test set, if it was saved with any.
        manifest_sha256: of every byte of its files; None: it has no manifest.
        inline: most images of a batch that runs in under 5 ms, by the type of its task; for
            Uncertainty with as many samples as `DEFAULT_SAMPLES`, and one image of a new seed. On a
            GPU none: whoever waits for it waits for all that other threads have queued there, too.
    """

    def __init__(
        self,
        name: str,
        version: int,
        path: Path,
        factories: Sequence[str] = (),
        precision: Precision = "float32",
        device: torch.device = _CPU,
    ) -> None:
        self.name = name
        self.version = version
        found = checkpoint.read(path)
        self._module, self._metadata = found.build(factories), found.metadata
        self.manifest_sha256 = found.manifest_sha256
        del found  # its tensors, of which the module has copies
        self.classes = self._metadata.classes
        self.examples = self._metadata.examples
        self.preprocessing = self._metadata.preprocessing
        self._device = device
        convert_memory_format(self._module).to(device)
        x = self._input(np.zeros((1, *self.preprocessing.shape), np.uint8))
        self._eval = compile_for_inference(self._module, x)
        self._sampler: Sampler | None = None  # there is no noise to sample
        self.inline: dict[type[Task], int] = {
            Predict: self._measure_inline(lambda _seed: Predict())
        }
        with suppress(NoDropout):
            self._sampler = Sampler(self._module, x, precision)
            self._sampler.warm_up(x)
            self.inline[Uncertainty] = self._measure_inline(lambda seed: Uncertainty(seed=seed))

    def require_sampler(self) -> Sampler:
        """Return what samples thinned networks; InvalidRequest if there is no noise to sample."""
        if self._sampler is None:
            raise InvalidRequest("this model draws no noise to sample: ask it to predict")
        return self._sampler

    def is_inline(self, task: Task, images: int) -> bool:
        """Say if the steps of a batch take so little time that they may run on the event loop."""
        if isinstance(task, Uncertainty) and task.samples > DEFAULT_SAMPLES:
            return False
        return images <= self.inline.get(type(task), 0)

    def _measure_inline(self, make_task: Callable[[int], Task]) -> int:
        """Find how many images a batch may have; on a GPU this warms it up."""
        random, most = np.random.default_rng(0), 0
        for images in (1, 8, 32):
            pixels = random.integers(0, 256, (images, *self.preprocessing.shape), np.uint8)
            for attempt in range(1, 6):  # the first makes what later ones find; steal slows some
                started = thread_time()  # what other processes take must not count
                for _ in self.run(make_task(attempt if images == 1 else 0), [pixels]):
                    pass
                seconds = thread_time() - started
                if not _INLINE < seconds <= _SLOW:
                    break
            if seconds > _INLINE:
                break
            most = images
        return 0 if is_gpu(self._device) else most

    def run(self, task: Task, requests: Sequence[Pixels], seeds: Sequence[int] = ()) -> Steps:
        """Answer requests, each of pixels uint8 [B, C, H, W], together: an answer for each.

        Other jobs may run between the steps. `seeds`, one for each image, replace the task's.
        """
        if isinstance(task, Compare):
            answers: list[Answer] = []
            for pixels in requests:
                answer = yield from self._compare(task, self._input(pixels))
                answers.append(answer)
            return answers
        x = self._input(np.concatenate(requests) if len(requests) > 1 else requests[0])
        if isinstance(task, Predict):
            found = self._predict(x)
        elif isinstance(task, Uncertainty):
            found = yield from self._uncertainty(task, x, seeds)
        else:
            assert_never(task)
        rest = iter(found)
        return [{"predictions": [*islice(rest, len(pixels))]} for pixels in requests]

    def columns(
        self, task: Predict | Uncertainty, pixels: Pixels
    ) -> dict[str, npt.NDArray[np.float64 | np.int64]]:
        """Answer images, uint8 [B, C, H, W], for a table: an array [B] of each figure, by its name.

        "index" and "probability" are of the most probable class, which is NaN where the network's
        output is not finite; for Uncertainty there are the measures of `Summary` of an image.
        """
        x = self._input(pixels)
        if isinstance(task, Predict):
            return _most_probable(self._probabilities(x))
        sampler = self.require_sampler()
        parts = [
            sampler.summarize(part, task.samples, task.seed, task.masks, task.level)
            for part in torch.split(x, _PART)
        ]
        found = _most_probable(torch.cat([part.mean for part in parts]))
        for name in MEASURES:
            found[name] = torch.cat([getattr(part, name) for part in parts]).numpy()
        return found

    def stream(self, task: Stream, pixels: Pixels) -> Iterator[Answer]:
        """Answer one request, of pixels uint8 [1, C, H, W], in steps.

        Yields:
            `{event: a list of its data}`: a start, the samples in order, some at a time, and an
            end that says what `run` returns.
        """
        x, sampler = self._input(pixels), self.require_sampler()
        _, channels, height, width = pixels.shape
        shown = {"height": height, "width": width, "channels": channels}
        start = {
            "level": task.level,
            "classes": self.classes,
            "eval": self._predict(x)[0]["probabilities"],
            "input": {**shown, "pixels": _base64(pixels[0].transpose(1, 2, 0))},
            "sites": self._sites(),
        }
        yield {"start": [start]}
        statistics = Statistics(task.samples, task.masks, task.level)
        for some in stream_samples(sampler, x, task.samples, task.seed, task.masks, statistics):
            yield {"sample": [_sample(sample) for sample in some]}
        yield {"end": [{"predictions": self._answers(task, statistics.summary(), [])}]}

    def forget_masks(self) -> None:
        """Free the memory of kept masks; any thread may call it."""
        if self._sampler is not None:
            self._sampler.forget_masks()

    def details(self) -> dict[str, Any]:
        """Describe this version; the fields of `ModelDetails` that it knows."""
        metadata, preprocessing = self._metadata, self.preprocessing
        return {
            "classes": list(metadata.classes),
            "input": {
                "height": preprocessing.size[0],
                "width": preprocessing.size[1],
                "channels": preprocessing.channels,
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
                "invert": preprocessing.invert,
                "fit": preprocessing.fit,
            },
            "training": self._module.training,
            "parameters": sum(p.numel() for p in self._module.parameters()),
            "sites": self._sites(),
            "device": self.device,
            "path": self._sampler and self._sampler.path,
            "precision": self._sampler and asdict(self._sampler.precision),
            "network": metadata.network.to_json(),
            "data": dict(metadata.data),
            "evaluation": dict(metadata.evaluation),
            "sha256": metadata.sha256,
            "torch_version": metadata.torch_version,
        }

    def _sites(self) -> list[dict[str, Any]]:
        return [
            {
                "name": site.name,
                "kind": site.kind,
                "p": site.p,
                "shape": list(site.shape),
                "units": site.units,
                "distribution": type(site.law).__name__.lower(),
                "mean": site.law.mean,
                "std": site.law.std,
            }
            for site in (self._sampler.sites if self._sampler else ())
        ]

    @property
    def device(self) -> str:
        """Where it runs, for the reader: cpu, or cuda and the GPU's name."""
        if not is_gpu(self._device):
            return self._device.type
        return f"{self._device.type} ({torch.cuda.get_device_name(self._device)})"

    def _input(self, pixels: Pixels) -> Tensor:
        (placed,) = to_device([torch.from_numpy(pixels)], self._device)
        return self.preprocessing.normalize(placed)

    def _probabilities(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._eval(x).float().softmax(-1).cpu()

    def _predict(self, x: Tensor) -> list[Answer]:
        probabilities = self._probabilities(x).numpy()
        classes, answers = self.classes, list[Answer]()
        for row, k in zip(probabilities, probabilities.argmax(1).tolist(), strict=True):
            probability = row[k]
            if probability != probability:  # NaN is the greatest to argmax
                raise ServerError(NOT_FINITE)
            answers.append(
                {"label": classes[k], "index": k, "probability": probability, "probabilities": row}
            )
        return answers

    def _uncertainty(self, task: Uncertainty, x: Tensor, seeds: Sequence[int]) -> Steps:
        answers, sampler = list[Answer](), self.require_sampler()
        ahead = OneStepAhead(self._device)
        for part in torch.split(x, _PART):
            if answers:
                yield
            statistics = Statistics(task.samples, task.masks, task.level)
            sampled = []
            seed = seeds[len(answers) : len(answers) + _PART] or task.seed
            for chunk in sampler.chunks(part, task.samples, seed, task.masks):
                statistics.add(chunk)
                if task.include_samples:
                    sampled.append(chunk)
                if not statistics.complete:
                    ahead.wait()
                    yield
            answers += self._answers(task, statistics.summary(), sampled)
        return answers

    def _answers(
        self, task: Uncertainty, summary: Summary, sampled: Sequence[Tensor]
    ) -> list[Answer]:
        """Make an answer for each image; `sampled` probabilities are [C, B, t]."""
        _finite(summary.mean.numpy())
        sampled = to_cpu(sampled) if sampled else []
        figures = vars(summary)
        rows = {name: _float32(v) for name, v in figures.items() if isinstance(v, Tensor)}
        lower, upper = rows.pop("lower"), rows.pop("upper")
        shared = {n: v for n, v in figures.items() if not isinstance(v, Tensor)}  # or None
        answers: list[Answer] = []
        for i, k in enumerate(rows["mean"].argmax(1).tolist()):
            answer = {"label": self.classes[k], "index": k, **shared}
            answer |= {name: row[i] for name, row in rows.items()}
            answer["interval"] = {"level": task.level, "lower": lower[i], "upper": upper[i]}
            if task.include_samples:
                probabilities = torch.cat([chunk[:, i] for chunk in sampled], 1)
                answer["sample_probabilities"] = probabilities.T.contiguous().numpy()
            answers.append(answer)
        return answers

    def _compare(self, task: Compare, x: Tensor) -> Generator[None, None, Answer]:
        sampler = self.require_sampler()
        found = yield from compare(self._module, sampler, x, task.passes, task.seed, task.p)
        plain, train = _finite(found.eval.numpy()), _finite(found.train.numpy())
        distance = _float32(found.distance())
        predictions = [
            {
                "eval": list(plain[:, i]),
                "train": list(train[:, i]),
                "train_mean": train[:, i].mean(0),
                "distance": distance[i],
            }
            for i in range(len(x))
        ]
        layers = [
            {**vars(layer), "eval": _moments(layer.eval), "train": _moments(layer.train)}
            for layer in found.layers
        ]
        return {"predictions": predictions, "layers": layers}


def _most_probable(probabilities: Tensor) -> dict[str, npt.NDArray[np.float64 | np.int64]]:
    """Find the most probable class of each image in probabilities [B, C]."""
    values = probabilities.numpy()
    index = values.argmax(1)  # NaN is the greatest to argmax
    return {"index": index, "probability": values[np.arange(len(values)), index]}


def _sample(sample: Sample) -> Answer:
    _finite(sample.probabilities)
    return {**vars(sample), "kept": [_base64(bits) for bits in sample.kept]}


def _base64(values: npt.NDArray[np.uint8]) -> str:
    return b64encode(values.tobytes()).decode()


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        raise ServerError(NOT_FINITE)
    return values


def _float32(values: Tensor) -> npt.NDArray[np.float32]:
    """Round to float32: JSON then has as many digits as the network's answer means."""
    return values.contiguous().numpy().astype(np.float32)


def _moments(moments: Moments) -> Answer:
    return {"mean": np.float32(moments.mean), "variance": np.float32(moments.variance)}
