"""Fills docs/scaling.md with what `make bench-capacity` and `make bench-simulation` found.

Tables stand between `<!-- NAME: generated -->` and `<!-- end -->`; all else is by hand.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench import capacity, simulation
from bench.cluster import mean_latency
from dropserve.lab.plots import COLOURS, GRID, INK, save, style

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
RATE = 1_000_000
REPLICAS = 1000
LIST_PRICE = 5e-6
"""US dollars for one LIST of Amazon S3 (standard, us-east-1)."""
_SERIES = (("p50", "-"), ("p99", "--"), ("p99.9", ":"))

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def main() -> None:
    """Write the page anew, and its plots."""
    results = [json.loads(p.read_text()) for p in (capacity.RESULTS, simulation.RESULTS)]
    PAGE.write_text(write(PAGE.read_text(), *results))
    draw(results[1], PAGE.parent / "images")


def write(page: str, parts: Result, simulated: Result) -> str:
    """Return the page with its tables as the results have them."""
    for name, (lines, result) in TABLES.items():
        found = "\n".join(lines(parts if result == "parts" else simulated))
        start, end = f"<!-- {name}: generated -->\n", "<!-- end -->"
        before, _, rest = page.partition(start)
        _, marked, after = rest.partition(end)
        if not marked:
            raise ValueError(f"there is no {start.strip()} with an end")
        page = f"{before}{start}\n{found}\n\n{end}{after}"
    return page


def services(result: Result) -> Iterator[str]:
    """Show what a batch takes."""
    yield from _table(
        ("request", "fixed, us", "each, us", "fit", "network, us", "alone", "in batches of 64"),
        (
            [
                row["label"],
                _us(row["fixed"]),
                _us(row["each"]),
                f"{row['error']:.0%}",
                _network(result["networks"].get(name)),
                f"{1 / (row['fixed'] + row['each']):,.0f}",
                f"{1 / _full(row):,.0f}",
            ]
            for name, row in result["services"].items()
        ),
    )
    generators = [row["generator"] for row in result["services"].values()]
    proxy = result["proxy"]
    yield ""
    yield (
        f"Beside it: the generator of load takes {_us(min(generators))} to {_us(max(generators))} "
        f"us a request, HAProxy {_us(proxy['together'])} us of those that come together, else "
        f"{_us(proxy['each'])} us and {1e3 * proxy['fixed']:.0f} ms of a second; an answer through "
        f"it is {_us(proxy['later'])} us later. While the other core is busy too, a batch "
        f"takes {result['networks'][capacity.HELD]['contention']:.2f} times as long. "
        + _made(result)
    )


def _network(row: Row | None) -> str:
    return f"{_us(row['fixed'])} + {_us(row['each'])} n" if row else "as above"


def processes(result: Result) -> Iterator[str]:
    """Show memory and start."""
    yield from _table(
        ("model", "files", "process with it", "each more", "ready after", "each more"),
        (
            [
                name,
                f"{row['files'] / 1e6:.1f} MB",
                f"{row['memory'] / 1e6:,.0f} MB",
                f"{row['memory_more'] / 1e6:.1f} MB",
                f"{row['start']:.1f} s",
                f"{row['start_more']:.2f} s",
            ]
            for name, row in result["processes"]["models"].items()
        ),
    )
    first = [(k, result["processes"][k]) for k in ("digits", "digits-100")]
    texts = [
        f"{1e3 * times['first']:.1f} ms for the first {capacity.KINDS[name].label}, "
        f"{1e3 * times['later']:.1f} ms for later ones"
        for name, times in first
    ]
    yield from ("", "A fresh process, one client: " + "; ".join(texts) + ".")


def clusters(result: Result) -> Iterator[str]:
    """Show how many cores a million requests per second take."""
    rows = []
    for row in result["services"].values():
        most = 1 / _full(row)
        rate = simulation.SHARE * most
        model = next(k.model for k in capacity.KINDS.values() if k.label == row["label"])
        memory = result["processes"]["models"][model]["memory"]
        count = RATE / rate
        latency = mean_latency(row["fixed"], row["each"], rate)
        cells = [row["label"], f"{rate:,.0f}", f"{1e3 * latency:.1f}", f"{count:,.0f}"]
        rows.append([*cells, f"{count * memory / 1e9:,.0f}", f"{RATE / most:,.0f}"])
    heads = ("request", "each, 1/s", "latency, ms", "replicas", "GB", "replicas at the limit")
    yield from _table(heads, rows)


def validation(result: Result) -> Iterator[str]:
    """Show what was predicted beside what was measured."""
    rows = []
    for row in result["validation"]:
        for found in capacity.compared(row):
            figures = (
                f"{found.predicted:,.1f}",
                f"{found.measured:,.1f}",
                f"{found.difference:+.0%}",
            )
            rows.append([row["label"], found.name, *figures, str(found.rounds)])
    yield from _table(
        ("setup", "", "predicted", "measured", "difference", "measured so often"), rows
    )
    own, shared = (result["held"][name] for name in ("own", "shared"))
    generator = shared["generator"]
    yield ""
    yield (
        f"By the line, a batch takes {_us(own['fixed'])} + {_us(own['each'])} n us on a core of "
        f"its own, {_us(shared['fixed'])} + {_us(shared['each'])} n us on one that it shares; the "
        f"generator {_us(generator['together'])} us of a request that comes with others, else "
        f"{_us(generator['each'])} us and {1e3 * generator['fixed']:.0f} ms of a second. "
        + _made(result)
    )


def utilisation(result: Result) -> Iterator[str]:
    """Show how busy a replica is, by what it is asked for."""
    heads = "asked, of its limit", "requests/s", "busy", "p50, ms", "p99, ms", "p99.9, ms"
    rows = [
        [f"{r['share']:.0%}", f"{r['rate']:,.0f}", f"{r['busy']:.0%}", *_percentiles(r)]
        for r in result["utilisation"]
    ]
    yield from _table(heads, rows)


def events(result: Result) -> Iterator[str]:
    """Show bursts, deaths and updates."""
    rows = []
    for name, about in (
        ("bursts", "burst of {times:g} times the rate"),
        ("deaths", "{killed:,} die"),
        ("updates", "rolling update, surge {surge:.0%}, unavailable {unavailable:.0%}"),
    ):
        for row in sorted(result[name], key=lambda r: (r["size"], r["choices"])):
            got = row["within"]
            balance = "random" if row["choices"] == 1 else "two choices"
            parts = [f"{got[k]:,} ({got[k] / got['requests']:.2%})" for k in ("refused", "lost")]
            label = about.format(**row)
            rows.append([label, f"{row['size']:,}", balance, *_percentiles(got), *parts])
    heads = ("event", "replicas", "balancing", "p50, ms", "p99, ms", "p99.9, ms", "refused", "lost")
    yield from _table(heads, rows)
    yield ""
    yield (
        f"{result['kind']}; before, each replica gets {result['share']:.0%} of its limit, "
        f"{result['share'] * result['capacity']:,.0f} requests/s; a pod is ready "
        f"{result['start']:.1f} s after its order."
    )


def targets(result: Result) -> Iterator[str]:
    """Show what the autoscaler's targets lead to."""
    groups: dict[str, list[Row]] = {}
    for row in result["targets"]:
        groups.setdefault(_goal(row["targets"]), []).append(row)
    bursts = [row["times"] for row in next(iter(groups.values()))]
    heads = ("target", "requests/s before", *(f"{times:g} times" for times in bursts))
    rows = []
    for goal, found in groups.items():
        cells = []
        for row in found:
            got = row["within"]
            refused = got["refused"] / got["requests"]
            cells.append(f"{got['p99']:,.0f} ms" + (f", {refused:.1%}" if refused else ""))
        rows.append([goal, f"{found[0]['rate']:,.0f}", *cells])
    yield from _table(heads, rows)
    yield ""
    flapping = [
        f"with a window of {row['window']} s {row['changes']} changes and {row['mean']:.1f} "
        f"replicas on average, p99 {row['p99']:.0f} ms"
        for row in result["flapping"]
    ]
    yield "A load that swings by a quarter, in turns of two minutes, for twenty: " + (
        "; ".join(flapping) + "."
    )


def _goal(goals: Row) -> str:
    names = {"cpu": "CPU {:.0%}", "queue": "{:g} queued images", "rate": "{:,.0f} requests/s"}
    return " or ".join(names[name].format(value) for name, value in goals.items())


def limits(result: Result) -> Iterator[str]:
    """Show what a thousand replicas and a million requests per second add up to."""
    found = result["processes"]
    series, size = found["series"], found["metrics_bytes"]
    lists = REPLICAS / 5
    rows = [
        ["time series", f"{series} a replica of one model", f"{series * REPLICAS:,}"],
        ["of these histogram buckets", f"{found['buckets']}", f"{found['buckets'] * REPLICAS:,}"],
        [
            "scraped, every 15 s",
            f"{size / 1e3:.0f} kB",
            f"{size * REPLICAS / 15 / 1e6:.1f} MB/s, {series * REPLICAS / 15:,.0f} samples/s",
        ],
        [
            "listings, every 5 s",
            "0.2/s",
            f"{lists:,.0f}/s, {LIST_PRICE * lists * 86400:,.0f} US dollars a day on S3",
        ],
        *(
            [
                f"{name} from object storage",
                f"{row['files'] / 1e6:.1f} MB",
                (
                    f"{row['files'] * REPLICAS / 1e9:.1f} GB; within one poll "
                    f"{row['files'] * REPLICAS * 8 / 5e9:.1f} Gbit/s"
                ),
            ]
            for name, row in found["models"].items()
        ),
        [
            "request log",
            f"{found['log_bytes']:.0f} bytes a request",
            (
                f"{found['log_bytes'] * RATE / 1e6:,.0f} MB/s, "
                f"{found['log_bytes'] * RATE * 86400 / 1e12:,.0f} TB a day"
            ),
        ],
    ]
    heads = "what", "one", f"{REPLICAS:,} replicas, {RATE:,} requests/s"
    yield from _table(heads, rows)


TABLES: dict[str, tuple[Callable[[Result], Iterator[str]], str]] = {
    "services": (services, "parts"),
    "processes": (processes, "parts"),
    "clusters": (clusters, "parts"),
    "validation": (validation, "parts"),
    "utilisation": (utilisation, "simulated"),
    "events": (events, "simulated"),
    "targets": (targets, "simulated"),
    "limits": (limits, "parts"),
}
"""What is filled, by the name of its mark, and the results that it needs."""


def _full(row: Row) -> float:
    """Return seconds of a request in a full batch."""
    return float(capacity.batch_times(row)[-1] / capacity.MAX_BATCH)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}"


def _percentiles(row: Row) -> list[str]:
    return [f"{row[name]:,.1f}" for name, _ in _SERIES]


def _made(result: Result) -> str:
    on = result["machine"]
    versions = f"Python {result['versions']['python']}, PyTorch {result['versions']['torch']}"
    about = f"{result['date']}, {on['cpu']}, {on['cores']} cores, load before {result['load']}"
    return f"`make bench-capacity`, {about}, {versions}."


def _table(heads: Sequence[str], rows: Any) -> Iterator[str]:  # noqa: ANN401
    yield "| " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def draw(result: Result, folder: Path) -> None:
    """Draw the largest cluster's burst, update and autoscaling over time."""

    def largest(name: str) -> Row:
        rows = [row for row in result[name] if "timeline" in row]
        return max(rows, key=lambda row: (row.get("times", 0), -row.get("choices", 1)))

    for name, title in (
        ("bursts", "A burst of {times:g} times the rate, {size:,} replicas, nothing scales"),
        ("updates", "A rolling update of {size:,} replicas, surge {surge:.0%}"),
        ("scaled", "{times:g} times the rate, {size:,} replicas, and the autoscaler"),
    ):
        row = largest(name)
        _timeline(row, title.format(**row), folder / f"scaling-{name}.svg")


def _timeline(row: Row, title: str, path: Path) -> None:
    """Draw percentiles, and below them rates and replicas."""
    line = row["timeline"]
    seconds = range(len(line["rate"]))
    with style():
        figure = Figure(figsize=(8, 5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for (name, look), colour in zip(_SERIES, COLOURS, strict=False):
            above.plot(seconds, line[name], look, color=colour, label=name)
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("")
        above.set_ylabel("latency, ms")
        below.plot(seconds, [r / 1e3 for r in line["rate"]], color=COLOURS[0], label="asked")
        below.plot(
            seconds, [r / 1e3 for r in line["refused"]], ":", color=COLOURS[6], label="refused"
        )
        below.set_ylabel("thousand requests/s")
        below.set_xlabel("seconds")
        below.set_ylim(bottom=0)
        other = below.twinx()
        other.plot(seconds, line["replicas"], "--", color=COLOURS[1], label="replicas (right)")
        other.set_ylim(bottom=0)
        _dress(above, above.get_legend_handles_labels())
        handles, labels = below.get_legend_handles_labels()
        more, names = other.get_legend_handles_labels()
        _dress(below, (handles + more, labels + names))
        other.spines[:].set_visible(False)
        save(figure, path, title)


def _dress(axes: Axes, legend: tuple[list[Any], list[Any]]) -> None:
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    look: dict[str, Any] = {"fontsize": 8.5, "framealpha": 0, "labelcolor": INK}
    axes.legend(*legend, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), **look)


if __name__ == "__main__":
    main()
