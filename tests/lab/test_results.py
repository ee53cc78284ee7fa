"""The lab's page: each number is in the results, and means and intervals are those of the runs.

The oracle reads the JSON by itself, and takes quantiles of Student's distribution from a table.
"""

import json
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dropserve.lab import experiments, page
from dropserve.lab.experiment import Experiment, Setting, Table, terms
from dropserve.lab.results import REFERENCE, RESULTS, Document, interval, with_estimates

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
PLAYGROUND = ROOT / "service" / "playground"
STUDENT = {2: 12.70620474, 3: 4.30265273, 5: 2.77644511, 10: 2.26215716}
"""Quantile .975 for so many seeds, of one degree of freedom less."""
NUMBER = re.compile(r"(?<![\w.])[+-]?\.?\d[\d,]*(?:\.\d+)?(?![\w]|\.\d)")
FIGURE = re.compile(r"\*{0,2}([+-]?\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?\*{0,2}")


@pytest.fixture(scope="module")
def sections():
    """The page's text by experiment."""
    found = re.split(r'<a id="(\w+)"></a>\n', PAGE.read_text())[3:]  # after the questions
    return dict(zip(found[::2], found[1::2], strict=True))


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def expected(found, measure, expression):
    """Mean and half width over seeds, by the definition; None where a run has none."""
    total = 0
    for label, sign in terms(expression):
        values = [run.get(measure) for run in found["runs"][label]]
        if None in values:
            return None
        total = total + sign * np.array(values)
    spread = math.sqrt(((total - total.mean()) ** 2).sum() / (len(total) - 1))
    return total.mean(), STUDENT[len(total)] * spread / math.sqrt(len(total))


def test_every_experiment_is_on_the_page(sections):
    assert tuple(sections) == experiments.NAMES


@pytest.mark.parametrize("name", experiments.NAMES)
def test_the_tables_are_means_and_intervals_of_the_runs(name, sections):
    experiment, found = experiments.load(name), results(name)
    lines = [line for line in sections[name].splitlines() if line.startswith("|")]
    tables, seen = [], 0
    for line in lines:
        if line.startswith("| setting |"):
            tables.append([])
        elif not line.startswith("|---"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    for table, rows in zip(experiment.tables, tables, strict=True):
        wanted = experiment.rows(table.rows)
        assert [row[0] for row in rows] == [*wanted]
        for (_, *cells), expression in zip(rows, wanted.values(), strict=True):
            asked = [(measure, expression) for measure in table.columns]
            if table.against:
                differs = expression != table.against and " - " not in expression
                difference = f"{expression} - {table.against}" if differs else None
                asked += [(m, difference) for m in table.compared or table.columns[:1]]
            for cell, (measure, e) in zip(cells, asked, strict=True):
                known = expected(found, measure, e) if e else None
                assert bool(cell) == (known is not None), (measure, e)
                if known is not None:
                    check(cell, known, experiment.titled(measure), signed=" - " in e)
                    seen += 1
    assert seen > 3


def check(cell, known, measure, *, signed):
    mean, half = (float(part) for part in FIGURE.fullmatch(cell).groups())
    scale, rounding = 100 if measure.percent else 1, 0.5 * 10**-measure.digits
    for shown, value in zip((mean, half), known, strict=True):
        assert abs(shown - scale * value) <= rounding + 1e-5 * abs(scale * value)
    if abs(abs(known[0]) - known[1]) > 1e-5 * known[1]:
        assert cell.startswith("**") == (signed and abs(known[0]) > known[1])


@pytest.mark.parametrize("name", experiments.NAMES)
def test_each_answer_was_written_for_these_results(name, sections):
    experiment, found = experiments.load(name), results(name)
    assert experiment.answered == Document(found, {}).digest()
    assert page.TO_BE_WRITTEN not in sections[name]
    answer = next(line for line in sections[name].splitlines()[3:] if line)
    text = re.split(REFERENCE.pattern, experiment.answer)
    for before, measure, expression, after in zip(
        text[::3], text[1::3], text[2::3], text[3::3], strict=False
    ):
        answer = answer.removeprefix(before)
        cell = FIGURE.match(answer).group()
        known = expected(found, measure, expression)
        check(cell, known, experiment.titled(measure), signed=False)
        answer = answer.removeprefix(cell)
        assert answer.startswith(after)
    assert answer == text[-1]


@pytest.mark.parametrize("name", experiments.NAMES)
def test_every_other_number_of_the_text_is_declared(name):
    """Those of the question, the set-up and the answer's words are in the settings."""
    experiment, found = experiments.load(name), results(name)
    known = {abs(float(n)) for n in numbers(found["settings"])} | {float(found["seeds"])} | COMMON
    known |= {n for label in found["settings"] for n in texts(label)}
    words = REFERENCE.sub("", experiment.answer)
    text = " ".join((experiment.question, *experiment.setup, words))
    assert [n for n in texts(text) if n not in known] == []


COMMON = {1.0, 95.0, 10_000.0}
"""One as a word is, the level of intervals in percent, and the test images of Fashion-MNIST."""


def texts(text):
    return [abs(float(n.replace(",", ""))) for n in NUMBER.findall(text)]


def numbers(value):
    if isinstance(value, dict):
        return [n for each in value.values() for n in numbers(each)]
    if isinstance(value, list):
        return [len(value), *(n for each in value for n in numbers(each))]
    if isinstance(value, str):
        return texts(value)
    return [value] if isinstance(value, int | float) else []


def test_the_pages_are_those_of_the_results():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    found = {}
    for name in experiments.NAMES:
        content = json.loads((RESULTS / f"{name}.json").read_text())
        document = Document(content["results"], content["measured"])
        assert with_estimates(experiments.load(name), document) == document
        found[name] = document
        assert (PLAYGROUND / "results" / f"{name}.svg").exists()
    for file, lines in (
        (PAGE, page.lines(found)),
        (PLAYGROUND / "results.html", [generate["rendered"](page.lines(found))]),
    ):
        text = file.read_text()
        assert generate["fill"](text, "experiments", lines) == text, "make docs writes it anew"


def test_an_interval_covers_the_mean_as_often_as_it_says():
    drawn = np.random.default_rng(0).normal(3, 2, (5, 20_000))
    mean, half = interval(drawn)
    assert (np.abs(mean - 3) <= half).mean() == pytest.approx(0.95, abs=0.005)
    assert half[0] == pytest.approx(STUDENT[5] * np.std(drawn[:, 0], ddof=1) / math.sqrt(5), 1e-5)


def test_differences_are_paired_and_an_old_answer_is_not_shown():
    experiment = Experiment(
        "Why?", ("a", "b", "c"), [Setting("a"), Setting("b")], lambda _run: {},
        [Table(["accuracy"], against="b")], [], "It is {accuracy[a - b]} points.",
    )  # fmt: skip
    runs = {"a": [{"accuracy": x + 0.01} for x in (0.2, 0.9)],
            "b": [{"accuracy": x} for x in (0.2, 0.9)]}  # fmt: skip
    document = with_estimates(experiment, Document({"runs": runs}, {}))
    assert document.results["estimates"]["accuracy[a - b]"] == pytest.approx([0.01, 0], abs=1e-9)
    assert page.answer(experiment, document) == page.TO_BE_WRITTEN
    answered = replace(experiment, answered=document.digest())
    assert page.answer(answered, document) == "It is +1.00 ± 0.00 points."
    ((head, *rows),) = page.tables(experiment, document)
    assert head[-1] == "test accuracy, %: difference to b"
    assert [row[-1] for row in rows] == ["**+1.00 ± 0.00**", ""]
    with pytest.raises(ValueError, match="labels must differ"):
        replace(experiment, settings=[Setting("a - b")])
