"""What /metrics reports about one application, for Prometheus.

Observations are appended to plain lists (0.3 us each) and flushed into prometheus_client's metrics
twice a second and before each answer: counting each one there would cost ten times as much. Every
worker writes files of its own; the one that answers /metrics adds them up.
"""

import asyncio
import logging
import os
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dropserve.service.errors import OverloadReason

CLIENT_CLOSED = 499  # what nginx logs for a client that went away; never sent
REASONS = get_args(OverloadReason)
FLUSH_SECONDS = 0.5
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Buckets of request durations: those of OpenTelemetry's http.server.request.duration."""
_WAITS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1)
_NATS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1)
_log = logging.getLogger("dropserve.metrics")


class _Store(Protocol):
    """The models; iterating yields the names that are served."""

    @property
    def loads(self) -> Mapping[tuple[str, str], int]: ...  # by model and "loaded" or "refused"
    @property
    def problem(self) -> str | None: ...  # why new versions cannot be found
    def __iter__(self) -> Iterator[str]: ...
    def versions(self, name: str) -> Collection[int]: ...
    def models(self) -> Collection[str]: ...
    def state(self, name: str) -> Mapping[str, Any]: ...
    def count_refused(self, name: str) -> int: ...


class _Source(Protocol):
    """Whose present state the gauges report."""

    @property
    def queued(self) -> int: ...
    @property
    def store(self) -> _Store: ...


class _Buffer(defaultdict[tuple[Any, ...], list[float]]):
    """Observations not flushed yet, by their labels. One thread drains, any thread may append."""

    def __init__(self) -> None:
        super().__init__(list)

    def drain(self) -> Iterator[tuple[tuple[Any, ...], list[float]]]:
        """Take out and yield what is there."""
        for labels, values in list(self.items()):
            taken = values[:]
            del values[: len(taken)]  # what another thread has appended since then stays
            if taken:
                yield labels, taken


class _Histogram(Histogram):
    def observe_all(self, values: Sequence[float]) -> None:
        buckets = np.searchsorted(self._upper_bounds, values)  # the first bound >= value
        self._sum.inc(float(np.sum(values, dtype=np.float64)))
        for bucket, count in enumerate(np.bincount(buckets).tolist()):
            if count:
                self._buckets[bucket].inc(count)


class Metrics:
    """Records what happens to one application, and writes it for Prometheus."""

    def __init__(self) -> None:
        registry = self._exposed = CollectorRegistry()
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # prometheus_client writes there, too
        self._folder = Path(folder) if folder else None
        if folder:
            self._exposed = CollectorRegistry()
            _Workers(self._exposed, folder)  # type: ignore[no-untyped-call]

        counter = partial(Counter, namespace="dropserve", registry=registry)
        histogram = partial(_Histogram, namespace="dropserve", registry=registry)
        gauge = partial(Gauge, namespace="dropserve", registry=registry)
        total = partial(gauge, multiprocess_mode="livesum")  # of all workers
        largest = partial(gauge, multiprocess_mode="livemax")
        smallest = partial(gauge, multiprocess_mode="livemin")

        labels = ["route", "model", "version", "status"]
        self._requests = counter("requests_total", "Requests answered.", labels)
        text = "From a request's first line to the end of its answer."
        labels = ["route", "model", "status"]
        self._seconds = histogram("request_duration_seconds", text, labels, buckets=SECONDS)
        self._shed = counter("shed_total", "Requests refused with 503.", ["reason"])
        for reason in REASONS:
            self._shed.labels(reason)  # so that it is 0, not absent, until it happens
        text, labels = "Requests answered, by the name of their API key.", ["key", "status"]
        self._key_requests = counter("key_requests_total", text, labels)
        self._cancelled = counter("cancelled_total", "Requests whose client went away.")

        text = "From the queue to a batch."
        self._waits = histogram("queue_wait_seconds", text, ["task"], buckets=_WAITS)
        self._sizes = histogram("batch_images", "Images of a batch.", ["task"], buckets=_IMAGES)
        self._queued = total("queue_images", "Images in the queue.")
        self._samples = counter("samples_total", "Monte Carlo samples times images.", ["model"])
        text, labels = "Probability of the label.", ["model", "task"]
        self._confidence = histogram("confidence", text, labels, buckets=_CONFIDENCE)
        text = "Uncertainty of the model."
        self._information = histogram("mutual_information_nats", text, ["model"], buckets=_NATS)

        text, labels = "Versions loaded or refused.", ["model", "result"]
        self._loads = counter("model_loads_total", text, labels)
        self._loaded = total("model_loaded", "Workers that serve it.", ["model", "version"])
        text = "Version for requests that name none."
        self._latest = smallest("model_version", text, ["model"])
        self._refused = largest("model_refused_versions", "Not loadable.", ["model"])
        self._changed = largest("model_changed_versions", "Served from memory.", ["model"])
        text = "Whether the pinned version does not answer."
        self._pin_failed = largest("model_pin_failed", text, ["model"])
        text = "Whether new versions cannot be found now; what is served stays served."
        self._problem = largest("checkpoints_problem", text)
        total("workers", "Processes that serve.").set(1)
        largest("info", "The release.", ["version"]).labels(version("dropserve")).set(1)

        self._pending = _Buffer()  # by histogram and its labels
        self.requests = _Buffer()  # seconds by route, model, version and status
        self._keys: Tally[tuple[str, int]] = Tally()  # requests by name of the key and status
        self._counted_loads: dict[tuple[str, str], int] = {}
        self._served: set[tuple[str, int]] = set()
        self._models: set[str] = set()

    def record_request(
        self, route: str, model: str, version: object, status: int, seconds: float
    ) -> None:
        """Record an answered request; model and version are "" where it did not reach one."""
        self.requests[route, model, version, status].append(seconds)

    def record_key(self, name: str, status: int) -> None:
        """Count an answered request that came with a key of this name; on the event loop only."""
        self._keys[name, status] += 1

    def record_shed(self, reason: str) -> None:
        """Count a request that is refused with 503."""
        self._shed.labels(reason).inc()

    def record_batch(self, task: str, images: int, waits: Sequence[float]) -> None:
        """Record a batch as it starts, and the seconds that its requests waited for it."""
        self._pending[self._waits, task] += waits
        self._pending[self._sizes, task].append(images)

    def record_answers(
        self, model: str, task: object, answers: Sequence[Mapping[str, Any] | Exception]
    ) -> None:
        """Record the answers to a batch of one task: `samples` is an attribute of it, or absent."""
        predictions = [
            p for answer in answers if isinstance(answer, Mapping) for p in answer["predictions"]
        ]
        if samples := getattr(task, "samples", 0):
            self._samples.labels(model).inc(samples * len(predictions))
            confidence = [p["mean"][p["index"]] for p in predictions]
            self._pending[self._confidence, model, "uncertainty"] += confidence
            information = [p["mutual_information"] for p in predictions]
            self._pending[self._information, model] += information
        elif predictions and "probability" in predictions[0]:
            confidence = [p["probability"] for p in predictions]
            self._pending[self._confidence, model, "predict"] += confidence

    async def flush_loop(self, source: _Source) -> None:
        """Flush twice a second, until cancelled."""
        while True:
            try:
                self.flush(source)
            except Exception:  # it is tried again, and requests must not fail for it
                _log.exception("metrics are late")
            await asyncio.sleep(FLUSH_SECONDS)

    def flush(self, source: _Source) -> None:
        """Update the metrics; call it on the event loop only."""
        for (route, model, number, status), seconds in self.requests.drain():
            self._requests.labels(route, model, number, status).inc(len(seconds))
            self._seconds.labels(route, model, status).observe_all(seconds)
            if status == CLIENT_CLOSED:
                self._cancelled.inc(len(seconds))
        for (key_name, status), count in self._keys.items():
            self._key_requests.labels(key_name, status).inc(count)
        self._keys.clear()
        for (histogram, *labels), values in self._pending.drain():
            histogram.labels(*labels).observe_all(values)
        self._queued.set(source.queued)
        store = source.store
        served = {(name, number) for name in store for number in store.versions(name)}
        for name, number in served | self._served:
            self._loaded.labels(name, number).set((name, number) in served)
        self._served = served
        self._models.update(store.models())
        for name in self._models:
            state = store.state(name)
            answers = state["version"] or max(state["on_request"], default=0)
            self._latest.labels(name).set(answers)
            self._refused.labels(name).set(store.count_refused(name))
            self._changed.labels(name).set(len(state["changed"]))
            self._pin_failed.labels(name).set(state["pin_problem"] is not None)
        self._problem.set(store.problem is not None)
        for key, count in dict(store.loads).items():
            self._loads.labels(*key).inc(count - self._counted_loads.get(key, 0))
            self._counted_loads[key] = count

    def write(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format asked for, and its content type; takes milliseconds."""
        if self._folder is not None:
            _remove_dead(self._folder)
        encode, content_type = choose_encoder(accept)
        return encode(self._exposed), content_type


class _Workers(MultiProcessCollector):
    """Adds up the files of all workers, except empty ones, by which prometheus_client fails.

    A worker makes a file before it writes to it, and leaves it so if it is killed (issue 1199 of
    client_python).
    """

    def collect(self) -> Any:  # noqa: ANN401  its base class has no types
        """Return the metrics of all workers."""
        files = [str(path) for path in Path(self._path).glob("*.db") if _has_bytes(path)]
        return self.merge(files)  # type: ignore[no-untyped-call]


def _has_bytes(path: Path) -> bool:
    with suppress(FileNotFoundError):  # the gauges of a worker that has ended
        return path.stat().st_size > 0
    return False


def _remove_dead(folder: Path) -> None:
    """Remove the gauges of dead workers; several threads may do so at once."""
    for path in folder.glob("gauge_live*.db"):
        process = int(path.stem.rpartition("_")[2])
        try:
            os.kill(process, 0)
        except OSError:  # it is dead, or another user's by now
            with suppress(FileNotFoundError):  # another thread removed it
                mark_process_dead(process, folder)  # type: ignore[no-untyped-call]
