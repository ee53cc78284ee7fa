"""What docs/results.md says, from the results and the experiments' own text; `make docs`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dropserve.lab import experiments
from dropserve.lab.experiment import Experiment, Measure, terms
from dropserve.lab.results import (
    REFERENCE,
    RESULTS,
    Document,
    cells,
    compared,
    read_document,
    with_estimates,
    write_document,
)
from dropserve.models.errors import DataError

TO_BE_WRITTEN = "*These results are newer than their answer, which is to be written.*"


def refresh(folder: Path = RESULTS) -> dict[str, Document]:
    """Bring estimates in line with what the experiments declare; return all results.

    DataError: some are of the quick form, which answers nothing.
    """
    found = {}
    for name in experiments.NAMES:
        path = folder / f"{name}.json"
        if path.exists():
            found[name] = with_estimates(experiments.load(name), read_document(path))
            if found[name].results["quick"]:
                raise DataError(f"{path} is of the quick form: `dropserve lab run {name}`")
            write_document(path, found[name])
    return found


def lines(found: Mapping[str, Document]) -> Iterator[str]:
    """Yield the lines of the page: a list of the questions, and a section each."""
    yield from ('<a id="questions"></a>', "")
    for name in found:
        yield f"- [{experiments.load(name).question}](#{name})"
    for name, document in found.items():
        yield from ("", *_section(name, experiments.load(name), document))


def _section(name: str, experiment: Experiment, document: Document) -> Iterator[str]:
    yield from (f'<a id="{name}"></a>', "", f"## {experiment.question}", "")
    yield from (answer(experiment, document), "")
    yield from (f"- {line}" for line in experiment.setup)
    yield from ("", f"![{experiment.question}](../service/playground/results/{name}.svg)")
    for head, *rows in tables(experiment, document):
        yield from ("", _line(head), "|---" * len(head) + "|", *map(_line, rows))
    measured, seeds = document.measured, document.results["seeds"]
    minutes = measured["processor_seconds"] / 60
    yield ""
    yield (
        f"`dropserve lab run {name}`, {seeds} seeds, {measured['date']}: "
        f"{minutes:.0f} minutes of a processor core, PyTorch {measured['versions']['torch']}, "
        f"{measured['machine']['cpu']}. [All questions](#questions)"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def answer(experiment: Experiment, document: Document) -> str:
    """Return the answer with its figures, if it was written for these results."""
    if experiment.answered != document.digest():
        return TO_BE_WRITTEN

    def show(match: re.Match[str]) -> str:
        name, expression = match.groups()
        return figure(experiment.titled(name), document, name, expression, bold=False)

    return REFERENCE.sub(show, experiment.answer)


def tables(experiment: Experiment, document: Document) -> Iterator[list[list[str]]]:
    """Yield each table: a row of titles, then a row a setting or difference."""
    for one in experiment.tables:
        titles = [experiment.titled(name).title for name in one.columns]
        titles += [
            f"{experiment.titled(m).title}: difference to {one.against}" for m in compared(one)
        ]
        rows = [
            [shown, *(figure(experiment.titled(m), document, m, e) if e else "" for m, e in row)]
            for shown, row in cells(experiment, one)
        ]
        yield [["setting", *titles], *rows]


def figure(
    measure: Measure, document: Document, name: str, expression: str, *, bold: bool = True
) -> str:
    """Show mean and half width as "85.20 ± 0.31", a difference with its sign."""
    estimate = document.results["estimates"].get(f"{name}[{expression}]")
    if estimate is None or estimate[0] is None:
        return ""
    sign = "+" if len(terms(expression)) > 1 else ""
    mean, half = (None if value is None else measure.scale * value for value in estimate)
    text = f"{mean:{sign}z.{measure.digits}f}"
    if half is not None:
        text += f" ± {half:.{measure.digits}f}"
        if sign and bold and abs(mean or 0) > half:
            text = f"**{text}**"
    return text
