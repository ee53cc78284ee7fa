"""`dropserve score`: a table of a folder's images and how uncertain a model is about each.

Rows are kept in OUT.part as they come, a line of JSON each, after a line of the run's parameters:
so a run of hours can be interrupted and resumed. The table is written at the end.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer

from dropserve.models.defaults import DEFAULT_SAMPLES
from dropserve.models.image_formats import IMAGE_SUFFIXES
from dropserve.service.cli import ask, options, score_local, score_ray, scores, terminal
from dropserve.service.cli.options import Opt
from dropserve.service.cli.scores import COLUMNS, ERROR, PATH, Mode, Row, Run, Timings
from dropserve.service.cli.terminal import Refused
from dropserve.service.client import AsyncDropserveClient, DropserveClient
from dropserve.service.schemas import (
    MEASURES,
    Prediction,
    PredictResponse,
    UncertainPrediction,
    UncertaintyResponse,
)

Engine = Literal["http", "local", "ray"]
Sort = Literal[
    "path", "mutual-information", "predictive-entropy", "expected-entropy", "variation-ratio"
]
Done = Callable[[Sequence[Row]], None]
"""Takes rows as they come."""
Find = Callable[[str | None, int | None], dict[str, Any]]
"""Chooses model, version and sha256 by a name and a version, or by default."""
Work = Callable[[Run, Sequence[Path], Done], Timings | None]
"""Scores files, by an engine."""
_ENGINES = {
    **dict.fromkeys(("url", "port", "batch", "in_flight"), ("http",)),
    **dict.fromkeys(("checkpoints",), ("local", "ray")),
    **dict.fromkeys(("processes",), ("local",)),
    **dict.fromkeys(("sort",), ("http", "local")),
    **dict.fromkeys(("actors", "image_column", "id_column"), ("ray",)),
}
"""Which engines an option is of, where it is not of all."""


def score(
    context: typer.Context,
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder of images, searched with sub-folders; for ray also of Parquet, and a URL."
        ),
    ],
    out: Annotated[
        str, Opt(help="File to write: .csv or .parquet; for ray a folder or URL of Parquet.")
    ],
    engine: Annotated[
        Engine,
        Opt(
            metavar="ENGINE",
            help="http asks a service; local and ray load the model: processes, or Ray's actors.",
        ),
    ] = "http",
    mode: Annotated[
        Mode, Opt(metavar="MODE", help="uncertainty, or predict: eval mode, without measures.")
    ] = "uncertainty",
    url: options.Url = None,
    port: options.Port = None,
    checkpoints: options.Checkpoints = None,
    model: options.Model = None,
    version: options.Version = None,
    samples: options.Samples = DEFAULT_SAMPLES,
    seed: options.Seed = 0,
    sort: Annotated[Sort, Opt(metavar="BY", help="path, or a measure, largest first.")] = "path",
    batch: Annotated[int, Opt(min=1, metavar="N", help="Images per request.")] = ask.BATCH,
    in_flight: Annotated[int, Opt(min=1, metavar="N", help="Requests at a time.")] = 4,
    processes: Annotated[
        int | None, Opt(min=1, metavar="N", help="Of local; default: one a core.")
    ] = None,
    actors: Annotated[
        int | None, Opt(min=1, metavar="N", help="Of ray; default: one a core of the cluster.")
    ] = None,
    image_column: Annotated[
        str, Opt(metavar="NAME", help="Column of Parquet with the images' bytes.")
    ] = "image",
    id_column: Annotated[
        str, Opt(metavar="NAME", help="Column of Parquet that is written as path.")
    ] = "path",
    restart: Annotated[bool, Opt("--restart", help="Discard an interrupted run.")] = False,
) -> None:
    """Score the images of a folder, to find those that a person should review.

    If interrupted, the same command continues. The column "error" says why an image has none.
    """
    _check_options(context, engine, mode)
    asked = {"folder": folder, "model": model, "version": version, "mode": mode}
    asked |= {"samples": samples, "seed": seed} if mode == "uncertainty" else {}
    asked = {name: value for name, value in asked.items() if value is not None}
    if engine != "http":
        settings = options.read_settings(checkpoints=checkpoints)
        asked |= {"device": settings.device, "precision": scores.precision(settings)}
    if engine == "ray":
        columns = score_ray.Columns(image_column, id_column)
        score_ray.score(asked, settings, folder, out, columns, actors, restart=restart)
        return
    if engine == "local":
        find: Find = partial(scores.find_version, settings)
        work: Work = partial(score_local.score, settings, processes)
    else:
        service = options.find_service(url, port)
        find = partial(_find_served, service)
        work = partial(_ask, service, batch, in_flight)
    _score_table(asked, Path(folder), Path(out), find, work, sort.replace("-", "_"), restart)


def _check_options(context: typer.Context, engine: Engine, mode: Mode) -> None:
    """Refuse options that would have no effect."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        option = f"--{name.replace('_', '-')}"
        if engine not in _ENGINES.get(name, (engine,)):
            of = " and ".join(_ENGINES[name])
            raise Refused(f"{option} is of --engine {of}, not of {engine}: leave it out")
        if mode == "predict" and name in ("samples", "seed"):
            raise Refused(f"{option} is of --mode uncertainty, not of predict: leave it out")


def _score_table(
    asked: Mapping[str, Any],
    folder: Path,
    out: Path,
    find: Find,
    work: Work,
    sort: str,
    restart: bool,
) -> None:
    """Write one table; `find` chooses the version, and `work` scores the files that lack a row."""
    _check_format(out)
    found = images(folder)
    with (
        progress_file(out, restart=restart) as kept,
        terminal.interruptible(lambda: "the same command continues from here"),
    ):
        run = kept.agree(asked, find)
        missing = kept.missing(found)
        total = len(kept.rows) + len(missing)
        with terminal.progress("images") as moved:

            def done(rows: Sequence[Row]) -> None:
                kept.add(rows)
                moved(len(kept.rows), total)

            timings = work(run, missing, done)
        scores.write_table(out, kept.rows, sort)
    bad = sum(row[ERROR] is not None for row in kept.rows)
    terminal.say(scores.summary(str(out), len(kept.rows), bad, run, timings))


def _find_served(
    service: Mapping[str, Any], name: str | None, version: int | None
) -> dict[str, Any]:
    with DropserveClient(**service) as client:
        model = options.find_model(client, name, version)
    return {"model": model.name, "version": model.version, "sha256": model.sha256}


def _ask(
    service: Mapping[str, Any],
    batch: int,
    in_flight: int,
    run: Run,
    paths: Sequence[Path],
    done: Done,
) -> None:
    """Have a service score files."""
    how: dict[str, Any] = {"model": run.model, "version": run.version}
    if run.mode == "uncertainty":
        how |= {"samples": run.samples, "seed": run.seed}
    client = AsyncDropserveClient(**service, retries=8, max_wait=120.0)

    def answered(part: Sequence[Path], answer: Any) -> None:  # noqa: ANN401  of either mode
        done(_rows(part, answer))

    ask.send_all(client, run.mode, paths, answered, batch=batch, in_flight=in_flight, **how)


def _rows(
    part: Sequence[Path], answer: PredictResponse | UncertaintyResponse | Exception
) -> list[Row]:
    if isinstance(answer, Exception):
        return [scores.failed(scores.text(part[0]), answer)]
    rows = []
    predictions: Sequence[Prediction | UncertainPrediction] = answer.predictions
    for path, said in zip(part, predictions, strict=True):
        if isinstance(said, Prediction):
            probability, measures = said.probability, [None] * len(MEASURES)
        else:
            probability = said.mean[said.index]
            measures = [getattr(said, name) for name in MEASURES]
        own = scores.text(path), said.label, said.index, probability, *measures
        rows.append((*own, answer.model, answer.version, None))
    return rows


def images(folder: Path) -> list[Path]:
    """List the files with the suffix of an image, in sub-folders as well, in a fixed order."""
    errors: list[OSError] = []
    found = [
        os.path.join(root, name)  # noqa: PTH118  paths take longer to make and to sort
        for root, _, names in os.walk(folder, onerror=errors.append)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if errors:
        raise errors[0]
    if not found:
        raise Refused(f"{folder}: no {', '.join(IMAGE_SUFFIXES)} in it")
    return [*map(Path, sorted(found))]


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
        first, *rest = map(orjson.loads, lines or [b"null"])
        self.run = Run.from_json(first) if lines else None
        self.rows: list[Row] = [*map(tuple, rest)]
        if any(len(row) != len(COLUMNS) for row in self.rows):
            raise ValueError("rows of other columns")

    def agree(self, asked: Mapping[str, Any], find: Find) -> Run:
        """Return the run's parameters; refuse others than those of the rows that are there."""
        had = self.run.to_json() if self.run else {}
        if had:
            scores.require_same(had, asked)
        wanted = {**asked, **had}
        served = find(wanted.get("model"), wanted.get("version"))
        if had:
            scores.require_same(had, served)
        if self.run is None:
            self.run = Run(**{"samples": None, "seed": None} | wanted | served)
            self._append(self.run.to_json())
        return self.run

    def missing(self, found: Sequence[Path]) -> list[Path]:
        """Drop rows with errors or of deleted images; return the images without a row."""
        paths = {scores.text(path): path for path in found}
        self.rows = [row for row in self.rows if row[ERROR] is None and row[PATH] in paths]
        known = {row[PATH] for row in self.rows}
        return [path for text, path in paths.items() if text not in known]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, so that they survive this process."""
        self._append(*rows)
        self.rows += rows

    def _append(self, *values: object) -> None:
        self._file.write(b"".join(orjson.dumps(value) + b"\n" for value in values))
        self._file.flush()
