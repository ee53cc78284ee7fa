"""Plots of results, on no background, in colours that can be read on white and on black.

The colours differ in lightness too, and lines and marks in their form, for readers who do not see
colours apart. Intervals are 95% of the mean over seeds.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from dropserve.lab.experiment import Experiment, Panel, terms
from dropserve.lab.results import Array, Document, interval

INK, GRID = "#7d8590", "#7d859040"
COLOURS = ("#2f81f7", "#d9730d", "#1a9e77", "#b45fc4", "#8b949e", "#b58900", "#c9406d", "#3fa7b8")
_LINES, _MARKS = ("-", "--", ":", "-."), "osD^vPX*"
_WIDTH, _HEIGHT, _ROW = 5.0, 4.2, 0.26  # inches of a panel, and of a row of points
_COLUMNS, _TITLE = 2, 40  # panels in a row, characters in a line of a title
_FEW = 3
"""Most lines whose legend fits in the axes."""
_MARKED = 25
"""Most points of a line that are marked one by one."""


class _Plain(LogFormatter):
    """Labels the ticks that `LogFormatter` does, as 0.01 and not as 1e-02."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def style() -> AbstractContextManager[None]:
    """Return the settings of all plots: the same figures make the same file."""
    return rc_context(
        {
            "font.size": 11,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "svg.hashsalt": "dropserve",
            "svg.fonttype": "path",  # no font of the reader's can outgrow a word's place
        }
    )


def save(figure: Figure, path: Path, title: str) -> None:
    """Write a figure as SVG, or as PNG on white, by the suffix of its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        figure.savefig(path, transparent=True, metadata={"Date": None, "Title": title})
    else:
        figure.savefig(path, dpi=150, facecolor="white")


def draw(experiment: Experiment, document: Document, paths: Sequence[Path]) -> None:
    """Draw an experiment's panels, two in a row, to each path."""
    panels = experiment.panels
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    points = max(
        (len(experiment.rows(p.rows)) for p in panels if _is_points(p, document)), default=0
    )
    height = max(_HEIGHT, _ROW * points + 1.2)
    with style():
        figure = Figure(figsize=(_WIDTH * columns, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, experiment, document)
        for axes in list(figure.axes)[len(panels) :]:
            axes.set_axis_off()
        for path in paths:
            save(figure, path, experiment.question)


def _measures(panel: Panel) -> tuple[str, ...]:
    return (panel.y,) if isinstance(panel.y, str) else tuple(panel.y)


def _is_curve(panel: Panel, document: Document) -> bool:
    """Say if what is drawn are lists, an element a step."""
    name = _measures(panel)[0]
    return any(isinstance(runs[0].get(name), list) for runs in document.runs.values())


def _is_points(panel: Panel, document: Document) -> bool:
    return panel.x is None and not _is_curve(panel, document)


def _draw(axes: Axes, panel: Panel, experiment: Experiment, document: Document) -> None:
    axes.set_title(fill(panel.title, _TITLE), loc="left", fontsize=11, fontweight="bold", color=INK)
    titles = [experiment.titled(name).title for name in _measures(panel)]
    several = len({*titles}) > 1
    if _is_points(panel, document):
        _points(axes, panel, experiment, document)
        if not several:
            axes.set_xlabel(titles[0])
    else:
        found = _curves if _is_curve(panel, document) else _lines
        lines = list(found(panel, experiment, document))
        _plot(axes, lines)
        axes.set_xlabel(panel.x_title)
        axes.set_ylabel(fill(", ".join(_units(titles)), _TITLE))
        if len(lines) > 1:
            _legend(axes, below=len(lines) > _FEW)
        if all(float(v).is_integer() for _, x, _, _ in lines for v in x) and "x" not in panel.log:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name in "xy":
        if name in panel.log:
            getattr(axes, f"set_{name}scale")("log")
            axis = axes.xaxis if name == "x" else axes.yaxis
            axis.set_major_formatter(_Plain())
            axis.set_minor_formatter(_Plain())
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def _legend(axes: Axes, *, below: bool) -> None:
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)} if below else {}
    axes.legend(fontsize=8.5, framealpha=0, labelcolor=INK, **place)


def _units(titles: Sequence[str]) -> list[str]:
    """Return axis titles; of several figures of one unit, that."""
    if len({*titles}) == 1:
        return [titles[0]]
    return list(dict.fromkeys(title.rpartition(", ")[2] for title in titles))


Line = tuple[str, Sequence[float], Array, Array]
"""Label, x, mean and half width."""


def _shown(
    experiment: Experiment, document: Document, measure: str, expression: str
) -> tuple[Array, Array]:
    """Return mean and half width as they are drawn."""
    scale = experiment.titled(measure).scale
    mean, half = interval(document.values(measure, expression))
    return scale * mean, scale * half


def _lines(panel: Panel, experiment: Experiment, document: Document) -> Iterator[Line]:
    """Yield lines over a value of the settings."""
    settings = {s.label: s for s in experiment.settings}
    rows = [settings[label] for label in experiment.rows(panel.rows).values()]
    x, series = panel.x or "", panel.series
    rows = [s for s in rows if x in s.values and (series or x) in s.values]
    for name in _measures(panel):
        for group in dict.fromkeys(s.values[series] if series else "" for s in rows):
            members = [s for s in rows if not series or s.values[series] == group]
            members = [s for s in members if name in document.runs[s.label][0]]
            members.sort(key=lambda s: s.values[x])
            found = [_shown(experiment, document, name, s.label) for s in members]
            mean, half = (np.array(column) for column in zip(*found, strict=True))
            title = group if isinstance(group, str) else f"{series} {group:g}"
            label = _label(panel, experiment, title, name)
            yield label, [s.values[x] for s in members], mean, half


def _curves(panel: Panel, experiment: Experiment, document: Document) -> Iterator[Line]:
    """Yield a line a setting, or expression, over the elements of lists."""
    for title, expression in experiment.rows(panel.rows).items():
        for name in _measures(panel):
            if not document.has(name, expression):
                continue
            mean, half = _shown(experiment, document, name, expression)
            x = np.arange(1.0, len(mean) + 1)
            if panel.x:
                first, _ = terms(expression)[0]
                x, _ = _shown(experiment, document, panel.x, first)
            yield _label(panel, experiment, title, name), x.tolist(), mean, half


def _label(panel: Panel, experiment: Experiment, title: str, measure: str) -> str:
    """Name a line: by its measure, too, where a panel has several."""
    shown = experiment.titled(measure).title
    what = "" if len(_measures(panel)) == 1 else _short(shown)
    return ", ".join(filter(None, (title, what))) or shown


def _short(title: str) -> str:
    return title.rpartition(", ")[0] or title


def _plot(axes: Axes, lines: Sequence[Line]) -> None:
    marks = cycle(_MARKS)
    for i, (label, x, mean, half) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        look: dict[str, Any] = {"color": colour, "linestyle": _LINES[i % len(_LINES)]}
        if len(x) <= _MARKED:
            look |= {"marker": next(marks), "markersize": 4.5}
        axes.plot(x, mean, label=label, linewidth=1.6, **look)
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)


def _points(axes: Axes, panel: Panel, experiment: Experiment, document: Document) -> None:
    rows = experiment.rows(panel.rows)
    names = _measures(panel)
    for i, name in enumerate(names):
        shown = {row: e for row, e in rows.items() if document.has(name, e)}
        found = [_shown(experiment, document, name, e) for e in shown.values()]
        mean, half = (np.array(column) for column in zip(*found, strict=True))
        place = np.array([list(rows).index(row) for row in shown]) + 0.16 * (
            i - (len(names) - 1) / 2
        )
        axes.errorbar(
            mean, place, xerr=np.nan_to_num(half), fmt=_MARKS[i % len(_MARKS)], markersize=5,
            color=COLOURS[i % len(COLOURS)], capsize=3, label=experiment.titled(name).title,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    if any(" - " in e for e in rows.values()):
        axes.axvline(0, color=INK, linewidth=0.8)
    if len(names) > 1:
        _legend(axes, below=True)  # points may be anywhere
