"""What /metrics says about one application, for Prometheus.

What happens is written down in plain lists, 0.3 us an event, and poured into prometheus_client's
metrics twice a second and before each answer: counting each event there would cost ten times as
much. With several workers each pours into files of its own, and whichever is asked adds them up.
"""

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dropserve.service.http.request_log import CLIENT_CLOSED
from dropserve.service.inference.classifier import Answer, Predict, Task, Uncertainty
from dropserve.service.inference.workers import METRICS_FOLDER, lives

if TYPE_CHECKING:
    from dropserve.service.inference.inference import Inference

_Key = TypeVar("_Key", bound=tuple[object, ...])
_log = logging.getLogger("dropserve.metrics")
PULSE = 0.5
"""Seconds that another worker's figures may lag behind."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Of requests: the buckets of OpenTelemetry's http.server.request.duration."""
_WAITS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1)
_NATS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1)


class _Distribution(Histogram):
    """A histogram that takes many values at once."""

    def observe_all(self, values: Sequence[float]) -> None:
        """Observe each of the values."""
        places = np.searchsorted(self._upper_bounds, values)  # the first bound >= value
        self._sum.inc(float(np.sum(values, dtype=np.float64)))
        for place, count in enumerate(np.bincount(places).tolist()):
            if count:
                self._buckets[place].inc(count)


class _Events(defaultdict[_Key, list[float]]):
    """Values not poured yet, a list a set of labels. One thread pours, and any may append."""

    def __init__(self) -> None:
        super().__init__(list)

    def take(self) -> Iterator[tuple[_Key, list[float]]]:
        """Take out what is there."""
        for key, values in list(self.items()):
            taken = values[:]
            del values[: len(taken)]  # what another thread has appended since stays
            if taken:
                yield key, taken


class Metrics:
    """The metrics of one application, and where what happens is written down.

    Attributes:
        requests: seconds by route, model, version and status.
    """

    def __init__(self) -> None:
        registry = CollectorRegistry()
        folder = os.environ.get(METRICS_FOLDER)
        self._folder = Path(folder) if folder else None
        self._exposed = registry
        if self._folder is not None:
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed, folder)  # type: ignore[no-untyped-call]

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dropserve_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str, of: Any = "livesum") -> Gauge:  # noqa: ANN401
            return Gauge(f"dropserve_{name}", text, labels, registry=registry, multiprocess_mode=of)

        def histogram(
            name: str, text: str, *labels: str, buckets: Sequence[float]
        ) -> _Distribution:
            return _Distribution(
                f"dropserve_{name}", text, labels, registry=registry, buckets=buckets
            )

        self._requests = counter(
            "requests_total", "Requests answered.", "route", "model", "version", "status"
        )
        self._seconds = histogram(
            "request_duration_seconds",
            "From a request's first line to the end of its answer.",
            *("route", "model", "status"),
            buckets=SECONDS,
        )
        self._shed = counter("shed_total", "Requests answered 503.", "reason")
        self._cancelled = counter("cancelled_total", "Requests whose client went away.")
        self._waits = histogram(
            "queue_wait_seconds", "From the queue to a batch.", "task", buckets=_WAITS
        )
        self._batches = histogram("batch_images", "Images of a batch.", "task", buckets=_IMAGES)
        self._depth = gauge("queue_images", "Images in the queue.")
        self._samples = counter("samples_total", "Monte Carlo samples times images.", "model")
        self._confidence = histogram(
            "confidence", "Probability of the label.", "model", "task", buckets=_CONFIDENCE
        )
        self._information = histogram(
            "mutual_information_nats", "Doubt of the model itself.", "model", buckets=_NATS
        )
        self._loads = counter("model_loads_total", "Versions loaded or refused.", "model", "result")
        self._latest = gauge(
            "model_version", "Version that answers where none is named.", "model", of="livemin"
        )
        self._loaded = gauge("model_loaded", "Workers that serve it.", "model", "version")
        self._refused = gauge("model_refused_versions", "Not served.", "model", of="livemax")
        self._changed = gauge(
            "model_changed_versions", "Served from memory.", "model", of="livemax"
        )
        self._pin_failed = gauge(
            "model_pin_failed", "Whether another than the pinned answers.", "model", of="livemax"
        )
        gauge("workers", "Processes that serve.").set(1)
        gauge("info", "The release.", "version", of="livemax").labels(version("dropserve")).set(1)

        self.requests: _Events[tuple[str, str, object, int]] = _Events()
        self._waited: _Events[tuple[str]] = _Events()
        self._sizes: _Events[tuple[str]] = _Events()
        self._drawn: _Events[tuple[str]] = _Events()
        self._confidences: _Events[tuple[str, str]] = _Events()
        self._informations: _Events[tuple[str]] = _Events()
        self._counted: dict[tuple[str, str], int] = {}
        self._served: set[tuple[str, int]] = set()
        self._models: set[str] = set()

    def shed(self, reason: str) -> None:
        """Count a request that was answered 503."""
        self._shed.labels(reason).inc()

    def batch(self, task: str, images: int, waits: Sequence[float]) -> None:
        """Note a batch as it starts, and the seconds that its requests waited for it."""
        self._waited[(task,)] += waits
        self._sizes[(task,)].append(images)

    def answered(self, model: str, task: Task, answers: Sequence[Answer | Exception]) -> None:
        """Note the answers to a batch of one task."""
        predictions = [
            p for answer in answers if isinstance(answer, Mapping) for p in answer["predictions"]
        ]
        if isinstance(task, Predict):
            self._confidences[model, "predict"] += [p["probability"] for p in predictions]
        elif isinstance(task, Uncertainty):
            self._drawn[(model,)].append(task.samples * len(predictions))
            self._confidences[model, "uncertainty"] += [p["mean"][p["index"]] for p in predictions]
            self._informations[(model,)] += [p["mutual_information"] for p in predictions]

    async def keep_up(self, inference: "Inference") -> None:
        """Pour twice a second, until cancelled."""
        while True:
            try:
                self.pour(inference)
            except Exception:  # the next time may do better, and requests must not end with it
                _log.exception("metrics are late")
            await asyncio.sleep(PULSE)

    def pour(self, inference: "Inference") -> None:
        """Bring the metrics up to date; on the event loop alone."""
        for (route, model, number, status), seconds in self.requests.take():
            self._requests.labels(route, model, number, status).inc(len(seconds))
            self._seconds.labels(route, model, status).observe_all(seconds)
            if status == CLIENT_CLOSED:
                self._cancelled.inc(len(seconds))
        for (model,), samples in self._drawn.take():
            self._samples.labels(model).inc(sum(samples))
        events: list[tuple[_Distribution, _Events[Any]]] = [
            (self._waits, self._waited),
            (self._batches, self._sizes),
            (self._confidence, self._confidences),
            (self._information, self._informations),
        ]
        for histogram, waiting in events:
            for labels, values in waiting.take():
                histogram.labels(*labels).observe_all(values)
        self._look(inference)

    def _look(self, inference: "Inference") -> None:
        """Read off what is so just now."""
        self._depth.set(inference.queued)
        store = inference.store
        served = {(n, v) for n in store for v in store.versions(n)}
        for name, number in served | self._served:
            self._loaded.labels(name, number).set((name, number) in served)
        self._served = served
        self._models.update(store.models())
        for name in self._models:
            state = store.state(name)
            self._latest.labels(name).set(state["version"] or 0)
            self._refused.labels(name).set(len(state["refused"]))
            self._changed.labels(name).set(len(state["changed"]))
            self._pin_failed.labels(name).set(state["pin_problem"] is not None)
        for key, count in dict(store.loads).items():
            self._loads.labels(*key).inc(count - self._counted.get(key, 0))
            self._counted[key] = count

    def write(self, accept: str) -> tuple[bytes, str]:
        """Write all metrics in the format that is asked for; takes milliseconds.

        Returns:
            The text and its content type.
        """
        if self._folder is not None:
            _forget_the_dead(self._folder)
        encode, content_type = choose_encoder(accept)
        return encode(self._exposed), content_type


def _forget_the_dead(folder: Path) -> None:
    """Remove what dead workers said of themselves; several threads may be at it."""
    for path in folder.glob("gauge_live*.db"):
        process = int(path.stem.rpartition("_")[2])
        if not lives(process):
            with suppress(FileNotFoundError):  # another was quicker
                mark_process_dead(process, folder)  # type: ignore[no-untyped-call]
