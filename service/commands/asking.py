"""The commands that ask a running service: predict, uncertainty, models, score, watch. No torch."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from service.calls import credentials
from service.client import AsyncDropserveClient, DropserveClient
from service.commands import scores, terminal
from service.commands.journal import Journal, Plan, Row, journal_of
from service.commands.options import AsJson, Opt, Version, read_settings
from service.commands.terminal import Refused
from service.errors import DropserveError, RequestError

commands = typer.Typer()


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a model by asking the service; where it is not, there is none."""
    with suppress(DropserveError, Refused):
        url = context.params.get("url")
        with _client(url, retries=0, timeout=1.0) as client:
            return [m.name for m in client.models().models if m.name.startswith(incomplete)]
    return []


Url = Annotated[str | None, Opt(help="Of the service; from DROPSERVE_HOST and _PORT.")]
Pictures = Annotated[
    list[Path], typer.Argument(help="PNG, JPEG or WebP files; - is standard input.")
]
Model = Annotated[
    str | None,
    Opt(help="Model to ask; the default one if left out.", autocompletion=model_names),
]
Samples = Annotated[int, Opt(metavar="T", help="Thinned networks, 1 to 1000.")]
Seed = Annotated[int, Opt(metavar="N", help="Of the masks, from 0.")]


class _Service(TypedDict):
    """Where the service is, and the key that it is sent."""

    url: str
    api_key: str | None


_reported = terminal.reported(wrong=(RequestError,), failed=(DropserveError, OSError))


@commands.command()
@_reported
def predict(
    images: Pictures,
    url: Url = None,
    model: Model = None,
    version: Version = None,
    as_json: AsJson = False,
) -> None:
    """Ask a running service what images show, in eval mode."""
    given, names = _given(images)
    with _client(url, model, version) as client:
        answer = client.predict(given, model=model, version=version)
        if as_json:
            terminal.say(answer.model_dump_json(indent=2))
            return
        classes = client.model(answer.model, answer.version).classes
    for name, prediction in zip(names, answer.predictions, strict=True):
        terminal.show_prediction(name, prediction, classes)


@commands.command()
@_reported
def uncertainty(
    images: Pictures,
    url: Url = None,
    model: Model = None,
    version: Version = None,
    samples: Samples = 100,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Ask a running service what images show and how sure it is, under Monte Carlo dropout."""
    given, names = _given(images)
    with _client(url, model, version) as client:
        answer = client.uncertainty(given, model=model, version=version, samples=samples, seed=seed)
        if as_json:
            terminal.say(answer.model_dump_json(indent=2))
            return
        classes = client.model(answer.model, answer.version).classes
    for name, prediction in zip(names, answer.predictions, strict=True):
        terminal.show_uncertainty(name, prediction, classes, answer.samples)


def _given(images: list[Path]) -> tuple[list[bytes | Path], list[str]]:
    """Return images, those on standard input read, and what to call them."""
    if images.count(Path("-")) > 1:
        raise Refused("- can be given once: standard input holds one picture")
    given: list[bytes | Path] = [
        sys.stdin.buffer.read() if image == Path("-") else image for image in images
    ]
    if b"" in given:
        raise Refused("-: nothing came on standard input")
    return given, ["standard input" if isinstance(x, bytes) else str(x) for x in given]


@commands.command()
@_reported
def models(url: Url = None, as_json: AsJson = False) -> None:
    """List the models of a running service."""
    with _client(url) as client:
        answer = client.models()
        if as_json:
            terminal.say(answer.model_dump_json(indent=2))
        else:
            terminal.show_models([client.model(m.name, m.version) for m in answer.models])


@commands.command()
@_reported
def score(
    folder: Annotated[Path, typer.Argument(help="Of pictures, in sub-folders as well.")],
    out: Annotated[Path, Opt(help="File to write: .csv or .parquet.")],
    url: Url = None,
    model: Model = None,
    version: Version = None,
    samples: Samples = 100,
    seed: Seed = 0,
    sort: Annotated[
        scores.Sort,
        Opt(metavar="BY", help="path, or a doubt such as mutual-information: the largest first."),
    ] = "path",
    batch: Annotated[int, Opt(min=1, metavar="N", help="Pictures a request.")] = 16,
    in_flight: Annotated[int, Opt(min=1, metavar="N", help="Requests at a time.")] = 4,
    restart: Annotated[bool, Opt("--restart", help="Begin anew, whatever is there.")] = False,
) -> None:
    """Score the pictures of a folder: which of them should a person look at?

    Interrupted, the same command goes on. Of a picture that cannot be read, "error" says why.
    """
    scores.check_format(out)
    found = scores.pictures(folder)
    asked = {"folder": str(folder), "model": model, "version": version}
    how = {"samples": samples, "seed": seed}
    with (
        journal_of(out, restart=restart) as journal,
        terminal.interruptible(lambda: "the same command goes on from here"),
    ):
        with _client(url, model, version) as client:
            plan = journal.agree({k: v for k, v in asked.items() if v is not None} | how, client)
        missing = journal.missing(found)
        if missing:
            asyncio.run(_score(url, journal, plan, missing, batch, in_flight))
        scores.write(out, journal.rows, sort)
    bad = sum(row.error is not None for row in journal.rows)
    terminal.say(
        f"{out}: {len(journal.rows):,} pictures by {plan.model} version {plan.version}"
        + (f", {bad:,} of them with an error" if bad else "")
    )


async def _score(
    url: str | None,
    journal: Journal,
    plan: Plan,
    missing: Sequence[Path],
    batch: int,
    in_flight: int,
) -> None:
    already = len(journal.rows)
    with terminal.progress("pictures") as moved:

        def done(rows: Sequence[Row]) -> None:
            journal.add(rows)
            moved(len(journal.rows), already + len(missing))

        async with AsyncDropserveClient(**_service(url), retries=8, max_wait=120.0) as client:
            batches = scores.batches(missing, batch)
            await scores.score(client, plan, batches, in_flight, done)


@commands.command()
@_reported
def watch(
    url: Url = None,
    interval: Annotated[float, Opt(min=0.1, metavar="S", help="Seconds a look.")] = 1.0,
    once: Annotated[bool, Opt("--once", help="Look for one interval, say it, and leave.")] = False,
    as_json: Annotated[bool, Opt("--json", help="Print a line of JSON an interval.")] = False,
) -> None:
    """Watch a running service: traffic, latency, queue, and how sure its models are.

    Where the output is no terminal, a line an interval.
    """
    from service.commands import dashboard

    with _client(url, retries=0, timeout=5.0) as client, suppress(KeyboardInterrupt):
        seen = dashboard.look(client, interval)
        if once:
            dashboard.show_lines(islice(seen, 1), as_json, fail=True)
        elif as_json or not terminal.console().is_terminal:
            dashboard.show_lines(seen, as_json)
        else:
            dashboard.show_live(seen, _service(url)["url"])


@contextmanager
def _client(
    url: str | None,
    model: str | None = None,
    version: int | None = None,
    *,
    retries: int = 5,
    timeout: float = 60.0,
) -> Iterator[DropserveClient]:
    if version is not None and not model:
        raise Refused("--version is of a model: give --model as well")
    with DropserveClient(**_service(url), retries=retries, timeout=timeout) as client:
        yield client


def _service(url: str | None) -> _Service:
    """Read where the service is, and which key it is sent."""
    settings = read_settings()
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        credentials(key)
    except ValueError as error:
        raise Refused(f"DROPSERVE_API_KEY: {error}") from error
    return {"url": url or settings.url, "api_key": key}
