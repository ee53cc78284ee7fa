"""Shows how far long work is, on standard error: tables and JSON stay clean."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def follow(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items behind a bar, which goes when they are through; no bar without a terminal."""
    console = Console(stderr=True)
    yield from track(
        items, title, total, console=console, transient=True, disable=not console.is_terminal
    )
