"""`dropserve score --engine ray`: a folder, Parquet or object storage into partitioned Parquet.

The list of inputs is split into parts, always in the same way. An actor loads the version once, and
writes the rows of a part as one file, there whole or not at all. `_run.json` holds what decides the
rows: so a run that was killed goes on with the parts that are not there. What an actor of a killed
run still writes is what the next run would write.
"""

import errno
import hashlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropserve.models.errors import ModelsError
from dropserve.models.image_formats import IMAGE_SUFFIXES
from dropserve.models.object_storage import open_store
from dropserve.service.cli import scores, terminal
from dropserve.service.cli.scores import ERROR, Row, Run, Timings
from dropserve.service.cli.terminal import Refused
from dropserve.service.errors import DropserveError, ServerError
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.cli.scorer import Image, Scorer

RUN = "_run.json"
"""Readers of Parquet folders leave out names that begin with _."""
IMAGES, BYTES = 4096, 32 * 2**20
"""Of a part at most: what Ray itself takes for a part is little beside so many small images, and
large images are spread over many actors."""
_SLICES, _ROWS, _AHEAD = 16, 64, 8 * 2**20
"""Parts at most of a group of rows in Parquet; rows, and bytes, that are read at a time."""
_RESTARTS = 3
"""Times that an actor is started again, and its part tried: one may need more memory than is."""
_MEMORY = 128 * 2**20
"""Bytes of Ray's object store, if this process starts Ray: only lists of names are in it."""


@dataclass(frozen=True)
class Columns:
    """Where images and what they are called are in Parquet: the names of two columns."""

    image: str
    id: str


@dataclass(frozen=True)
class Part:
    """What one file of rows is made of.

    Attributes:
        name: of the file; the run is a part of it, so that none of another run's is taken for it.
        files: images, as bytes, since a path may be no text; or one file of Parquet.
        group: of rows in the file of Parquet; None: they are images.
        start: first row of the group.
        stop: the row after the last.
    """

    name: str
    files: list[bytes]
    group: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def images(self) -> int:
        """How many it has."""
        return len(self.files) if self.group is None else self.stop - self.start


def score(
    asked: dict[str, Any],
    settings: Settings,
    folder: str,
    out: str,
    columns: Columns,
    actors: int | None,
    *,
    restart: bool,
) -> None:
    """Score what is in a folder or under a URL, on the cluster of RAY_ADDRESS or one of its own.

    Raises:
        Refused: there are no images, Ray is not installed, or `out` holds something else.
        ServerError: an actor failed.
    """
    _require_ray()
    source, target = Source(folder, columns), _open(out, make=True)
    hint = "the same command continues from here"
    with terminal.interruptible(lambda: hint), _storage_errors():
        parts, digest = source.parts()
        run = _agree(target, out, asked, {"inputs": digest, **asdict(columns)}, settings, restart)
        own = hashlib.sha256(_read(target, RUN)).hexdigest()
        parts = [replace(part, name=f"{part.name}-{own[:8]}.parquet") for part in parts]
        there = _listed(target)
        missing = [part for part in parts if part.name not in there]
        total, bad, timings = sum(part.images for part in parts), 0, Timings()
        scored = total - sum(part.images for part in missing)
        work = _Work(source, _absolute(out), own, run, _limits(settings))
        with terminal.progress("images") as moved:
            moved(scored, total)
            for done in _run(missing, work, actors):
                scored, bad = scored + done["images"], bad + done["errors"]
                timings += Timings(done["decoding"], done["inferring"])
                moved(scored, total)
        wanted, there = {part.name for part in parts}, _listed(target)
        if left := wanted - there:
            raise ServerError(f"{out}: {min(left)} is not there: the same command continues")
        target.delete([*_rows(there) - wanted])  # an actor of another run was not dead yet
    before = total - sum(part.images for part in missing)
    resumed = f"; {before:,} were scored before" if before else ""
    terminal.say(scores.summary(out, total, bad, run, timings) + resumed)


def _require_ray() -> None:
    # read when Ray is imported: nothing is reported to anyone, and its ports, which other machines
    # reach, need a token
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its errors come as exceptions
    if not _cluster():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray.data  # noqa: F401  is it installed?
        from pyarrow import parquet  # noqa: F401  likewise
    except ImportError as error:
        raise Refused("install dropserve[ray] for --engine ray") from error


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Raise a ServerError where object storage fails: nothing that is done is lost."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        raise ServerError(f"object storage: {error}") from error


def _limits(settings: Settings) -> Settings:
    """Return what actors need of the settings: no keys, and a path that means the same to them."""
    names = ["cache", "cache_bytes", "device", "factories", "precision"]
    names += ["max_body_bytes", "max_pixels", "max_side"]
    given = {name: getattr(settings, name) for name in names}
    where = settings.checkpoints
    checkpoints = where.resolve() if isinstance(where, Path) else where
    return Settings.model_construct(checkpoints=checkpoints, **given)


# What there is to score.


class Source:
    """The images in a folder or under a URL, and those in Parquet files there."""

    def __init__(self, folder: str, columns: Columns) -> None:
        self._folder = folder
        self._root = _absolute(folder)  # actors may run in another folder
        self._columns = columns

    def parts(self) -> tuple[list[Part], str]:
        """Split what there is into parts; with a digest of names, sizes and times or tags."""
        files = sorted(self._list())
        tables = [name for name, *_ in files if name.lower().endswith(b".parquet")]
        images = [each for each in files if not each[0].lower().endswith(b".parquet")]
        if not files:
            raise Refused(f"{self._folder}: no {', '.join(IMAGE_SUFFIXES)} or .parquet in it")
        found: list[dict[str, Any]] = [{"files": names} for names in _split(images)]
        for table in tables:
            found += self._slices(table)
        parts = [Part(f"part-{number:06}", **each) for number, each in enumerate(found)]
        split = IMAGES, BYTES, _SLICES  # another release may split in another way
        return parts, hashlib.sha256(repr((split, files)).encode()).hexdigest()

    def _list(self) -> Iterator[tuple[bytes, int, str]]:
        """Yield names relative to the folder, sizes in bytes, and times of change or tags."""
        suffixes = (*IMAGE_SUFFIXES, ".parquet")
        if _is_url(self._folder):
            for page in open_store(self._root).list():
                for about in page:
                    if about["path"].lower().endswith(suffixes):
                        yield about["path"].encode(), about["size"], str(about["e_tag"])
            return
        errors: list[OSError] = []
        for root, _, names in os.walk(self._root, onerror=errors.append):
            for name in names:
                if name.lower().endswith(suffixes):
                    path = os.path.join(root, name)  # noqa: PTH118  a tenth of pathlib's time
                    relative = os.path.relpath(path, self._root)
                    try:
                        found = os.stat(path)  # noqa: PTH116  likewise
                        yield os.fsencode(relative), found.st_size, str(found.st_mtime_ns)
                    except OSError as error:  # a row will say so
                        yield os.fsencode(relative), 0, str(error.strerror)
        if errors:
            raise errors[0]

    def _slices(self, table: bytes) -> Iterator[dict[str, Any]]:
        """Split a file of Parquet by its groups of rows, and large groups into slices."""
        with self._open_table(table) as opened:
            about, names = opened.metadata, opened.schema_arrow.names
            if self._columns.image not in names:
                raise Refused(
                    f"{os.fsdecode(table)}: no column {self._columns.image!r}: name the one with "
                    f"the images' bytes by --image-column; there are {', '.join(names)}"
                )
            for group in range(about.num_row_groups):
                rows = about.row_group(group).num_rows
                step = max(IMAGES, -(-rows // _SLICES))  # what is before a slice is read again
                for start in range(0, rows, step):
                    stop = min(start + step, rows)
                    yield {"files": [table], "group": group, "start": start, "stop": stop}

    def _open_table(self, name: bytes) -> Any:  # noqa: ANN401  pyarrow has no types
        from pyarrow import parquet

        if not _is_url(self._folder):
            file: Any = os.path.join(os.fsencode(self._root), name).decode()  # noqa: PTH118
        else:
            file = _Object(open_store(self._root), name.decode())
        # otherwise the whole column of a group would be read, before its first row
        return parquet.ParquetFile(file, buffer_size=_AHEAD, pre_buffer=False)

    def read(self, part: Part, most: int) -> "Iterator[Image]":
        """Read the images of a part, of `most` bytes, one after another.

        Raises:
            OSError, BaseError of obstore: what may be read the next time ends the run.
        """
        if part.group is not None:
            yield from self._read_rows(part)
            return
        store = open_store(self._root) if _is_url(self._folder) else None
        for name in map(os.fsdecode, part.files):
            path = self.join(name)
            try:
                if store is not None:
                    data = _read(store, name, most)
                else:
                    data = scores.read_file(f"{self._root}/{name}", most)
                yield scores.text(path), data
            except (FileNotFoundError, PermissionError, scores.TooLarge) as error:
                yield scores.text(path), error

    def join(self, name: str) -> str:
        """Name a file of the folder as the other engines do."""
        return f"{self._folder.rstrip('/')}/{name}"

    def _read_rows(self, part: Part) -> "Iterator[Image]":
        """Read the rows of a slice; one without an id is called by the file and its number."""
        image, id_ = self._columns.image, self._columns.id
        name = self.join(os.fsdecode(part.files[0]))
        with self._open_table(part.files[0]) as opened:
            columns = [c for c in (image, id_) if c in opened.schema_arrow.names]
            row = 0
            for batch in opened.iter_batches(_ROWS, row_groups=[part.group], columns=columns):
                first, row = row, row + len(batch)
                if row <= part.start:
                    continue
                if first >= part.stop:
                    return
                low, high = max(part.start - first, 0), min(part.stop - first, len(batch))
                found = batch.slice(low, high - low).to_pydict()
                ids = found.get(id_) or [None] * (high - low)
                for i, (data, called) in enumerate(
                    zip(found[image], ids, strict=True), first + low
                ):
                    data = data.get("bytes") if isinstance(data, dict) else data
                    called = f"{name}#{part.group}.{i}" if called is None else scores.text(called)
                    yield called, data or b""


def _split(images: Iterable[tuple[bytes, int, str]]) -> Iterator[list[bytes]]:
    """Split files, of so many bytes each, into parts, in order."""
    part, room = list[bytes](), BYTES
    for name, size, _ in images:
        if part and (size > room or len(part) == IMAGES):
            yield part
            part, room = [], BYTES
        part.append(name)
        room -= size
    if part:
        yield part


class _Object(io.RawIOBase):
    """An object in a store as a file that is read in ranges."""

    def __init__(self, store: Any, name: str) -> None:  # noqa: ANN401  of obstore
        self._store, self._name = store, name
        self._size, self._position = store.head(name)["size"], 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """And from anywhere."""
        return True

    def tell(self) -> int:
        """Return where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  any buffer
        """Fill a buffer, except at the end."""
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            found = self._store.get_range(self._name, start=self._position, length=count)
            buffer[:count] = memoryview(found)
            self._position += count
        return int(count)


def _is_url(folder: str) -> bool:
    return "://" in folder


def _absolute(folder: str) -> str:
    return folder if _is_url(folder) else str(Path(folder).resolve())


def _open(folder: str, *, make: bool = False) -> Any:  # noqa: ANN401  of obstore
    """Open a folder, or what is under a URL, to be written to."""
    if _is_url(folder):
        return open_store(folder)
    from obstore.store import LocalStore

    return LocalStore(Path(folder).resolve(), mkdir=make)


def _read(store: Any, name: str, most: int = sys.maxsize) -> bytes:  # noqa: ANN401  of obstore
    from obstore.exceptions import PermissionDeniedError

    try:
        found = store.get(name)
    except PermissionDeniedError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error
    scores.require_size(found.meta["size"], most)
    return bytes(found.bytes())


def _listed(store: Any) -> set[str]:  # noqa: ANN401  of obstore
    return {about["path"] for page in store.list() for about in page}


def _rows(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("part-")}


# What was begun, and what is done.


def _agree(
    target: Any,  # noqa: ANN401  of obstore
    out: str,
    asked: dict[str, Any],
    inputs: dict[str, Any],
    settings: Settings,
    restart: bool,
) -> Run:
    """Return the run's parameters; refuse others than those of the parts that are there."""
    there, had = _listed(target), dict[str, Any]()
    if there and RUN not in there:
        raise Refused(f"{out} has other files in it: name an empty folder")
    if restart:
        target.delete([*_rows(there)])
    elif RUN in there:
        try:
            had = json.loads(_read(target, RUN))
            Run.from_json(had)
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(f"{out}/{RUN}: no run of scores ({error}): give --restart") from error
        scores.require_same(had, {**asked, **inputs})
    wanted = {**asked, **had}
    found = scores.find_version(settings, wanted.get("model"), wanted.get("version"))
    if had:
        scores.require_same(had, found)
        return Run.from_json(had)
    run = Run(**{"samples": None, "seed": None} | wanted | found)
    target.put(RUN, json.dumps(run.to_json() | inputs, indent=2).encode() + b"\n")
    return run


# On the cluster.


@dataclass(frozen=True)
class _Work:
    """What an actor is to do.

    Attributes:
        source: where images are read.
        out: where rows are written.
        digest: of the file that describes the run.
        run: its parameters.
        settings: limits of images, and where models are.
    """

    source: Source
    out: str
    digest: str
    run: Run
    settings: Settings


class _Actor:
    """Scores parts and writes their rows; one process of Ray, with the version loaded once."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._target = _open(work.out)
        self._scorer: Scorer | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the one part of a batch, whose figures are returned."""
        values = json.loads(bytes(batch["part"][0]))
        part = Part(**values | {"files": [os.fsencode(name) for name in values["files"]]})
        try:
            return {name: [value] for name, value in self._score(part).items()}
        except (ModelsError, DropserveError) as error:  # some cannot be sent to another process
            raise Refused(str(error)) from None

    def _score(self, part: Part) -> dict[str, float]:
        if self._scorer is None:
            from dropserve.service.cli.scorer import Scorer

            self._scorer = Scorer(self._work.run, self._work.settings)
        images = self._work.source.read(part, self._work.settings.max_body_bytes)
        rows, timings = self._scorer.score(images)
        self._write(part, rows)
        bad = sum(row[ERROR] is not None for row in rows)
        return {"images": len(rows), "errors": bad, **asdict(timings)}

    def _write(self, part: Part, rows: Sequence[Row]) -> None:
        """Write a part, whole or not at all, unless another run has taken its place meanwhile."""
        import pyarrow as pa
        from pyarrow import parquet

        sink = pa.BufferOutputStream()
        parquet.write_table(scores.parquet_table(rows), sink)
        if hashlib.sha256(_read(self._target, RUN)).hexdigest() != self._work.digest:
            raise Refused(f"{self._work.out}: another run has begun in it")
        self._target.put(part.name, sink.getvalue().to_pybytes())


def _run(parts: Sequence[Part], work: _Work, actors: int | None) -> Iterator[dict[str, Any]]:
    """Have parts scored by actors; yield the figures of each part that is done."""
    if not parts:
        return
    import ray

    own = not ray.is_initialized()
    if own:
        _start_ray(actors)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one for images
        items = [{"part": _dumped(part)} for part in parts]
        count = min(actors or _cores(), len(parts))
        listed = ray.data.from_items(items, override_num_blocks=len(items))
        with warnings.catch_warnings():  # Ray 2.60 has no other way to name both numbers of tries
            warnings.simplefilter("ignore", DeprecationWarning)
            scored = listed.map_batches(
                _Actor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=count),
                fn_constructor_args=(work,),
                num_cpus=1,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
            )
        yield from scored.iter_rows()
    except ray.exceptions.RayError as error:
        # its text is a traceback, whose end is the error in the actor
        reason = str(error).strip().splitlines()[-1].partition("Refused: ")
        raise ServerError(f"Ray: {reason[2] or reason[0]}") from error
    finally:
        if own:
            ray.shutdown()


def _start_ray(actors: int | None) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine, without a dashboard."""
    own: dict[str, Any] = {}
    if not _cluster():
        own = {"address": "local", "include_dashboard": False, "object_store_memory": _MEMORY}
        own["num_cpus"] = max(actors or 0, len(os.sched_getaffinity(0)))
    import ray

    ray.init(log_to_driver=False, logging_level=logging.WARNING, **own)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns of what was chosen here


def _cluster() -> str:
    """Return the address of the cluster to join; empty: Ray is started here."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def _cores() -> int:
    import ray

    found: dict[str, float] = ray.cluster_resources()
    return max(1, int(found.get("CPU", 1)))


def _dumped(part: Part) -> bytes:
    """Write a part as JSON: names that are no text keep their bytes."""
    return json.dumps(asdict(part) | {"files": [os.fsdecode(name) for name in part.files]}).encode()
