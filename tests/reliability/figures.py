"""Figures of the tests of reliability: a JSON file a test, of which docs/reliability.md is made.

A run at another `SCALE` than 1 is a trial: it prints its figures, and writes no file.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dropserve.lab.machine import machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/reliability"
SCALE = float(os.environ.get("SCALE", "1"))
"""Share of the full time and number of requests."""

Figures = dict[str, int | float | str]
"""By what was measured, with its unit."""


def publish(
    name: str,
    command: str,
    figures: Mapping[str, int | float | str],
    passed: bool = True,
    folder: Path = RESULTS,
) -> None:
    """Write the figures of a run as NAME.json, by default in `bench/results/reliability`.

    `command` is what a reader types to measure them again. The keys of `figures` are labels as the
    page shows them, with their unit.
    """
    result = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "commit": _commit(),
        "passed": passed,
        "figures": dict(figures),
    }
    print(json.dumps({name: result}, indent=2))
    if SCALE == 1:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def published(name: str, command: str, folder: Path = RESULTS) -> Iterator[Figures]:
    """Yield a dictionary to be filled; publish it in the end, also when the run fails."""
    figures: Figures = {}
    try:
        yield figures
    except BaseException:
        publish(name, command, figures, passed=False, folder=folder)
        raise
    publish(name, command, figures, folder=folder)


def _commit() -> str:
    """Name the commit that is measured, and say if files differ from it, other than results."""
    found = _git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = _git("diff", "--quiet", "HEAD", "--", ".", ":!bench/results").returncode
    return f"{found or 'unknown'}{'-dirty' if changed else ''}"


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
