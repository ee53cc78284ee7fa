"""What a service's metrics say of the last seconds: the difference between two looks at them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from dropserve.service.http.keys import OPERATIONS
from dropserve.service.schemas import Readiness

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

Chosen = Callable[[Mapping[str, str]], bool]


@dataclass(frozen=True)
class ModelFigures:
    """What a model did; None where it did nothing.

    Attributes:
        version: the one that answers where none is named.
        others: versions that answer where they are named.
        refused: versions that cannot be served.
        requests: a second.
        confidence: mean probability of the label.
        mutual_information: mean, in nats.
    """

    version: int
    others: list[int]
    refused: list[int]
    requests: float
    confidence: float | None
    mutual_information: float | None


@dataclass(frozen=True)
class Figures:
    """What a service did.

    Attributes:
        seconds: that the figures are of.
        workers: processes that serve.
        requests: a second, probes and scrapes not counted.
        errors: answers of 500 and above, a second.
        p50, p99: seconds of a request, read from a histogram's buckets.
        queue: images that wait just now.
        batch: mean images of a batch.
        samples: Monte Carlo samples a second, times images.
        models: by name.
    """

    seconds: float
    workers: int
    requests: float
    errors: float
    p50: float | None
    p99: float | None
    queue: int
    batch: float | None
    samples: float
    models: dict[str, ModelFigures] = field(default_factory=dict)


def any_labels(_: Mapping[str, str]) -> bool:
    """Choose every sample."""
    return True


class Look:
    """The metrics at one moment.

    Args:
        text: in the Prometheus format.
        readiness: of the same moment.
        time: in seconds, of any clock that does not jump.

    Raises:
        ValueError: the text is something else.
    """

    def __init__(self, text: str, readiness: Readiness, time: float) -> None:
        self.readiness, self.time = readiness, time
        self._samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append(sample)

    def total(self, name: str, chosen: Chosen = any_labels) -> float:
        """Add up a metric over its labels."""
        return sum(s.value for s in self._samples.get(f"dropserve_{name}", ()) if chosen(s.labels))

    def below(self, name: str, chosen: Chosen = any_labels) -> dict[float, float]:
        """Return how many values of a histogram are at most each of its bounds, ascending."""
        counts: dict[float, float] = {}
        for sample in self._samples.get(f"dropserve_{name}_bucket", ()):
            if chosen(sample.labels):
                bound = float(sample.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + sample.value
        return dict(sorted(counts.items()))


def between(before: Look, after: Look) -> Figures:
    """Say what happened between two looks."""
    seconds = max(after.time - before.time, 1e-9)

    def gained(name: str, chosen: Chosen = any_labels) -> float:
        was, now = before.total(name, chosen), after.total(name, chosen)
        return now - was if now >= was else now  # the service was started again

    def mean(name: str, chosen: Chosen = any_labels) -> float | None:
        count = gained(f"{name}_count", chosen)
        return gained(f"{name}_sum", chosen) / count if count else None

    def asked(labels: Mapping[str, str]) -> bool:
        return labels["route"] not in OPERATIONS

    def failed(labels: Mapping[str, str]) -> bool:
        return asked(labels) and labels["status"] >= "500"

    def figures_of(name: str) -> ModelFigures:
        def own(labels: Mapping[str, str]) -> bool:
            return labels["model"] == name

        state = after.readiness.models[name]
        return ModelFigures(
            version=state.version or 0,
            others=[version for version in state.versions if version != state.version],
            refused=[refused.version for refused in state.refused],
            requests=gained("requests_total", own) / seconds,
            confidence=mean("confidence", own),
            mutual_information=mean("mutual_information_nats", own),
        )

    was, now = (look.below("request_duration_seconds", asked) for look in (before, after))
    durations = {bound: max(count - was.get(bound, 0.0), 0.0) for bound, count in now.items()}
    return Figures(
        seconds=seconds,
        workers=round(after.total("workers")),
        requests=gained("requests_total", asked) / seconds,
        errors=gained("requests_total", failed) / seconds,
        p50=quantile(0.5, durations),
        p99=quantile(0.99, durations),
        queue=round(after.total("queue_images")),
        batch=mean("batch_images"),
        samples=gained("samples_total") / seconds,
        models={name: figures_of(name) for name in after.readiness.models},
    )


def quantile(q: float, below: Mapping[float, float]) -> float | None:
    """Estimate a quantile from a histogram, evenly spread within a bucket, as Prometheus does.

    Args:
        q: 0 to 1.
        below: how many values are at most each bound; ascending, the last one infinite.
    """
    total = max(below.values(), default=0.0)
    if not total:
        return None
    lower, passed = 0.0, 0.0
    for bound, count in below.items():
        if count >= q * total and count > passed:
            share = (q * total - passed) / (count - passed)
            return lower if math.isinf(bound) else lower + (bound - lower) * share
        lower, passed = bound, count
    return lower
