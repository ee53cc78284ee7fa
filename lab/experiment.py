"""What an experiment declares: what varies, what is measured, shown and answered."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dropserve.models.hyperparameters import Recipe
from dropserve.models.networks import NetworkConfig, default_config

SHAPE, CLASSES = (1, 28, 28), 10
"""Of Fashion-MNIST."""
Figures = dict[str, Any]
"""What one run measured: numbers, and lists of numbers (curves), by the name of a `Measure`."""
_TERM = re.compile(r"\s([+-])\s")


@dataclass(frozen=True)
class Setting:
    """One way to train, which a run of each seed tries.

    Attributes:
        label: its name; may have no " + " and " - ", which stand in expressions.
        network: fields of `NetworkConfig` that differ from the experiment's.
        recipe: fields of `Recipe` that differ from the experiment's.
        values: what else varies, for `measure`, and for the axes and series of plots.
    """

    label: str
    network: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """How a figure is called and shown; `percent` are shares that are shown times 100."""

    title: str
    digits: int = 3
    percent: bool = False

    @property
    def scale(self) -> int:
        """What figures are multiplied by to be shown."""
        return 100 if self.percent else 1


@dataclass(frozen=True)
class Table:
    """Means and 95% intervals over the seeds.

    Attributes:
        columns: names of measures.
        rows: settings, or expressions of them such as "both - dropout", paired by seed; with a
            mapping, by what the row is called. None: every setting.
        against: a setting; the differences to it, paired by seed, of the columns in `compared`.
        compared: those; by default the first column.
    """

    columns: Sequence[str]
    rows: Sequence[str] | Mapping[str, str] | None = None
    against: str | None = None
    compared: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One plot: points with intervals by setting, or lines with bands.

    Attributes:
        title: above the plot.
        y: name of a measure, or of several, which are drawn in one plot.
        x: a key of `Setting.values`; for a measure that is a list, the name of another list, and
            by default the number of its element, from 1. None for points.
        series: the key of `Setting.values` that tells lines apart.
        rows: settings that are drawn, as in `Table`.
        x_title: of the axis.
        log: axes that are logarithmic, "x", "y" or "xy".
    """

    title: str
    y: str | Sequence[str]
    x: str | None = None
    series: str | None = None
    rows: Sequence[str] | Mapping[str, str] | None = None
    x_title: str = ""
    log: str = ""


@dataclass(frozen=True)
class Experiment:
    """A question about dropout, and how it is answered by measurement.

    Attributes:
        question: as people ask it.
        setup: what is done, in three lines.
        settings: what varies; each is run with every seed.
        measure: trains and measures one setting with one seed: a `lab.run.Run`.
        tables: of docs/results.md.
        panels: of its plot.
        answer: two sentences. `{accuracy[a]}` is the mean and interval of that measure for the
            setting a, and `{accuracy[a - b]}` of the difference, paired by seed.
        answered: `digest()` of the results that the answer was written for.
        measures: by name, as far as they are not among `MEASURES`.
        network: fields of `NetworkConfig` of all settings.
        recipe: fields of `Recipe` of all settings. Weight decay is .02 where nothing is said.
        images: training images of a run, drawn by its seed.
        seeds: how many.
    """

    question: str
    setup: Sequence[str]
    settings: Sequence[Setting]
    measure: Callable[[Any], Figures]
    tables: Sequence[Table]
    panels: Sequence[Panel]
    answer: str
    answered: str = ""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    images: int = 10_000
    seeds: int = 5

    def __post_init__(self) -> None:
        labels = [setting.label for setting in self.settings]
        if len({*labels}) < len(labels) or any(_TERM.search(label) for label in labels):
            raise ValueError(f"labels must differ, and have no ' + ' and ' - ': {labels}")

    def network_of(self, setting: Setting, **changes: Any) -> NetworkConfig:  # noqa: ANN401
        """Describe a setting's network; `changes` are fields of `NetworkConfig`."""
        asked = {**self.network, **setting.network, **changes}
        usual = {"kind": "mlp", "hidden": (128, 128)} if "kind" not in asked else {}
        fields = usual | asked
        found = default_config(fields.pop("kind"), SHAPE, CLASSES, fields.get("regularizer"))
        return replace(found, **fields)

    def recipe_of(self, setting: Setting, **changes: Any) -> Recipe:  # noqa: ANN401
        """Describe how a setting is trained; `changes` are fields of `Recipe`."""
        usual = {"epochs": 30, "learning_rate": 1e-3, "threads": 1}
        return Recipe(**{**usual, **self.recipe, **setting.recipe, **changes})

    def images_of(self, setting: Setting) -> int:
        """Return the number of training images: the experiment's, or the setting's value."""
        return int(setting.values.get("images", self.images))

    def titled(self, measure: str) -> Measure:
        """Return how a measure is shown."""
        return self.measures.get(measure) or MEASURES[measure]

    def rows(self, rows: Sequence[str] | Mapping[str, str] | None) -> Mapping[str, str]:
        """Return the expression of each row by what it is called."""
        if rows is None:
            rows = [setting.label for setting in self.settings]
        return rows if isinstance(rows, Mapping) else {row: row for row in rows}


def terms(expression: str) -> list[tuple[str, int]]:
    """Split "a - b + c" into settings and their signs."""
    first, *rest = _TERM.split(expression)
    signs = (1 if sign == "+" else -1 for sign in rest[::2])
    return [(first, 1), *zip(rest[1::2], signs, strict=True)]


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("test accuracy, %", 2, percent=True),
    "kept_accuracy": Measure("test accuracy of the best validation epoch, %", 2, percent=True),
    "train_accuracy": Measure("training accuracy, %", 2, percent=True),
    "gap": Measure("gap (training - test accuracy), points", 2, percent=True),
    "nll": Measure("test NLL, nats", 3),
    "train_nll": Measure("training NLL, nats", 3),
    "brier": Measure("Brier score", 4),
    "ece": Measure("ECE, %", 2, percent=True),
    "accuracies": Measure("test accuracy, %", 1, percent=True),
    "train_accuracies": Measure("training accuracy, %", 1, percent=True),
    "nlls": Measure("test NLL, nats", 2),
    "train_nlls": Measure("training NLL, nats", 2),
}
"""Of `lab.measures` and `Run.train`; plurals are curves, an element an epoch. All in eval mode."""
