"""What every engine of `dropserve score` needs: the parameters of a run, its rows and its table.

Loads neither PyTorch nor NumPy.
"""

import csv
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dropserve.models import checkpoint
from dropserve.models.defaults import Device, Precision
from dropserve.service.cli.options import repository
from dropserve.service.cli.terminal import Refused
from dropserve.service.schemas import MEASURES
from dropserve.service.settings import Settings

Mode = Literal["predict", "uncertainty"]
COLUMNS = ("path", "label", "index", "probability", *MEASURES, "model", "version", "error")
PATH, ERROR = COLUMNS.index("path"), COLUMNS.index("error")
Row = tuple[Any, ...]  # a value a column


@dataclass(frozen=True)
class Run:
    """What decides every row of a run: a run that is resumed has the same.

    Attributes:
        folder: where the images are, as it was given.
        model: name of the model that answers.
        version: of the model.
        sha256: of the version's weights.
        mode: whether an image is asked about in eval mode, or under Monte Carlo dropout.
        samples: thinned networks; None in eval mode.
        seed: of their masks; None in eval mode.
        device: the setting, which rounding depends on; None: the service has its own.
        precision: likewise.
    """

    folder: str
    model: str
    version: int
    sha256: str
    mode: Mode
    samples: int | None
    seed: int | None
    device: Device | None = None
    precision: Precision | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Run":
        """Read what was written; KeyError if a value is missing. Earlier releases had one mode."""
        values = {"mode": "uncertainty", "device": None, "precision": None, **values}
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def require_same(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse parameters that differ from those of the run that is to be continued.

    How the service rounds, by which a run was begun, is not known.
    """
    unknown = {k for k in ("device", "precision") if had.get(k) is None}
    compared = {k: v for k, v in wanted.items() if k not in unknown}
    differs = [f"{k} {had.get(k)}, not {v}" for k, v in compared.items() if had.get(k) != v]
    if differs:
        raise Refused(
            f"the interrupted run had {'; '.join(differs)}: ask for the same, or give --restart"
        )


def find_version(settings: Settings, name: str | None, version: int | None) -> dict[str, Any]:
    """Choose a version as a service would: its model, version, sha256."""
    models = repository(settings)
    if version is not None and not name:
        raise Refused("--version is of a model: give --model as well")
    if not (name := name or settings.default_model):
        there = [name for name in models.find() if models.versions(name)]
        if len(there) != 1:
            where, listed = settings.checkpoints, ", ".join(there) or "none"
            raise Refused(f"give --model: there are {listed} in {where} (DROPSERVE_CHECKPOINTS)")
        (name,) = there
    if version is None and name == settings.default_model:
        version = settings.default_version
    version = models.choose(name, version or models.pinned(name))
    with models.local(name, version) as path:
        return {"model": name, "version": version, "sha256": checkpoint.stated_sha256(path)}


def precision(settings: Settings) -> Precision:
    """Return the precision of a run's processes: each would time "auto" for itself."""
    return "float32" if settings.precision == "auto" else settings.precision


class TooLarge(OSError):
    """An image has more bytes than it may have."""


def require_size(size: int, most: int) -> None:
    """Raise TooLarge for more than `most` bytes."""
    if size > most:
        raise TooLarge(errno.EFBIG, f"larger than {most:,} bytes, DROPSERVE_MAX_BODY_BYTES")


def read_file(path: str, most: int) -> bytes:
    """Read a file; OSError: it cannot be read, or is too large."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  pathlib's takes ten times as long
        require_size(os.fstat(file.fileno()).st_size, most)
        return file.read()


def text(path: object) -> str:
    """Write a path so that any file can hold it, even if it is not Unicode."""
    return str(path).encode(errors="backslashreplace").decode()


def failed(name: str, reason: object) -> Row:
    """Make the row of an image that has no scores, and says why."""
    reason = (isinstance(reason, OSError) and reason.strerror) or reason
    return (name, *[None] * (len(COLUMNS) - 2), text(reason).removeprefix(f"{name}: "))


def summary(out: str, rows: int, bad: int, run: Run, timings: "Timings | None") -> str:
    """Say in a line what a run made."""
    errors = f", {bad:,} of them with an error" if bad else ""
    return f"{out}: {rows:,} images by {run.model} version {run.version}{errors}{timings or ''}"


@dataclass
class Timings:
    """Seconds of processor time, of all processes together."""

    decoding: float = 0.0
    inferring: float = 0.0

    def __iadd__(self, other: "Timings") -> "Timings":
        """Add another process' seconds."""
        self.decoding += other.decoding
        self.inferring += other.inferring
        return self

    def __str__(self) -> str:
        """Say how many of each."""
        return f"; decoding {self.decoding:.1f} s, inference {self.inferring:.1f} s of processors"


def parquet_table(rows: Sequence[Row]) -> Any:  # noqa: ANN401  pyarrow has no types
    """Make a table of rows, a pyarrow.Table."""
    import pyarrow as pa

    kinds = dict.fromkeys(COLUMNS, pa.string()) | dict.fromkeys(MEASURES, pa.float64())
    kinds |= {"index": pa.int64(), "version": pa.int64(), "probability": pa.float64()}
    columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    arrays = [pa.array(c, kinds[name]) for name, c in zip(COLUMNS, columns, strict=True)]
    return pa.table(arrays, pa.schema(kinds.items()))


def write_table(out: Path, rows: Sequence[Row], sort: str) -> None:
    """Write a table, whole or not at all; by a measure, the largest first and errors last."""
    ordered = sorted(rows, key=lambda row: row[PATH])
    if sort != "path":
        by = COLUMNS.index(sort)
        ordered.sort(key=lambda row: -1.0 if row[by] is None else row[by], reverse=True)
    new = out.with_name(out.name + ".new")
    try:
        if out.suffix == ".parquet":
            from pyarrow import parquet

            parquet.write_table(parquet_table(ordered), new)
        else:
            with new.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows(ordered)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
