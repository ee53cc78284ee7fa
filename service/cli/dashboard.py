"""A live view of a running service in a terminal, or a line an interval where there is none."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dropserve.service.cli import terminal
from dropserve.service.cli.figures import Figures, Look, between
from dropserve.service.client import DropserveClient
from dropserve.service.errors import DropserveError, Overloaded, ServerError, Unreachable

_WINDOW = 10  # intervals that the figures are of
_HISTORY = 40  # intervals that are drawn
_TICKS = " ▁▂▃▄▅▆▇█"


def look(
    client: DropserveClient,
    interval: float,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Figures | DropserveError]:
    """Say each interval what happened in the last few, or what keeps the service from answering.

    Raises:
        RequestError: the service will not say: it asks for a key, or has no metrics.
    """
    looks: deque[Look] = deque(maxlen=_WINDOW + 1)
    while True:
        try:
            looks.append(Look(client.metrics(), client.readiness(), clock()))
        except (Unreachable, Overloaded, ServerError) as error:
            looks.clear()
            yield error
        except ValueError as error:
            raise ServerError(f"/metrics is not in Prometheus's format: {error}") from error
        else:
            if len(looks) > 1:
                last = between(looks[-2], looks[-1])
                yield replace(between(looks[0], looks[-1]), requests=last.requests)
        sleep(interval)


def show_lines(
    seen: Iterable[Figures | DropserveError], as_json: bool = False, *, fail: bool = False
) -> None:
    """Print a line for each.

    Args:
        seen: what `look()` yields.
        as_json: whether a line is JSON.
        fail: raise an error instead of printing it.
    """
    for now in seen:
        if isinstance(now, DropserveError):
            if fail:
                raise now
            terminal.say(json.dumps({"error": str(now)}) if as_json else f"no answer: {now}")
        else:
            terminal.say(json.dumps(asdict(now)) if as_json else line(now))


def show_live(seen: Iterable[Figures | DropserveError], url: str) -> None:
    """Draw each in place of the last."""
    history: deque[float] = deque(maxlen=_HISTORY)
    with Live(Text(f"{url}: looking ..."), console=terminal.console(), auto_refresh=False) as live:
        for now in seen:
            live.update(draw(now, history, url), refresh=True)


def line(now: Figures) -> str:
    """Say figures in one line."""
    models = ", ".join(
        f"{name} {m.version}: confidence {_share(m.confidence)}, "
        f"mutual information {_nats(m.mutual_information)}"
        + (f", refused {_list(m.refused)}" if m.refused else "")
        for name, m in now.models.items()
    )
    return (
        f"{now.requests:.1f} requests/s, p50 {_ms(now.p50)}, p99 {_ms(now.p99)}, "
        f"{now.errors:.1f} errors/s, queue {now.queue}, batch {_number(now.batch)}; {models}"
    )


def draw(now: Figures | DropserveError, history: deque[float], url: str) -> RenderableType:
    """Lay figures out for a terminal.

    Args:
        now: figures, or why there are none.
        history: requests a second of the intervals before; gets these as well.
        url: of the service.
    """
    if isinstance(now, DropserveError):
        history.clear()
        return Text.assemble((f"{url}  no answer\n", "bold red"), str(now))
    history.append(now.requests)
    workers = "1 worker" if now.workers == 1 else f"{now.workers} workers"
    head = Text.assemble((url, "bold"), "  ", ("ready", "green"), f"  {workers}")
    figures = Table.grid(padding=(0, 2, 0, 0))
    figures.add_row("requests", f"{now.requests:,.1f}/s", sparkline(history))
    errors = Text(f"{now.errors:,.1f}/s", style="bold red" if now.errors else "")
    figures.add_row("errors", errors, "answers of 500 and above")
    figures.add_row("latency", _ms(now.p50), f"half of all; {_ms(now.p99)}: 99 of a hundred")
    figures.add_row("queue", f"{now.queue:,}", "images that wait")
    figures.add_row("batch", _number(now.batch), "images, on average")
    figures.add_row("samples", f"{now.samples:,.0f}/s", "thinned networks, times images")
    foot = Text(f"over {now.seconds:.0f} s; Ctrl-C leaves", style="dim")
    return Group(head, "", figures, "", _models(now), "", foot)


def sparkline(values: Iterable[float]) -> str:
    """Draw values as bars beside each other, the largest full."""
    values = list(values)
    most = max(values, default=0.0) or 1.0
    return "".join(_TICKS[round(value / most * (len(_TICKS) - 1))] for value in values)


def _models(now: Figures) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", overflow="fold")
    for heading in ("version", "others", "refused", "requests", "confidence", "mutual information"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, model in now.models.items():
        table.add_row(
            name,
            str(model.version),
            _list(model.others),
            Text(_list(model.refused), style="red"),
            f"{model.requests:,.1f}/s",
            _share(model.confidence),
            _nats(model.mutual_information),
        )
    return table


def _list(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} nats"
