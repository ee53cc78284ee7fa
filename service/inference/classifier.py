"""One loaded version of a model, and the tasks that it can run."""

from base64 import b64encode
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dropserve.models import checkpoint
from dropserve.models.comparison import Layer, Moments, compare
from dropserve.models.examples import Example
from dropserve.models.montecarlo import Precision, Sample, Sampler, Statistics, Summary, watch
from dropserve.models.sequential import compile_for_inference, convert_memory_format
from dropserve.service.errors import ServerError
from dropserve.service.inference.decoder import Pixels
from dropserve.service.schemas import DEFAULT_SAMPLES, MaskKind

_INLINE = 0.005
"""Seconds that a network may block the event loop: as long as Python lets a thread block another.
Decoding the small images of a batch takes as long again, at worst."""
_SLOW = 1.0
"""Seconds after which a task is slow without a second try."""
_SIZES = (1, 8, 32)
"""Batches, by images, that are measured."""
_PART = 64
"""Images sampled together: enough to be fast, few enough that other jobs can run in between."""
_NOT_FINITE = "the network's output is not finite for this image"

Answer = Mapping[str, Any]
"""Ready for JSON, with NumPy float32 for numbers."""


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
    """One version of a model: loaded, verified, and run once.

    Args:
        path: the version's folder.
        factories: those that its checkpoint may import and call.
        precision: of Monte Carlo dropout.

    Raises:
        CheckpointError, UnsupportedModule: it cannot be served; says why.

    Attributes:
        inline: most images that run in under 5 ms, by the type of the task: for Uncertainty, with
            as many samples as `DEFAULT_SAMPLES` and the masks of a new seed.
        manifest_sha256: of every byte of its files; None: it has no manifest.
    """

    def __init__(
        self,
        name: str,
        version: int,
        path: Path,
        factories: Sequence[str] = (),
        precision: Precision = "float32",
    ) -> None:
        self.name = name
        self.version = version
        found = checkpoint.read(path)
        self._module, self._metadata = found.build(factories), found.metadata
        self.manifest_sha256 = found.manifest_sha256
        del found  # its tensors, of which the module has copies
        self._preprocessing = self._metadata.preprocessing
        convert_memory_format(self._module)
        blank = torch.zeros(1, *self._preprocessing.shape, dtype=torch.uint8)
        x = self._preprocessing.normalize(blank)
        self._eval = compile_for_inference(self._module, x)
        self._sampler = Sampler(self._module, x, precision)
        self._sampler.warm_up(x)
        self.inline: dict[type[Task], int] = {
            type(task): self._measure_inline(task) for task in (Predict(), Uncertainty())
        }

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of probabilities."""
        return self._metadata.classes

    @property
    def examples(self) -> tuple[Example, ...]:
        """Images of the test set, if it was saved with any."""
        return self._metadata.examples

    def prepare(self, image: Image.Image) -> Pixels:
        """Turn an image into the network's pixels, uint8 [C, H, W]; any thread may call it."""
        return self._preprocessing.prepare(image)

    def run(self, task: Task, requests: Sequence[Pixels]) -> Generator[None, None, list[Answer]]:
        """Answer requests of one task together, in steps: other work may run between them.

        Args:
            task: what to do.
            requests: pixels uint8 [B, C, H, W], a request each.

        Returns:
            An answer a request; `predictions` are in the order of its images.
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
        else:
            found = yield from self._uncertainty(task, x)
        rest = iter(found)
        return [{"predictions": [*islice(rest, len(pixels))]} for pixels in requests]

    def stream(self, task: Stream, pixels: Pixels) -> Iterator[Answer]:
        """Answer one request in steps, each with something to tell.

        Args:
            task: what to do.
            pixels: uint8 [1, C, H, W].

        Yields:
            `{event: a list of its data}`: a start, the samples in order, some at a time, and an
            end that says what `run` returns.
        """
        x = self._input(pixels)
        yield {"start": [self._start(task, pixels[0], x)]}
        statistics = Statistics(task.samples, task.masks, task.level)
        for some in watch(self._sampler, x, task.samples, task.seed, task.masks, statistics):
            yield {"sample": [_sample(sample) for sample in some]}
        yield {"end": [{"predictions": self._answers(task, statistics.summary(), [])}]}

    def details(self) -> dict[str, Any]:
        """Describe this version; the fields of `ModelDetails` that it knows."""
        metadata, preprocessing = self._metadata, self._preprocessing
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
            "path": self._sampler.path,
            "precision": asdict(self._sampler.precision),
            "network": metadata.network.to_json(),
            "data": dict(metadata.data),
            "evaluation": dict(metadata.evaluation),
            "sha256": metadata.sha256,
            "torch_version": metadata.torch_version,
        }

    def is_inline(self, task: Task, images: int) -> bool:
        """Say if a batch takes so little time that it may run on the event loop."""
        if isinstance(task, Uncertainty) and task.samples > DEFAULT_SAMPLES:
            return False
        return images <= self.inline.get(type(task), 0)

    def _measure_inline(self, task: Task) -> int:
        random, most = np.random.default_rng(0), 0
        for images in _SIZES:
            pixels = random.integers(0, 256, (images, *self._preprocessing.shape), np.uint8)
            seconds = self._time(task, pixels)  # the first time makes what the next ones find
            if seconds < _SLOW:
                seconds = self._time(task, pixels)
            if seconds > _INLINE:
                break
            most = images
        return most

    def _time(self, task: Task, pixels: Pixels) -> float:
        started = perf_counter()
        for _ in self.run(task, [pixels]):
            pass
        return perf_counter() - started

    def _sites(self) -> list[dict[str, Any]]:
        return [
            {"name": s.name, "kind": s.kind, "p": s.p, "shape": list(s.shape), "units": s.units}
            for s in self._sampler.sites
        ]

    def _start(self, task: Stream, pixels: Pixels, x: Tensor) -> Answer:
        channels, height, width = pixels.shape
        seen = {"height": height, "width": width, "channels": channels}
        return {
            "level": task.level,
            "classes": self.classes,
            "eval": self._predict(x)[0]["probabilities"],
            "input": {**seen, "pixels": _base64(pixels.transpose(1, 2, 0))},
            "sites": self._sites(),
        }

    def _input(self, pixels: Pixels) -> Tensor:
        return self._preprocessing.normalize(torch.from_numpy(pixels))

    def _predict(self, x: Tensor) -> list[Answer]:
        with torch.inference_mode():
            probabilities = self._eval(x).float().softmax(-1).numpy()
        classes, answers = self.classes, list[Answer]()
        for row, k in zip(probabilities, probabilities.argmax(1).tolist(), strict=True):
            probability = row[k]
            if probability != probability:  # NaN is the greatest to argmax
                raise ServerError(_NOT_FINITE)
            answers.append(
                {"label": classes[k], "index": k, "probability": probability, "probabilities": row}
            )
        return answers

    def _uncertainty(self, task: Uncertainty, x: Tensor) -> Generator[None, None, list[Answer]]:
        answers: list[Answer] = []
        for part in torch.split(x, _PART):
            if answers:
                yield
            statistics = Statistics(task.samples, task.masks, task.level)
            sampled = []
            for chunk in self._sampler.chunks(part, task.samples, task.seed, task.masks):
                statistics.add(chunk)
                if task.include_samples:
                    sampled.append(chunk)
                if not statistics.complete:
                    yield
            answers += self._answers(task, statistics.summary(), sampled)
        return answers

    def _answers(
        self, task: Uncertainty, summary: Summary, sampled: Sequence[Tensor]
    ) -> list[Answer]:
        """Put a summary into words, an answer an image; `sampled` probabilities are [C, B, t]."""
        _finite(summary.mean.numpy())
        figures = vars(summary)
        rows = {name: _float32(v) for name, v in figures.items() if isinstance(v, Tensor)}
        lower, upper = rows.pop("lower"), rows.pop("upper")
        of_all = {n: v for n, v in figures.items() if not isinstance(v, Tensor)}  # None or a number
        answers: list[Answer] = []
        for i, k in enumerate(rows["mean"].argmax(1).tolist()):
            answer = {"label": self.classes[k], "index": k, **of_all}
            answer |= {name: row[i] for name, row in rows.items()}
            answer["interval"] = {"level": task.level, "lower": lower[i], "upper": upper[i]}
            if task.include_samples:
                probabilities = torch.cat([chunk[:, i] for chunk in sampled], 1)
                answer["sample_probabilities"] = probabilities.T.contiguous().numpy()
            answers.append(answer)
        return answers

    def _compare(self, task: Compare, x: Tensor) -> Generator[None, None, Answer]:
        found = yield from compare(self._module, self._sampler, x, task.passes, task.seed, task.p)
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
        return {"predictions": predictions, "layers": [_layer(layer) for layer in found.layers]}


def _sample(sample: Sample) -> Answer:
    _finite(sample.probabilities)
    return {**vars(sample), "kept": [_base64(bits) for bits in sample.kept]}


def _base64(values: npt.NDArray[np.uint8]) -> str:
    return b64encode(values.tobytes()).decode()


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        raise ServerError(_NOT_FINITE)
    return values


def _float32(values: Tensor) -> npt.NDArray[np.float32]:
    """Round to float32: JSON then has as many digits as the network's answer means."""
    return values.contiguous().numpy().astype(np.float32)


def _layer(layer: Layer) -> Answer:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "p": layer.p,
        "eval": _moments(layer.eval),
        "train": _moments(layer.train),
    }


def _moments(moments: Moments) -> Answer:
    return {"mean": np.float32(moments.mean), "variance": np.float32(moments.variance)}
