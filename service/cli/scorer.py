"""Scores images by a version that is loaded here, without HTTP; loads PyTorch.

A thread reads and decodes the next images while the network runs on the last. Small ones are
decoded on the network's own thread: both threads would wait for the interpreter's lock (GIL).
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from time import thread_time
from typing import Any

import numpy as np
import orjson
import torch

from dropserve.models.device import find_device
from dropserve.models.memory import keep_freed_memory
from dropserve.service.cli import scores
from dropserve.service.cli.options import repository
from dropserve.service.cli.scores import Row, Run, Timings, failed
from dropserve.service.cli.terminal import Refused
from dropserve.service.errors import RequestError
from dropserve.service.http.images import are_small, encoded, prepared_alone
from dropserve.service.inference.classifier import (
    NOT_FINITE,
    Classifier,
    Predict,
    Uncertainty,
)
from dropserve.service.inference.decoder import Pixels
from dropserve.service.schemas import MEASURES
from dropserve.service.settings import Settings

_BATCH = 128
"""Images that are decoded, and then run, together."""
Image = tuple[str, bytes | OSError]
"""What an image is called, and its file's bytes or why there are none."""


@dataclass
class _Batch:
    names: list[str]
    rows: list[Row | None]  # of images that could not be decoded
    pixels: Pixels | None  # uint8 [B, C, H, W] of the others
    small: bool  # is decoding them so little work that another thread would cost more?
    seconds: float


class Scorer:
    """One version, loaded once, on one thread.

    Raises:
        ModelsError, InvalidRequest: the version cannot be loaded, or has no noise to sample.
        Refused: it is not the one that the run began with.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        keep_freed_memory()
        torch.set_num_threads(1)
        models, name, version = repository(settings), run.model, run.version
        device, precision = find_device(settings.device), scores.precision(settings)
        with models.local(name, version) as path:
            self._model = Classifier(name, version, path, settings.factories, precision, device)
        if (found := self._model.details()["sha256"]) != run.sha256:
            place = models.place(name, version)
            raise Refused(f"{place} was exchanged: it has sha256 {found}, not {run.sha256}")
        self._task: Predict | Uncertainty = Predict()
        if run.mode == "uncertainty":
            self._task = Uncertainty(run.samples or 0, run.seed or 0)
            self._model.require_sampler()
        self._limits = settings
        self._thread = ThreadPoolExecutor(1, "decoding")

    def score(self, images: Iterable[Image]) -> tuple[list[Row], Timings]:
        """Score images, in order; one that cannot be decoded has a row that says why."""
        rest, rows, timings = iter(images), list[Row](), Timings()
        batch = self._decode(rest)
        while batch.names:
            ahead = None if batch.small else self._thread.submit(self._decode, rest)
            started = thread_time()
            rows += self._rows(batch)
            timings += Timings(batch.seconds, thread_time() - started)
            batch = ahead.result() if ahead else self._decode(rest)
        return rows, timings

    def _decode(self, images: Iterator[Image]) -> _Batch:
        started = thread_time()
        names, rows, pixels, small = list[str](), list[Row | None](), [], True
        for name, data in islice(images, _BATCH):
            names.append(name)
            try:
                if isinstance(data, OSError):
                    raise data
                scores.require_size(len(data), self._limits.max_body_bytes)
                image = encoded(data, None, self._limits)
                small = small and are_small([image])
                pixels.append(prepared_alone(image, self._model))
                rows.append(None)
            except (RequestError, OSError) as error:
                rows.append(failed(name, error))
            except MemoryError:
                rows.append(failed(name, "there is not enough memory to decode it"))
        together = np.concatenate(pixels) if pixels else None
        return _Batch(names, rows, together, small, thread_time() - started)

    def _rows(self, batch: _Batch) -> list[Row]:
        """Make a row of each image; numbers have as many digits as in the service's answers."""
        if batch.pixels is None:
            return [row for row in batch.rows if row is not None]
        found = self._model.columns(self._task, batch.pixels)
        finite, classes = np.isfinite(found["probability"]), self._model.classes
        index = found["index"].tolist()
        unknown = [None] * len(index)
        columns: list[Any] = [
            [name for name, row in zip(batch.names, batch.rows, strict=True) if row is None],
            [classes[k] for k in index],
            index,
            _rounded(found["probability"]),
            *(_rounded(found[name]) if name in found else unknown for name in MEASURES),
            [self._model.name] * len(index),
            [self._model.version] * len(index),
            unknown,
        ]
        rows: list[Row] = [*zip(*columns, strict=True)]
        if not finite.all():
            rows = [
                r if ok else failed(r[0], NOT_FINITE) for r, ok in zip(rows, finite, strict=True)
            ]
        scored = iter(rows)
        return [next(scored) if row is None else row for row in batch.rows]


def _rounded(values: Any) -> list[float]:  # noqa: ANN401  an array [B] of floats
    """Round to float32, and write each in the fewest digits that tell it from others."""
    whole = np.ascontiguousarray(values, np.float32)
    found: list[float] = orjson.loads(orjson.dumps(whole, option=orjson.OPT_SERIALIZE_NUMPY))
    return found
