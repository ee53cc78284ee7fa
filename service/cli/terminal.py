"""What commands print with: plain lines, JSON, progress bars, and errors. Loads no PyTorch."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from dropserve.models.errors import CheckpointNotWritten
from dropserve.service.errors import DropserveError

BAR = 30  # characters


class Refused(Exception):
    """What the command line asks for is impossible; the message says what is possible."""


def console() -> Console:
    """Make a console on the current standard output that prints text as it is."""
    return Console(highlight=False, markup=False, emoji=False)


def say(*lines: str) -> None:
    """Print lines as they are: no markup, no wrapping, no colour."""
    for line in lines:
        console().print(line, soft_wrap=True)


def print_json(value: object) -> None:
    """Print plain values as JSON."""
    say(json.dumps(value, indent=2))


def bar(*columns: ProgressColumn) -> Progress:
    """Make a progress bar with columns behind it; where the output is no terminal, nothing."""
    screen = console()
    description, done = TextColumn("{task.description}"), BarColumn(bar_width=BAR)
    return Progress(description, done, *columns, console=screen, disable=not screen.is_terminal)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; the callback `(done, total)` moves it."""
    with bar(TimeRemainingColumn()) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def interruptible(hint: Callable[[], str]) -> Iterator[None]:
    """Say how to continue after Ctrl-C, with exit code 130 as a shell expects, or a full disk."""
    try:
        yield
    except CheckpointNotWritten as error:
        error.add_note(hint())
        raise
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted: {hint()}", err=True)
        raise typer.Exit(130) from error


def one_line(error: Exception) -> str:
    """Return an error's message in one line, with the file and the request that it is about."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    if isinstance(error, DropserveError) and error.request_id:
        message += f" (request {error.request_id})"
    return " ".join(message.split())
