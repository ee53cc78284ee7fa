"""What is known so far of a folder's pictures, on disk: so that a run of hours can be interrupted.

A line of JSON each, the first of them the plan. Rows are written as their answers come, in whatever
order; `dropserve.service.cli.scores` makes a table of them when all are there.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from dropserve.service.cli.options import find_model
from dropserve.service.cli.terminal import Refused
from dropserve.service.client import DropserveClient


@dataclass(frozen=True)
class Row:
    """What is known of a picture; without an answer, why there is none."""

    path: str
    label: str | None = None
    index: int | None = None
    probability: float | None = None
    predictive_entropy: float | None = None
    expected_entropy: float | None = None
    mutual_information: float | None = None
    variation_ratio: float | None = None
    model: str | None = None
    version: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Plan:
    """What all rows of a file have in common; a journal of another plan is not continued."""

    folder: str
    model: str
    version: int
    sha256: str
    samples: int
    seed: int


class Journal:
    """The rows so far, on disk; open for one process at a time."""

    def __init__(self, file: BufferedRandom) -> None:
        self.rows: list[Row] = []
        self.plan: Plan | None = None
        self._file = file
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):  # the last run was cut off in the middle of it
                break
            whole += len(line)
            if self.plan is None:
                self.plan = Plan(**json.loads(line))
            else:
                self.rows.append(Row(*json.loads(line)))
        file.truncate(whole)

    def agree(self, asked: Mapping[str, Any], client: DropserveClient) -> Plan:
        """Settle what all rows have in common: what those have that are there already, if any.

        Args:
            asked: fields of a plan; a model or version that is left out is the service's default.
            client: of the service.

        Raises:
            Refused: the rows that are there have something else.
        """
        if self.plan is None:
            model = find_model(client, asked.get("model"), asked.get("version"))
            about = {"model": model.name, "version": model.version, "sha256": model.sha256}
            self.plan = Plan(**{**asked, **about})
            self._write([asdict(self.plan)])
            return self.plan
        _check_same(self.plan, asked)
        # Another service, or another folder of checkpoints, may have other weights of that name.
        model = client.model(self.plan.model, self.plan.version)
        _check_same(self.plan, {"sha256": model.sha256})
        return self.plan

    def missing(self, found: Iterable[Path]) -> list[Path]:
        """Return the pictures without an answer, and forget all rows but those of the others.

        An error is no answer: what was wrong, say that no more files could be opened, may be so no
        longer. A picture that is gone needs no row.
        """
        pictures = {text_of(path): path for path in found}
        self.rows = [row for row in self.rows if row.error is None and row.path in pictures]
        known = {row.path for row in self.rows}
        return [path for text, path in pictures.items() if text not in known]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, whatever happens to this process."""
        self._write([list(vars(row).values()) for row in rows])
        self.rows += rows

    def _write(self, values: Iterable[object]) -> None:
        self._file.write(b"".join(json.dumps(value).encode() + b"\n" for value in values))
        self._file.flush()


def _check_same(plan: Plan, wanted: Mapping[str, Any]) -> None:
    held = asdict(plan)
    differs = [f"{k} {held[k]}, not {v}" for k, v in wanted.items() if held[k] != v]
    if differs:
        raise Refused(
            f"the run that was interrupted had {'; '.join(differs)}: ask for the same, or give "
            f"--restart"
        )


@contextmanager
def journal_of(out: Path, *, restart: bool) -> Iterator[Journal]:
    """Open the journal of a file that is to be written.

    It is removed after the block; where the block fails, it is left if it has rows.

    Args:
        out: the file.
        restart: begin anew, whatever there is.

    Raises:
        Refused: the file is there already, another process writes it, or the journal is none.
    """
    path = out.with_name(out.name + ".part")
    if out.exists() and not path.exists() and not restart:
        raise Refused(f"{out} is there already: give --restart to write it anew")
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"{path}: another run is writing it") from error
        file.seek(0)
        if restart:
            file.truncate()
        try:
            opened = Journal(file)
        except (ValueError, TypeError) as error:
            raise Refused(f"{path}: no scores in it ({error}): give --restart") from error
        try:
            yield opened
        except BaseException:
            if not opened.rows:
                path.unlink()
            raise
        path.unlink()


def text_of(path: Path) -> str:
    """Write a path so that any file can hold it, even if its name is no text."""
    return str(path).encode(errors="backslashreplace").decode()
