"""Turns bench/results/*.json into docs/benchmarks.md and its plots: `python -m bench.report`.

A file of results is one section: its function in SECTIONS draws, and returns the paragraphs. What
is written by hand about it, in a file of the same name ending in .md, follows them.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import plots

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md", "images"

Result = dict[str, Any]

HEAD = """<!-- Generated from bench/results by `make bench-report`, that is bench/report.py. -->

# Benchmarks

Ratios travel between machines, absolute times do not."""

HTTP = """\
The same MLP (784-256-256-10, `{model}`) behind each server: a PNG of 28 x 28 pixels in, JSON out,
two worker processes of one thread each, every answer checked against the network's own before
anything is timed. wrk {wrk} loads one server at a time from the same machine; medians of {rounds}
rounds, in which the servers take turns of {seconds:g} s after {warmup:g} s of warming up.

Uncertainty is asked of Dropserve for its default seed, whose masks and gathered weights it makes
when it loads the network, while the others draw masks for each request. The row *a new seed each*
shows what is left where every request brings a seed never met: masks are drawn and weights gathered
in the request's time, and no two requests share a batch."""

ENGINE = """\
T = {samples} samples of Monte Carlo dropout, {threads} thread; contenders take turns, medians, in
milliseconds. *Loop*: a pass a sample with dropout switched on, over the module as PyTorch makes it;
*laid out*: the same loop over weights in the memory layout that we serve from; *T-fold*: one pass
over the batch repeated T times; *ours*: `Sampler.sample(...).mean(0)`, *all figures*:
`Sampler.summarize`.

Both are for the default seed, whose masks are drawn and whose weights are gathered before the time
starts, when the network is loaded, as in the service; the loop and T-fold draw theirs within it.
*New seed* is *ours* with a seed never met in every call, all of it within the time: {least:.1f} to
{most:.1f} times as long here."""

ENGINE_ON_GPU = """\
The same contenders on a {gpu}, T = {samples}; the time of a call ends when the GPU is done with it.
Convolutions do not use TF32."""

TRAINING_MODE = """\
Networks whose noise depends on `self.training`: {passes:,} samples against {passes:,} plain passes
in train mode, over {images} images. *Variance*: the sum over images and classes, ours over theirs.
*Mean*: the largest distance of two means, in standard errors of that distance. *Faster*: a loop of
T = {samples} passes over ours, by batch."""

STANDARD_ERROR = """\
Root mean square of the answer's `standard_error` over that of the true error, {seeds:,} seeds, by
rate. The network is so small that all 4,096 thinned networks can be listed, so the true mean is
known."""

COVERED = """\
How many of the means lie within Student's 95% interval of the true mean (within 1.96 standard
errors), stratified masks. One degree of freedom at T = 20 and 25, two at 37."""

NOISES = """\
Milliseconds for 100 samples of 8 images, measured apart on the same machine. The loop is what
PyTorch's users write for the MLP, with one mask of weights a pass, and our own layers in train mode
for the others. The MLPs have the trained weights. Where noise comes before most of the work, as in
a wide residual network or a transformer, samples share nothing, and the limit is the passes
themselves; those of a recurrent network share the products of its inputs alone."""

WORTH = """\
Root mean squared error against {passes:,} passes, over {images} test images, {seeds} seeds.
*Reported* is the answer's `standard_error` over the true one."""

CHECKOUTS = """\
Two checkouts, each with one worker of one thread and the digits MLP, take turns under wrk: {rounds}
alternations of {seconds} s, 32 connections if not said otherwise. *Ratio*: requests a second after
over before, geometric mean and its 95% interval. *us*: processor time of the server a request, and
the mean difference with its 95% interval."""

PEERS = """\
Each peer is set up as its documentation advises: how, and where it says so, is at the top of its
file in [bench/http/peers](../bench/http/peers)."""


def main() -> None:
    """Write the page and the plots of whatever results there are."""
    page = [HEAD]
    for name, section in SECTIONS.items():
        source, notes = RESULTS / f"{name}.json", RESULTS / f"{name}.md"
        if source.exists():
            page += section(json.loads(source.read_text()))
            page += [notes.read_text().strip()] if notes.exists() else []
    PAGE.write_text("\n\n".join(page) + "\n")


def engine(result: Result) -> list[str]:
    """Show what the engine was measured to do, and the claims that rest on it."""
    speedups = {
        f"{row['title']}, batch {row['batch']}": row["ratios"]["loop/ours"]
        for row in result["engine"]
    }
    dearer = [row["ratios"]["ours_new_seed/ours"] for row in result["engine"]]
    title = f"Monte Carlo dropout, T = {result['samples']}"
    panel = plots.Panel("times as fast as the loop", speedups, "more is better")
    plots.bars(PAGE.parent / IMAGES / "engine.svg", title, [panel], ours="")
    parts = [
        "## The engine",
        ENGINE.format(**result, least=min(dearer), most=max(dearer)),
        "![Speed over the loop of T passes](images/engine.svg)",
        _engine_table(result["engine"]),
    ]
    parts += ["### Kinds of noise", NOISES, _noises_table(result["noises"])]
    for study in result["efficiency"]:
        parts += [f"### What a sample is worth: {study['title']}", WORTH.format(**study)]
        parts.append(_worth_table(study["rows"]))
    parts += ["### Memory", "Peak above idle, MiB.", _memory_table(result["memory"])]
    parts += ["### Training", "Images a second.", _training_table(result["training"])]
    parts += ["### Claims", _claims_table(result["claims"])]
    return [*parts, _made_on(result, "make bench && make bench-report")]


def engine_on_gpu(result: Result) -> list[str]:
    """Show how fast the engine is on a GPU."""
    about = ENGINE_ON_GPU.format(samples=result["samples"], gpu=result["machine"]["gpu"])
    made_on = _made_on(result, "make bench DEVICE=cuda && make bench-report")
    return ["## The engine on a GPU", about, _engine_table(result["engine"]), made_on]


def _engine_table(rows: Iterable[Result]) -> str:
    names = ("eval", "loop", "loop_laid_out", "fold", "ours", "ours_new_seed", "ours_summary")
    heads = ("eval", "loop", "laid out", "T-fold", "ours", "new seed", "all figures")
    ratios = ("loop/ours", "loop/ours_new_seed", "loop_laid_out/ours")
    ratio_heads = ("loop/ours", "loop/new seed", "laid out/ours")
    lines = [
        [
            f"{row['title']}{'' if row['trained'] else ' (not trained)'}, {row['path']}",
            f"{row['batch']}",
            *(f"{row['microseconds'][name] / 1000:,.2f}" for name in names),
            *(f"{row['ratios'][name]:.1f}x" for name in ratios),
        ]
        for row in rows
    ]
    return table(("network, path", "batch", *heads, *ratio_heads), lines)


def _noises_table(rows: Iterable[Result]) -> str:
    names = ("loop", "ours", "ours_new_seed")
    lines = [
        [
            f"{row['network']}, {row['method']}, {row['path']}",
            *(f"{row['microseconds'][name] / 1000:,.2f}" for name in names),
            f"{row['loop/ours']:.1f}x",
        ]
        for row in rows
    ]
    return table(("network, method, path", "loop", "ours", "new seed", "loop/ours"), lines)


def _worth_table(rows: Iterable[Result]) -> str:
    figures = ("mean", "variance", "mutual_information")
    lines = [
        [
            row["masks"],
            f"{row['samples']}",
            *(f"{row['rmse'][name]:.5f}" for name in figures),
            f"{row['reported/true']:.2f}" if row["reported/true"] else "-",
        ]
        for row in rows
    ]
    return table(("masks", "T", "mean", "variance", "mutual information", "reported"), lines)


def _memory_table(rows: Iterable[Result]) -> str:
    lines = [
        [f"{row['title']}, batch {row['batch']}", f"T = {row['samples']:,}", name, f"{mib:,.0f}"]
        for row in rows
        for name, mib in row["mib"].items()
    ]
    return table(("network", "samples", "contender", "MiB"), lines)


def _training_table(rows: Iterable[Result]) -> str:
    lines = [
        [row["title"], name, f"{speed:,.0f}"]
        for row in rows
        for name, speed in row["images_per_second"].items()
    ]
    return table(("network", "loop", "images/s"), lines)


def _claims_table(rows: Iterable[Result]) -> str:
    lines = [
        [
            row["text"],
            "yes" if row["met"] else "**no**",
            f"{row['relation']} {row['target']:g}{row['unit']}",
            f"{row['measured']:.3g}{row['unit']}",
        ]
        for row in rows
    ]
    return table(("claim", "holds", "target", "measured"), lines)


def accuracy(result: Result) -> list[str]:
    """Show what was held against plain passes and against exact figures."""
    rows = result["standard_error"]
    rates = list(dict.fromkeys(row["p"] for row in rows))

    def by_rate(masks: str, cell: Callable[[Result], str]) -> list[list[str]]:
        chosen = [row for row in rows if row["masks"] == masks]
        sizes = dict.fromkeys(row["samples"] for row in chosen)
        cells = {size: [cell(r) for r in chosen if r["samples"] == size] for size in sizes}
        return [[masks, f"{size}", *line] for size, line in cells.items()]

    heads = ("masks", "T", *(f"p = {p:g}" for p in rates))
    ratios = [
        line
        for masks in dict.fromkeys(row["masks"] for row in rows)
        for line in by_rate(masks, lambda row: f"{row['reported/true']:.2f}")
    ]
    covered = by_rate("stratified", lambda r: f"{r['covered']:.0%} ({r['covered_normal']:.0%})")
    batches = result["settings"]["batches"]
    networks = [
        [
            f"{row['network']}, {row['path']}",
            f"{row['sites']}",
            f"{row['variance ratio']:.3f}",
            f"{row['mean']:.1f}",
            *(f"{row[f'loop/ours, batch {batch}']:.1f}x" for batch in batches),
        ]
        for row in result["training_mode"]
    ]
    faster = (f"faster, {batch}" for batch in batches)
    return [
        "## Accuracy",
        "### Noise that depends on self.training",
        TRAINING_MODE.format(**result["settings"]),
        table(("network, path", "sites", "variance", "mean", *faster), networks),
        "### The standard error",
        STANDARD_ERROR.format(**result["settings"]),
        table(heads, ratios),
        COVERED,
        table(heads, covered),
        _made_on(result, "make bench-accuracy && make bench-report"),
    ]


def http(result: Result) -> list[str]:
    """Show Dropserve's HTTP beside its peers'."""
    settings, rows = result["settings"], result["rows"]
    predictions, uncertainties = (
        [row for row in rows if row["task"] == task] for task in ("predict", "uncertainty")
    )
    few, many = min(settings["connections"]), max(settings["connections"])
    clients = "connection" if few == 1 else "connections"
    speed, latency = f"requests a second, {many} connections", f"p50 in ms, {few} {clients}"
    images = PAGE.parent / IMAGES
    plots.bars(
        images / "http-predict.svg",
        "One picture in, its probabilities out",
        [
            plots.Panel(
                speed, _figures(predictions, many, "requests_per_second"), "more is better"
            ),
            plots.Panel(latency, _figures(predictions, few, "p50_ms"), "less is better"),
        ],
    )
    samples = settings["samples"]
    plots.bars(
        images / "http-uncertainty.svg",
        f"One picture in, Monte Carlo dropout over {samples} samples out",
        [
            plots.Panel(
                speed, _figures(uncertainties, many, "requests_per_second"), "more is better"
            ),
            plots.Panel(latency, _figures(uncertainties, few, "p50_ms"), "less is better"),
        ],
    )
    return [
        "## HTTP",
        HTTP.format(**settings),
        "### Predictions",
        "![Requests a second and latency of predictions](images/http-predict.svg)",
        _http_table(predictions, few, many),
        f"### Uncertainty, {samples} samples",
        "![Requests a second and latency of uncertainty](images/http-uncertainty.svg)",
        _http_table(uncertainties, few, many),
        *_footnotes(rows),
        PEERS,
        _made_on(result, "make bench-http && make bench-report"),
    ]


def _http_table(rows: Sequence[Result], few: int, many: int) -> str:
    ours = _figures(rows, many, "requests_per_second").get("Dropserve")
    at_many, at_few = f"p50, p99 ms, {many}", f"p50, p99 ms, {few}"
    head = ("server", "version", f"requests/s, {many}", "Dropserve is", at_many, at_few)
    lines = []
    for row in _by_speed(rows, many):
        at = {load["connections"]: load for load in row.get("loads", [])}
        versions = row["versions"].items()
        version = ", ".join(f"{k} {v}" for k, v in versions if k not in ("python", "torch"))
        label = f"**{row['label']}**" if row["label"] == "Dropserve" else row["label"]
        cells = [label + ("*" if "note" in row else ""), version]
        if "failed" in row or many not in at:
            lines.append([*cells, "-", "-", "-", "-"])
            continue
        speed = at[many]["requests_per_second"]
        cells += [f"{speed:,.0f}", f"{ours / speed:.1f}x" if ours else "-"]
        cells += [f"{at[n]['p50_ms']:.2f}, {at[n]['p99_ms']:.2f}" for n in (many, few)]
        lines.append(cells)
    return table(head, lines)


def _by_speed(rows: Iterable[Result], connections: int) -> list[Result]:
    def speed(row: Result) -> float:
        loads = [x for x in row.get("loads", []) if x["connections"] == connections]
        return -loads[0]["requests_per_second"] if loads and "failed" not in row else 0.0

    return sorted(rows, key=speed)


def _figures(rows: Iterable[Result], connections: int, key: str) -> dict[str, float]:
    """Return label -> a figure, of the rows that did not fail."""
    return {
        row["label"]: load[key]
        for row in rows
        if "failed" not in row
        for load in row["loads"]
        if load["connections"] == connections
    }


def _footnotes(rows: Iterable[Result]) -> list[str]:
    notes = [f"- \\* {row['label']}: {row['note']}" for row in rows if "note" in row]
    failed = [
        f"- {row['label']} ({row['task']}) could not be measured: {row['failed'].splitlines()[0]}"
        for row in rows
        if "failed" in row
    ]
    return ["\n".join(notes + failed)] if notes or failed else []


def checkouts(result: Result) -> list[str]:
    """Show what a change of the request path cost."""
    lines = [
        [
            row["case"],
            *(f"{row[key]:,}" for key in ("before", "after")),
            f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
            f"{row['microseconds_before']:.0f}",
            f"{row['microseconds_more']:+.0f} ± {row['microseconds_half_width']:.0f}",
        ]
        for row in result["rows"]
    ]
    heads = ("request", "requests/s before", "after", "ratio", "us before", "us more")
    return [
        f"## Request paths, before and after {result['change']}",
        CHECKOUTS.format(**result),
        table(heads, lines),
        _made_on(result, "python -m bench.http.checkouts BEFORE && make bench-report"),
    ]


def _made_on(result: Result, command: str) -> str:
    """Say when and on what it was measured, and how to do it again."""
    machine = result["machine"]
    versions = result.get("versions") or result["rows"][0]["versions"]
    about = [f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"]
    about += [f"{machine['gpu']}, CUDA {machine['cuda']}"] if "gpu" in machine else []
    about += [f"Python {versions['python']}, PyTorch {versions['torch']}", result["date"]]
    return "; ".join(about) + f".\n\n```bash\n{command}\n```"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; every column but the first two is of numbers."""
    marks = ["---" if i < 2 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "engine": engine,
    "engine-cuda": engine_on_gpu,
    "accuracy": accuracy,
    "http": http,
    "checkouts": checkouts,
}


if __name__ == "__main__":
    main()
