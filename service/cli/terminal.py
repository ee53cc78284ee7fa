"""What the command line prints: tables, bars, progress and errors. It knows no torch."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dropserve.service.errors import DropserveError
from dropserve.service.schemas import ModelDetails, Prediction, UncertainPrediction
from dropserve.service.settings import Settings, environment_name

Errors = tuple[type[Exception], ...]
Scores = Mapping[str, float]

_BAR = 30  # characters
_MOST_BARS = 10
_MOST_COLUMNS, _MOST_PAIRS = 12, 20
_FEW = 1000
"""Test images, below which scores differ much from one sample of them to the next."""
_SCORES = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE"}


class Refused(Exception):
    """What was asked for on the command line makes no sense; says what would."""


@contextmanager
def reported(*, wrong: Errors, failed: Errors) -> Iterator[None]:
    """Turn errors into a line on stderr, and one for each of their notes, and an exit code.

    Args:
        wrong: what whoever typed the command can mend, besides `Refused` and files that are not
            there: exit code 2.
        failed: all else that may go wrong: exit code 1. Any other error is a bug and is raised.
    """
    wrong = (*wrong, Refused, FileNotFoundError, IsADirectoryError, PermissionError)
    try:
        yield
    except BrokenPipeError:  # the reader has seen enough
        raise
    except (*wrong, *failed) as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        for note in getattr(error, "__notes__", ()):
            typer.echo(note, err=True)
        raise typer.Exit(2 if isinstance(error, wrong) else 1) from error


@contextmanager
def interruptible(hint: Callable[[], str]) -> Iterator[None]:
    """Say on Ctrl-C how to go on, and exit as a shell expects."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted: {hint()}", err=True)
        raise typer.Exit(130) from error


def say(*lines: str) -> None:
    """Print lines as they are: no markup, no wrapping, no colour."""
    for line in lines:
        console().print(line, soft_wrap=True)


def print_json(value: object) -> None:
    """Print plain values as JSON, and nothing around it."""
    say(json.dumps(value, indent=2))


class TrainingProgress:
    """A live bar with the last epoch's figures; a plain line an epoch where nobody watches.

    Args:
        epochs: in the whole run.
        finished: those that an earlier part of the run has done.
    """

    def __init__(self, epochs: int, finished: int = 0) -> None:
        self._epochs = epochs
        self._finished = finished
        self._bar = _progress(TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self._task = self._bar.add_task("", total=epochs, completed=finished, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def batch(self, done: int, total: int) -> None:
        """Show how far the epoch is that runs now."""
        number = min(self._finished + 1, self._epochs)
        self._bar.update(
            self._task,
            description=f"epoch {number}/{self._epochs}",
            completed=self._finished + done / total,
        )

    def epoch(
        self,
        *,
        number: int,
        loss: float,
        train_accuracy: float,
        validation_accuracy: float,
        images_per_second: float,
        best: bool,
        seconds: float,
    ) -> None:
        """Show the figures of a finished epoch, as `dropserve.models.training.Epoch` has them."""
        self._finished = number
        figures = (
            f"loss {loss:.4f}, accuracy {train_accuracy:.2%} in training, "
            f"{validation_accuracy:.2%} in validation{' (best)' if best else ''}, "
            f"{images_per_second:,.0f} images/s"
        )
        self._bar.update(self._task, completed=number, figures=figures)
        if self._bar.disable:
            say(f"epoch {number}/{self._epochs}: {figures}, {seconds:.1f} s")


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar that a callback `(done, total)` moves; nothing where nobody watches."""
    with _progress(TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_scores(evaluation: Mapping[str, Any]) -> None:
    """Print what `dropserve.models.evaluation.evaluate` returns."""
    table = Table(title=f"{evaluation['images']:,} test images", title_justify="left")
    table.add_column("mode", no_wrap=True)
    for heading in _SCORES.values():
        table.add_column(heading, justify="right")
    rows = {"eval": "eval mode", "dropout": "Monte Carlo dropout"}
    for key, title in rows.items():
        if figures := evaluation.get(key):
            title += f", T = {figures['samples']}" if "samples" in figures else ""
            table.add_row(title, *(f"{figures[name]:.4f}" for name in _SCORES))
    console().print(table)
    if "dropout" in evaluation:
        say(_compared(**evaluation))


def _compared(*, images: int, eval: Scores, dropout: Scores, **_: object) -> str:  # noqa: A002
    """Say whether Monte Carlo dropout's probabilities are better than those of eval mode."""
    lower = " and ".join(_SCORES[name] for name in ("nll", "ece") if dropout[name] < eval[name])
    higher = " and ".join(_SCORES[name] for name in ("nll", "ece") if dropout[name] > eval[name])
    told = [f"{how} {which}" for how, which in (("lower", lower), ("higher", higher)) if which]
    which = ", ".join(told) or "the same NLL and ECE"
    text = (
        f"hint: Monte Carlo dropout's probabilities have {which} than eval mode's (lower is better)"
    )
    if images < _FEW:
        text += f", perhaps by chance: {images} images are few"
    if higher:
        text += "; it helps overconfident networks: for others take eval mode's probabilities"
    return text


def show_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Print how often a label (row) gets which answer (column); of many classes, the worst pairs.

    Args:
        counts: a row a class of the labels, a column a class of the answers.
        classes: their names.
    """
    if len(classes) <= _MOST_COLUMNS:
        head = ["label", *map(str, range(len(classes)))]
        rows = [
            [f"{k} {name}", *(str(count or "·") for count in row)]
            for k, (name, row) in enumerate(zip(classes, counts, strict=True))
        ]
    else:
        pairs = [(n, i, k) for i, row in enumerate(counts) for k, n in enumerate(row) if i != k]
        head = ["label", "answer", "images", "of the label's"]
        rows = [
            [classes[i], classes[k], str(n), f"{n / sum(counts[i]):.1%}"]
            for n, i, k in sorted(pairs, key=lambda pair: -pair[0])[:_MOST_PAIRS]
            if n
        ]
    table = Table(title="answers in eval mode", title_justify="left", box=SIMPLE)
    for title in head:
        table.add_column(title, justify="left" if title in ("label", "answer") else "right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def show_prediction(image: str, prediction: Prediction, classes: Sequence[str]) -> None:
    """Print one image's label, and a bar a class, the most probable first."""
    say(f"{image}: {prediction.label} ({prediction.probability:.1%})")
    table = Table.grid(padding=(0, 2))
    for index in _ranked(prediction.probabilities):
        p = prediction.probabilities[index]
        table.add_row(f"  {classes[index]}", _bar(p, p, p), f"{p:6.1%}")
    console().print(table)


def show_uncertainty(
    image: str, prediction: UncertainPrediction, classes: Sequence[str], samples: int
) -> None:
    """Print one image's label, a bar with an interval a class, and where the doubt comes from."""
    mean, interval = prediction.mean, prediction.interval
    say(f"{image}: {prediction.label} ({mean[prediction.index]:.1%}, mean of {samples} samples)")
    table = Table.grid(padding=(0, 2))
    for index in _ranked(mean):
        lower, upper = interval.lower[index], interval.upper[index]
        bar = _bar(lower, mean[index], upper)
        numbers = f"{mean[index]:6.1%}  [{lower:.1%}, {upper:.1%}]"
        table.add_row(f"  {classes[index]}", bar, numbers)
    console().print(table)
    say(f"  █▓ up to the mean; ▓░ and [ ]: where {interval.level:.0%} of the thinned networks lie")
    console().print(_doubt(prediction))


def show_models(models: Sequence[ModelDetails]) -> None:
    """Print the models of a service, and how Monte Carlo dropout runs on each."""
    table = Table("model", "version", "all versions", "default", "path", "precision")
    for model in models:
        versions = ", ".join(map(str, model.versions))
        default = "yes" if model.default else ""
        how = (model.path, model.precision.dtype)
        pinned = " (pinned)" if model.version == model.pinned else ""
        table.add_row(model.name, f"{model.version}{pinned}", versions, default, *how)
    console().print(table)
    for model in models:
        for refused in model.refused:
            say(f"{model.name} {refused.version} refused: {refused.reason}")
        for changed in model.changed:
            say(f"{model.name} {changed.version} served from memory: {changed.reason}")
        if model.pin_problem is not None:
            say(f"{model.name}: the pin is not followed: {model.pin_problem}")


def show_settings(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what `settings_rows` returns."""
    table = Table()
    table.add_column("variable", no_wrap=True)
    for heading in ("default", "now", "meaning"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        default, value = (_cell(row[key]) for key in ("default", "value"))
        table.add_row(row["variable"], default, value, row["meaning"])
    console().print(table)


def settings_rows(settings: Settings) -> list[dict[str, Any]]:
    """List every setting: its variable, default, value and meaning, as plain values."""
    values = settings.model_dump(mode="json")
    defaults = Settings.model_construct().model_dump(mode="json")  # reads no environment
    return [
        {
            "variable": environment_name(name),
            "default": defaults[name],
            "value": values[name],
            "meaning": field.description,
        }
        for name, field in Settings.model_fields.items()
    ]


def one_line(error: Exception) -> str:
    """Say what an error says, with the file and the request that it is about."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    if isinstance(error, DropserveError) and error.request_id:
        message += f" (request {error.request_id})"
    return " ".join(message.split())


def _doubt(prediction: UncertainPrediction) -> Table:
    """Say the three uncertainties in words, with their names and the largest that there can be."""
    most = math.log(len(prediction.mean))
    rows = (
        ("doubt in all", prediction.predictive_entropy, f"predictive entropy, at most {most:.3f}"),
        (
            "from the data",
            prediction.expected_entropy,
            "expected entropy: each network wavers by itself",
        ),
        (
            "from the model",
            prediction.mutual_information,
            "mutual information: the networks disagree",
        ),
    )
    table = Table.grid(padding=(0, 2))
    for words, nats, name in rows:
        table.add_row(f"  {words}", f"{nats:.3f} nats", name)
    votes = f"{prediction.variation_ratio:.1%} of the networks"
    table.add_row("  votes against", votes, "variation ratio")
    return table


def _ranked(values: Sequence[float]) -> list[int]:
    """Return the indices of the largest values, the largest first."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:_MOST_BARS]


def _bar(lower: float, mean: float, upper: float) -> str:
    """Draw a bar up to the mean, its shaded end and what is beyond it the interval."""
    start, middle, end = (round(p * _BAR) for p in (min(lower, mean), mean, max(mean, upper)))
    return ("█" * start + "▓" * (middle - start) + "░" * (end - middle)).ljust(_BAR)


def _cell(value: object) -> str:
    if value in (None, [], ""):
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _progress(*columns: TextColumn | TimeRemainingColumn) -> Progress:
    screen = console()
    description, bar = TextColumn("{task.description}"), BarColumn(bar_width=_BAR)
    return Progress(description, bar, *columns, console=screen, disable=not screen.is_terminal)


def console() -> Console:
    """Make a console on what is standard output now, printing text as it is."""
    return Console(highlight=False, markup=False, emoji=False)
