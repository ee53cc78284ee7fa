"""`dropserve watch`: live figures of a service, from two snapshots of its metrics."""

import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dropserve.service.cli.options import Opt, Port, Url, find_service
from dropserve.service.cli.terminal import console, say
from dropserve.service.client import DropserveClient
from dropserve.service.errors import (
    DropserveError,
    Overloaded,
    ServerError,
    TooManyRequests,
    Unreachable,
)
from dropserve.service.schemas import Readiness

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

Figures = dict[str, Any]  # as `between` makes them
_WINDOW = 10  # intervals that figures are averaged over
_HISTORY = 40  # intervals in the sparkline
_TICKS = " ▁▂▃▄▅▆▇█"


def watch(
    url: Url = None,
    port: Port = None,
    interval: Annotated[float, Opt(min=0.1, metavar="S", help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, Opt("--once", help="Print the figures of one interval.")] = False,
    as_json: Annotated[bool, Opt("--json", help="Print a line of JSON an interval.")] = False,
) -> None:
    """Show a running service live: traffic, latency, queue, confidence and uncertainty.

    Without a terminal, one line per interval.
    """
    service = find_service(url, port)
    client = DropserveClient(**service, retries=0, timeout=5.0)
    with client, suppress(KeyboardInterrupt):
        updates = watch_figures(client, interval)
        if as_json or once or not console().is_terminal:
            for now in updates:
                if once and isinstance(now, DropserveError):
                    raise now
                say(line(now, as_json=as_json))
                if once:
                    break
            return
        history: deque[float] = deque(maxlen=_HISTORY)
        waiting = Text(f"{service['url']}: waiting for two measurements ...")
        with Live(waiting, console=console(), auto_refresh=False) as live:
            for now in updates:
                live.update(draw(now, history, service["url"]), refresh=True)


def watch_figures(
    client: DropserveClient,
    interval: float,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Figures | DropserveError]:
    """Yield each interval the figures of the last few, or why the service does not answer.

    Raises:
        RequestError, ServerError: it needs a key, or has no metrics.
    """
    snapshots: deque[Snapshot] = deque(maxlen=_WINDOW + 1)
    while True:
        try:
            snapshots.append(Snapshot(client.metrics(), client.readiness(), clock()))
        except (Unreachable, Overloaded, TooManyRequests, ServerError) as error:
            snapshots.clear()
            yield error
        except ValueError as error:
            raise ServerError(f"/metrics is not in Prometheus's format: {error}") from error
        else:
            if len(snapshots) > 1:
                last = between(snapshots[-2], snapshots[-1])
                yield between(snapshots[0], snapshots[-1]) | {"requests": last["requests"]}
        sleep(interval)


class Snapshot:
    """The metrics at one moment, parsed or a ValueError, without those of probes and scrapes."""

    def __init__(self, text: str, readiness: Readiness, time: float) -> None:
        from dropserve.service.http.keys import OPERATIONS  # loads Starlette

        self.readiness, self.time = readiness, time
        self.samples: dict[str, list[Sample]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("route") not in OPERATIONS:
                    self.samples[sample.name.removeprefix("dropserve_")].append(sample)

    def total(self, name: str, **labels: str) -> float:
        """Sum a metric over all but these labels."""
        return sum(s.value for s in self.samples[name] if labels.items() <= s.labels.items())

    def buckets(self, name: str) -> dict[float, float]:
        """Return how many values of a histogram are at most each of its bounds, ascending."""
        counts: dict[float, float] = defaultdict(float)
        for sample in self.samples[f"{name}_bucket"]:
            counts[float(sample.labels["le"])] += sample.value
        return dict(sorted(counts.items()))


def between(before: Snapshot, after: Snapshot) -> Figures:
    """Return the figures between two snapshots; None without observations."""
    seconds = max(after.time - before.time, 1e-9)

    def gained(name: str, **labels: str) -> float:
        was, now = before.total(name, **labels), after.total(name, **labels)
        return now - was if now >= was else now  # the service was restarted

    def mean(name: str, **labels: str) -> float | None:
        count = gained(f"{name}_count", **labels)
        return gained(f"{name}_sum", **labels) / count if count else None

    was, now = (snapshot.buckets("request_duration_seconds") for snapshot in (before, after))
    durations = {bound: max(count - was.get(bound, 0.0), 0.0) for bound, count in now.items()}
    statuses = {sample.labels["status"] for sample in after.samples["requests_total"]}
    failed = [gained("requests_total", status=s) for s in statuses if s >= "500"]
    return {
        "seconds": seconds,
        "workers": round(after.total("workers")),
        "requests": gained("requests_total") / seconds,
        "errors": sum(failed) / seconds,
        "p50": quantile(0.5, durations),
        "p99": quantile(0.99, durations),
        "queue": round(after.total("queue_images")),
        "batch": mean("batch_images"),
        "samples": gained("samples_total") / seconds,  # times images
        "models": {
            name: {
                "version": state.version or max(state.on_request, default=0),
                "others": [version for version in state.versions if version != state.version],
                "refused": [refused.version for refused in state.refused],
                "requests": gained("requests_total", model=name) / seconds,
                "confidence": mean("confidence", model=name),
                "mutual_information": mean("mutual_information_nats", model=name),
            }
            for name, state in after.readiness.models.items()
        },
    }


def quantile(q: float, counts: Mapping[float, float]) -> float | None:
    """Estimate a quantile from the buckets of a histogram as Prometheus does, linearly in each."""
    wanted = q * max(counts.values(), default=0.0)
    for (lower, passed), (bound, count) in pairwise([(0.0, 0.0), *counts.items()]):
        if count >= wanted and count > passed:
            share = (wanted - passed) / (count - passed)
            return lower if math.isinf(bound) else lower + (bound - lower) * share
    return None


def line(now: Figures | DropserveError, *, as_json: bool = False) -> str:
    """Return figures, or the error in their place, as one line."""
    if isinstance(now, DropserveError):
        return json.dumps({"error": str(now)}) if as_json else f"no answer: {now}"
    if as_json:
        return json.dumps(now)
    models = ", ".join(
        f"{name} {m['version']}: confidence {_text('{:.1%}', m['confidence'])}, "
        f"mutual information {_text('{:.3f} nats', m['mutual_information'])}"
        + (f", refused {_list(m['refused'])}" if m["refused"] else "")
        for name, m in now["models"].items()
    )
    p50, p99 = (_text("{:.1f} ms", now[name], 1000) for name in ("p50", "p99"))
    return (
        f"{now['requests']:.1f} requests/s, p50 {p50}, p99 {p99}, {now['errors']:.1f} errors/s, "
        f"queue {now['queue']}, batch {_text('{:.1f}', now['batch'])}; {models}"
    )


def draw(now: Figures | DropserveError, history: deque[float], url: str) -> RenderableType:
    """Lay out figures, or the error in their place, for a terminal; adds to the `history`."""
    if isinstance(now, DropserveError):
        history.clear()
        return Text.assemble((f"{url}  no answer\n", "bold red"), str(now))
    history.append(now["requests"])
    workers = "1 worker" if now["workers"] == 1 else f"{now['workers']} workers"
    head = Text.assemble((url, "bold"), "  ", ("ready", "green"), f"  {workers}")
    figures = Table.grid(padding=(0, 2, 0, 0))
    most = max(history) or 1.0
    sparkline = "".join(_TICKS[round(value / most * (len(_TICKS) - 1))] for value in history)
    figures.add_row("requests", f"{now['requests']:,.1f}/s", sparkline)
    errors = Text(f"{now['errors']:,.1f}/s", style="bold red" if now["errors"] else "")
    figures.add_row("errors", errors, "responses of status 500 and above")
    p50, p99 = (_text("{:.1f} ms", now[name], 1000) for name in ("p50", "p99"))
    figures.add_row("latency", p50, f"half of all; {p99}: 99 of a hundred")
    figures.add_row("queue", f"{now['queue']:,}", "images that wait")
    figures.add_row("batch", _text("{:.1f}", now["batch"]), "images, on average")
    figures.add_row("samples", f"{now['samples']:,.0f}/s", "thinned networks, times images")
    models = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    models.add_column("model", overflow="fold")
    for heading in ("version", "others", "refused", "requests", "confidence", "mutual information"):
        models.add_column(heading, justify="right", no_wrap=True)
    for name, m in now["models"].items():
        refused, requests = Text(_list(m["refused"]), style="red"), f"{m['requests']:,.1f}/s"
        confidence = _text("{:.1%}", m["confidence"])
        information = _text("{:.3f} nats", m["mutual_information"])
        others = (_list(m["others"]), refused, requests, confidence, information)
        models.add_row(name, str(m["version"]), *others)
    foot = Text(f"over {now['seconds']:.0f} s; Ctrl-C leaves", style="dim")
    return Group(head, "", figures, "", models, "", foot)


def _list(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions))


def _text(form: str, value: float | None, scale: float = 1) -> str:
    return "-" if value is None else form.format(value * scale)
