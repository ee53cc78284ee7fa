"""`dropserve score`: a table of a folder's images and how uncertain the service is about each.

Rows are kept in OUT.part as their answers come, a line of JSON each, after a line of the run's
parameters: so a run of hours can be interrupted and resumed. The table is written at the end.
"""

import csv
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dropserve.models.defaults import DEFAULT_SAMPLES
from dropserve.models.image_formats import IMAGE_SUFFIXES
from dropserve.service.cli import ask, options, terminal
from dropserve.service.cli.options import Opt
from dropserve.service.cli.terminal import Refused
from dropserve.service.client import AsyncDropserveClient, DropserveClient
from dropserve.service.schemas import UncertaintyResponse

MEASURES = ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio")
COLUMNS = ("path", "label", "index", "probability", *MEASURES, "model", "version", "error")
PARAMETERS = ("folder", "model", "version", "sha256", "samples", "seed")
Row = dict[str, Any]  # by column
Sort = Literal[
    "path", "mutual-information", "predictive-entropy", "expected-entropy", "variation-ratio"
]


def score(
    folder: Annotated[Path, typer.Argument(help="Folder of images, searched with sub-folders.")],
    out: Annotated[Path, Opt(help="File to write: .csv or .parquet.")],
    url: options.Url = None,
    port: options.Port = None,
    model: options.Model = None,
    version: options.Version = None,
    samples: options.Samples = DEFAULT_SAMPLES,
    seed: options.Seed = 0,
    sort: Annotated[Sort, Opt(metavar="BY", help="path, or a measure, largest first.")] = "path",
    batch: Annotated[int, Opt(min=1, metavar="N", help="Images per request.")] = ask.BATCH,
    in_flight: Annotated[int, Opt(min=1, metavar="N", help="Requests at a time.")] = 4,
    restart: Annotated[bool, Opt("--restart", help="Discard an interrupted run.")] = False,
) -> None:
    """Score the images of a folder, to find those that a person should review.

    If interrupted, the same command continues. The column "error" says why an image has none.
    """
    service = options.find_service(url, port)
    _check_format(out)
    found = images(folder)
    asked = {"folder": str(folder), "model": model, "version": version}
    asked |= {"samples": samples, "seed": seed}
    with (
        progress_file(out, restart=restart) as kept,
        terminal.interruptible(lambda: "the same command continues from here"),
    ):
        with DropserveClient(**service) as client:
            run = kept.agree({k: v for k, v in asked.items() if v is not None}, client)
        missing = kept.missing(found)
        total = len(kept.rows) + len(missing)
        with terminal.progress("images") as moved:

            def done(part: Sequence[Path], answer: UncertaintyResponse | Exception) -> None:
                kept.add(_rows(part, answer))
                moved(len(kept.rows), total)

            how = {name: run[name] for name in ("model", "version", "samples", "seed")}
            how |= {"batch": batch, "in_flight": in_flight}
            patient = AsyncDropserveClient(**service, retries=8, max_wait=120.0)
            ask.send_all(patient, "uncertainty", missing, done, **how)
        _write(out, kept.rows, sort.replace("-", "_"))
    bad = sum(row["error"] is not None for row in kept.rows)
    terminal.say(
        f"{out}: {len(kept.rows):,} images by {run['model']} version {run['version']}"
        + (f", {bad:,} of them with an error" if bad else "")
    )


def images(folder: Path) -> list[Path]:
    """List the files with the suffix of an image, in sub-folders as well, in a fixed order."""
    errors: list[OSError] = []
    found = [
        Path(root, name)
        for root, _, names in os.walk(folder, onerror=errors.append)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if errors:
        raise errors[0]
    if not found:
        raise Refused(f"{folder}: no {', '.join(IMAGE_SUFFIXES)} in it")
    return sorted(found)


def _check_format(out: Path) -> None:
    if out.suffix not in (".csv", ".parquet"):
        raise Refused(f"{out}: must end in .csv or .parquet")
    if not out.parent.is_dir():
        raise Refused(f"{out}: there is no folder {out.parent}: make it first")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401  is it installed?
        except ImportError as error:
            raise Refused("install dropserve[parquet] for pyarrow, or write a .csv") from error


@contextmanager
def progress_file(out: Path, *, restart: bool) -> "Iterator[ProgressFile]":
    """Lock and read OUT.part; remove it after the block, except rows of a block that fails."""
    path = out.with_name(out.name + ".part")
    if out.exists() and not path.exists() and not restart:
        raise Refused(f"{out} exists: give --restart to overwrite it")
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"{path}: another run is writing it") from error
        if restart:
            file.truncate(0)
        try:
            kept = ProgressFile(file)
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(f"{path}: no scores in it ({error}): give --restart") from error
        try:
            yield kept
        except BaseException:
            if not kept.rows:
                path.unlink()
            raise
        path.unlink()


class ProgressFile:
    """The parameters and the rows of a run, in memory and on disk."""

    def __init__(self, file: BufferedRandom) -> None:
        self._file = file
        file.seek(0)
        # the last line has no end if the run was killed while it was written
        lines = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, lines)))
        first, *rest = map(json.loads, lines or [b"null"])
        self.run = {name: first[name] for name in PARAMETERS} if lines else {}
        self.rows = [dict(zip(COLUMNS, values, strict=True)) for values in rest]

    def agree(self, asked: Mapping[str, Any], client: DropserveClient) -> dict[str, Any]:
        """Return the run's parameters; refuse others than those of the rows that are there."""
        self._check_same(asked)
        wanted = {**asked, **self.run}
        model = options.find_model(client, wanted.get("model"), wanted.get("version"))
        served = {"model": model.name, "version": model.version, "sha256": model.sha256}
        self._check_same(served)
        if not self.run:
            self.run = {**asked, **served}
            self._append(self.run)
        return self.run

    def _check_same(self, wanted: Mapping[str, Any]) -> None:
        had = self.run or wanted
        differs = [f"{k} {had.get(k)}, not {v}" for k, v in wanted.items() if had.get(k) != v]
        if differs:
            raise Refused(
                f"the interrupted run had {'; '.join(differs)}: ask for the same, or give --restart"
            )

    def missing(self, found: Sequence[Path]) -> list[Path]:
        """Drop rows with errors or of deleted images; return the images without a row."""
        paths = {_text(path): path for path in found}
        self.rows = [row for row in self.rows if row["error"] is None and row["path"] in paths]
        known = {row["path"] for row in self.rows}
        return [path for text, path in paths.items() if text not in known]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, so that they survive this process."""
        self._append(*([row[column] for column in COLUMNS] for row in rows))
        self.rows += rows

    def _append(self, *values: object) -> None:
        self._file.write(b"".join(json.dumps(value).encode() + b"\n" for value in values))
        self._file.flush()


def _text(path: object) -> str:
    """Write a path so that any file can hold it, even if it is not Unicode."""
    return str(path).encode(errors="backslashreplace").decode()


def _rows(part: Sequence[Path], answer: UncertaintyResponse | Exception) -> list[Row]:
    if isinstance(answer, Exception):
        name, reason = _text(part[0]), (isinstance(answer, OSError) and answer.strerror) or answer
        error = _text(reason).removeprefix(f"{name}: ")
        return [dict.fromkeys(COLUMNS) | {"path": name, "error": error}]
    about = {"model": answer.model, "version": answer.version, "error": None}
    rows = []
    for path, said in zip(part, answer.predictions, strict=True):
        own = {"path": _text(path), "probability": said.mean[said.index]}
        rows.append(said.model_dump(include={"label", "index", *MEASURES}) | own | about)
    return rows


def _write(out: Path, rows: Sequence[Row], sort: str) -> None:
    """Write a table, whole or not at all; by a measure, the largest first and errors last."""
    ordered = sorted(rows, key=lambda row: row["path"])
    if sort != "path":
        ordered.sort(key=lambda row: -1.0 if row[sort] is None else row[sort], reverse=True)
    new = out.with_name(out.name + ".new")
    try:
        if out.suffix == ".parquet":
            import pyarrow as pa
            from pyarrow import parquet

            kinds = dict.fromkeys(COLUMNS, pa.string()) | dict.fromkeys(MEASURES, pa.float64())
            kinds |= {"index": pa.int64(), "version": pa.int64(), "probability": pa.float64()}
            parquet.write_table(pa.Table.from_pylist(ordered, pa.schema(kinds.items())), new)
        else:
            with new.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(ordered)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
