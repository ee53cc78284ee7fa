"""Horizontal bars as SVG, on no background, in colours that can be read on white and on black."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dropserve.lab.plots import INK, save, style

OURS, OTHERS = "#2f81f7", "#8b949e"
ROW_INCHES, PANEL_INCHES = 0.34, 5.0


@dataclass(frozen=True)
class Panel:
    """Bars of one figure: what it is, label -> value, and which way is better."""

    title: str
    values: Mapping[str, float]
    better: str


def bars(path: Path, title: str, panels: Sequence[Panel], ours: str = "Dropserve") -> None:
    """Draw panels side by side, best bar at the top, `ours` in colour; all, if it is empty."""
    rows = max(len(panel.values) for panel in panels)
    size = (max(8.0, PANEL_INCHES * len(panels)), ROW_INCHES * rows + 1.2)
    with style():
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw(axes, panel, ours)
        save(figure, path, title)


def _draw(axes: Axes, panel: Panel, ours: str) -> None:
    more = panel.better.startswith("more")
    values = sorted(panel.values.items(), key=lambda item: item[1], reverse=more)
    labels = [label for label, _ in values]
    colours = [OTHERS if ours and label != ours else OURS for label in labels]
    drawn = axes.barh(labels, [value for _, value in values], color=colours, height=0.7)
    axes.bar_label(drawn, [_short(value) for _, value in values], padding=4)
    axes.set_title(f"{panel.title} ({panel.better})", loc="left", fontsize=11)
    axes.margins(x=0.22)  # room for the longest bar's figure
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.xaxis.set_visible(False)
    for label in axes.get_yticklabels():
        if label.get_text() == ours:
            label.set_color(OURS)
            label.set_fontweight("bold")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
