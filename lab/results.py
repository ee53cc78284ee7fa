"""Results of an experiment: figures of every run, and means with intervals over the seeds."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dropserve.lab.experiment import Experiment, Figures, Table, terms
from dropserve.models.storage import replace_durably

RESULTS = Path(__file__).parent / "results"
"""What docs/results.md is made of."""
LEVEL = 0.95
REFERENCE = re.compile(r"\{(\w+)\[(.+?)\]\}")
"""A figure in an answer, as `{accuracy[dropout - none]}`."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Document:
    """A file of results, and apart from them what they were measured on, and when."""

    results: Mapping[str, Any]
    measured: Mapping[str, Any]

    @property
    def runs(self) -> Mapping[str, list[Figures]]:
        """Figures of each setting, a run a seed."""
        found: Mapping[str, list[Figures]] = self.results["runs"]
        return found

    def values(self, measure: str, expression: str) -> Array:
        """Return a measure, or a sum and difference of settings', by seed: [seeds, ...]."""
        total: Array | float = 0.0
        for label, sign in terms(expression):
            total = total + sign * np.array([run[measure] for run in self.runs[label]], np.float64)
        return np.asarray(total)

    def has(self, measure: str, expression: str) -> bool:
        """Say if all settings of an expression have a measure."""
        return all(measure in self.runs[label][0] for label, _ in terms(expression))

    def digest(self) -> str:
        """Name what was measured, for the answer that was written for it."""
        return hashlib.sha256(json.dumps(self.runs, sort_keys=True).encode()).hexdigest()[:12]


def interval(values: Array) -> tuple[Array, Array]:
    """Return mean and half width of the 95% interval of values [seeds, ...], by Student's t.

    It covers the randomness of seeds: images drawn, weights, order and masks. NaN for one seed.
    """
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return values.mean(0), np.full(values.shape[1:], np.nan)
    width = float(t.ppf((1 + LEVEL) / 2, count - 1)) / np.sqrt(count)
    return values.mean(0), width * values.std(0, ddof=1)


def with_estimates(experiment: Experiment, document: Document) -> Document:
    """Add to results what the page says: mean and half width by `measure[expression]`."""
    asked = {*REFERENCE.findall(experiment.answer)}
    for table in experiment.tables:
        for _, row in cells(experiment, table):
            asked |= {(measure, expression) for measure, expression in row if expression}
    found = {}
    for measure, expression in sorted(asked):
        if document.has(measure, expression):
            mean, half = interval(document.values(measure, expression))
            found[f"{measure}[{expression}]"] = [_short(mean), _short(half)]
    return replace(document, results={**document.results, "estimates": found})


def cells(
    experiment: Experiment, table: Table
) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Yield what each row is called, and measure and expression of its cells; None: it is empty."""
    for shown, expression in experiment.rows(table.rows).items():
        row: list[tuple[str, str | None]] = [(column, expression) for column in table.columns]
        difference = None if expression == table.against else f"{expression} - {table.against}"
        if len(terms(expression)) > 1:  # it is a difference itself
            difference = None
        yield shown, row + [(column, difference) for column in compared(table)]


def compared(table: Table) -> tuple[str, ...]:
    """Name the measures whose differences a table shows."""
    return tuple(table.compared or table.columns[:1]) if table.against else ()


def _short(value: Array) -> float | None:
    number = float(value)
    return float(f"{number:.6g}") if np.isfinite(number) else None


def read_document(path: Path) -> Document:
    """Read a file of results."""
    content = json.loads(path.read_text())
    return Document(content["results"], content["measured"])


def write_document(path: Path, document: Document) -> None:
    """Write a file of results, a line a run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _dump({"results": document.results, "measured": document.measured})
    replace_durably(path, (text + "\n").encode())


def _dump(value: Any, depth: int = 0) -> str:  # noqa: ANN401  JSON
    """Write JSON with its upper levels a line an entry."""
    pad, end = "  " * (depth + 1), "  " * depth
    if depth < 3 and isinstance(value, dict) and value:
        lines = (f"{pad}{json.dumps(k)}: {_dump(v, depth + 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{end}}}"
    if depth < 4 and isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(pad + json.dumps(v) for v in value) + f"\n{end}]"
    return json.dumps(value)
