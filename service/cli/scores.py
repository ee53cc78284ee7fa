"""Asks about many images in several requests; makes a table of a folder's. It knows no torch."""

import asyncio
import csv
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from dropserve.service.cli.journal import Plan, Row, text_of
from dropserve.service.cli.terminal import Refused
from dropserve.service.client import AsyncDropserveClient
from dropserve.service.errors import (
    InvalidRequest,
    MalformedRequest,
    TooLarge,
    UnsupportedMediaType,
)
from dropserve.service.schemas import UncertaintyResponse

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Sort = Literal[
    "path", "mutual-information", "predictive-entropy", "expected-entropy", "variation-ratio"
]
Answer = TypeVar("Answer")
Image = TypeVar("Image", bound=Path | bytes)
_COLUMNS = [field.name for field in fields(Row)]
_MAX_BYTES = 16 * 2**20  # of a request: half of what a service takes by default
_BAD_IMAGE = (MalformedRequest, TooLarge, UnsupportedMediaType, InvalidRequest, OSError)
_GOOD_IMAGE = bytes.fromhex(  # a PNG of one grey pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a4944415478da6368000000820081da45083b0000000049454e44ae426082"
)


def pictures(folder: Path) -> list[Path]:
    """Find what looks like a picture by its name, in sub-folders as well, in a fixed order.

    Raises:
        OSError: a folder cannot be read.
        Refused: there is none.
    """

    def fail(error: OSError) -> None:
        raise error

    found = [
        Path(root, name)
        for root, _, names in os.walk(folder, onerror=fail)
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]
    if not found:
        raise Refused(f"{folder}: no {', '.join(SUFFIXES)} in it")
    return sorted(found)


def batches(found: Iterable[Image], images: int) -> Iterator[list[Image]]:
    """Group images into requests of so many, or of so many bytes."""
    batch: list[Image] = []
    size = 0
    for image in found:
        own = 0
        with suppress(OSError):  # the one that reads it will say what is wrong
            own = len(image) if isinstance(image, bytes) else image.stat().st_size
        if batch and (len(batch) == images or size + own > _MAX_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(image)
        size += own
    if batch:
        yield batch


async def answers(
    ask: Callable[[Sequence[Path | bytes]], Awaitable[Answer]], batch: Sequence[Image]
) -> list[tuple[Sequence[Image], Answer | Exception]]:
    """Ask about a batch; one that is refused is halved until the bad images are alone.

    Returns:
        Parts of the batch in its order, each with its answer, or one image and why it has none.

    Raises:
        DropserveError: the service is gone, or will not answer whatever the image.
    """
    try:
        return [(batch, await ask(batch))]
    except _BAD_IMAGE as error:
        if len(batch) > 1:
            middle = len(batch) // 2
            return await answers(ask, batch[:middle]) + await answers(ask, batch[middle:])
        if not isinstance(error, OSError):
            await ask([_GOOD_IMAGE])  # what fails now is not the image's fault
        return [(batch, error)]


async def score(
    client: AsyncDropserveClient,
    plan: Plan,
    found: Iterator[Sequence[Path]],
    in_flight: int,
    done: Callable[[Sequence[Row]], None],
) -> None:
    """Have every picture answered, several requests at a time.

    Args:
        client: of the service.
        plan: which model, and how it samples.
        found: the pictures, in batches.
        in_flight: requests at a time.
        done: takes the rows of each batch, in the order in which they come.

    Raises:
        DropserveError: the service is gone, or will not answer whatever the picture.
    """
    how: dict[str, Any] = asdict(plan)
    del how["folder"], how["sha256"]

    async def ask(batch: Sequence[Path | bytes]) -> UncertaintyResponse:
        return await client.uncertainty(batch, **how)

    async def work() -> None:
        for batch in found:  # one iterator for all
            done([row for part, said in await answers(ask, batch) for row in _rows(part, said)])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _rows(batch: Sequence[Path], said: UncertaintyResponse | Exception) -> Iterable[Row]:
    return [_failed(batch[0], said)] if isinstance(said, Exception) else _answered(batch, said)


def _answered(batch: Sequence[Path], answer: UncertaintyResponse) -> Iterator[Row]:
    for path, said in zip(batch, answer.predictions, strict=True):
        yield Row(
            text_of(path),
            said.label,
            said.index,
            said.mean[said.index],
            said.predictive_entropy,
            said.expected_entropy,
            said.mutual_information,
            said.variation_ratio,
            answer.model,
            answer.version,
        )


def _failed(path: Path, error: Exception) -> Row:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return Row(text_of(path), error=text_of(Path(reason)).removeprefix(f"{text_of(path)}: "))


def check_format(out: Path) -> None:
    """Raise `Refused` if scores cannot be written to a file of that name, or in its folder."""
    if out.suffix not in (".csv", ".parquet"):
        raise Refused(f"{out}: must end in .csv or .parquet")
    if not out.parent.is_dir():
        raise Refused(f"{out}: there is no folder {out.parent}: make it first")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401  is it there?
        except ImportError as error:
            raise Refused(
                "Parquet needs pyarrow: install dropserve[parquet], or write a .csv"
            ) from error


def write(out: Path, rows: Iterable[Row], sort: Sort) -> None:
    """Write a table, whole or not at all.

    Args:
        out: a .csv or .parquet file.
        rows: in any order.
        sort: by path; or by a doubt, the largest first, and what has none last.
    """
    ordered = sorted(rows, key=lambda row: row.path)
    if sort != "path":
        column = sort.replace("-", "_")
        ordered.sort(key=lambda row: _or_last(getattr(row, column)), reverse=True)
    new = out.with_name(out.name + ".new")
    try:
        (_write_parquet if out.suffix == ".parquet" else _write_csv)(new, ordered)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)


def _or_last(doubt: float | None) -> float:
    return -1.0 if doubt is None else doubt


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(vars(row).values() for row in rows)


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = dict.fromkeys(_COLUMNS, pa.float64())
    kinds |= dict.fromkeys(("path", "label", "model", "error"), pa.string())
    kinds |= dict.fromkeys(("index", "version"), pa.int64())
    columns = {name: [getattr(row, name) for row in rows] for name in _COLUMNS}
    parquet.write_table(pa.table(columns, pa.schema(kinds.items())), path)
