"""The commands that ask a running service: predict, uncertainty, models, score, watch. No torch."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import typer

from dropserve.service.cli import scores, terminal
from dropserve.service.cli.journal import Journal, Plan, Row, journal_of
from dropserve.service.cli.options import AsJson, Opt, Version, find_model, read_settings
from dropserve.service.cli.terminal import Refused
from dropserve.service.client import AsyncDropserveClient, DropserveClient, base_url, credentials
from dropserve.service.errors import DropserveError, RequestError
from dropserve.service.schemas import MaskKind, PredictResponse, UncertaintyResponse

commands = typer.Typer()


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a model by asking the service; where it is not, there is none."""
    with suppress(DropserveError, Refused):
        service = _service(context.params.get("url"), context.params.get("port"))
        with DropserveClient(**service, retries=0, timeout=1.0) as client:
            return [m.name for m in client.models().models if m.name.startswith(incomplete)]
    return []


Image = Path | bytes
Url = Annotated[str | None, Opt(help="Of the service; from DROPSERVE_HOST and _PORT.")]
Port = Annotated[
    int | None, Opt(min=1, max=65535, metavar="N", help="Of a service here, in place of --url.")
]
Pictures = Annotated[
    list[Path], typer.Argument(help="PNG, JPEG or WebP files; - is standard input.")
]
Model = Annotated[
    str | None,
    Opt(help="Model to ask; the default one if left out.", autocompletion=model_names),
]
Samples = Annotated[int, Opt(min=1, max=1000, metavar="T", help="Thinned networks.")]
Seed = Annotated[int, Opt(min=0, metavar="N", help="Decides the masks.")]
_TOGETHER = 16
"""Images a request."""


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
    port: Port = None,
    model: Model = None,
    version: Version = None,
    as_json: AsJson = False,
) -> None:
    """Ask a running service what images show, in eval mode."""
    show = None if as_json else terminal.show_prediction
    _ask("predict", images, _service(url, port), model, version, show)


@commands.command()
@_reported
def uncertainty(
    images: Pictures,
    url: Url = None,
    port: Port = None,
    model: Model = None,
    version: Version = None,
    samples: Samples = 100,
    seed: Seed = 0,
    masks: Annotated[
        MaskKind, Opt(metavar="HOW", help="Masks are drawn: stratified, or independent.")
    ] = "stratified",
    level: Annotated[
        float,
        Opt(min=0.001, max=0.999, metavar="L", help="Share of the networks within the interval."),
    ] = 0.9,
    as_json: AsJson = False,
) -> None:
    """Ask a running service what images show and how sure it is, under Monte Carlo dropout."""
    how = {"samples": samples, "seed": seed, "masks": masks, "level": level}
    show = None if as_json else partial(terminal.show_uncertainty, samples=samples)
    _ask("uncertainty", images, _service(url, port), model, version, show, **how)


def _ask(
    action: Literal["predict", "uncertainty"],
    images: Sequence[Path],
    service: _Service,
    model: str | None,
    version: int | None,
    show: Callable[[str, Any, Sequence[str]], None] | None,
    **how: object,
) -> None:
    """Ask about images, some in a request, and show what comes; without `show`, print it as JSON.

    Raises:
        Refused: some have no answer; says which and why, when the others were shown.
    """
    given = _given(images)
    with DropserveClient(**service) as client:
        found = find_model(client, model, version)
    how |= {"model": found.name, "version": found.version}
    answers: list[PredictResponse | UncertaintyResponse] = []
    errors: list[str] = []

    async def run() -> None:
        async with AsyncDropserveClient(**service) as client:
            ask = partial(getattr(client, action), **how)
            for batch in scores.batches(given, _TOGETHER):
                for some, answer in await scores.answers(ask, batch):
                    names = [_name(image) for image in some]
                    if isinstance(answer, Exception):
                        reason = terminal.one_line(answer).removeprefix(f"{names[0]}: ")
                        errors.append(f"{names[0]}: {reason}")
                        continue
                    answers.append(answer)
                    for name, said in zip(names, answer.predictions, strict=True):
                        if show is not None:
                            show(name, said, found.classes)

    asyncio.run(run())
    if errors:
        refused = Refused(errors[0])
        for error in errors[1:]:
            refused.add_note(f"error: {error}")
        raise refused
    if show is None:
        said = [prediction for answer in answers for prediction in answer.predictions]
        terminal.say(answers[0].model_copy(update={"predictions": said}).model_dump_json(indent=2))


def _given(images: Sequence[Path]) -> list[Image]:
    """Return images, the one on standard input read."""
    for folder in (image for image in images if image.is_dir()):
        table = f"dropserve score {folder} --out scores.csv"
        raise Refused(f"{folder} is a folder: `{table}` makes a table of the images in it")
    if images.count(Path("-")) > 1:
        raise Refused("- can be given once: standard input holds one picture")
    given = [sys.stdin.buffer.read() if image == Path("-") else image for image in images]
    if b"" in given:
        raise Refused("-: nothing came on standard input")
    return given


def _name(image: Image) -> str:
    return "standard input" if isinstance(image, bytes) else str(image)


@commands.command()
@_reported
def models(url: Url = None, port: Port = None, as_json: AsJson = False) -> None:
    """List the models of a running service."""
    with DropserveClient(**_service(url, port)) as client:
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
    port: Port = None,
    model: Model = None,
    version: Version = None,
    samples: Samples = 100,
    seed: Seed = 0,
    sort: Annotated[
        scores.Sort,
        Opt(metavar="BY", help="path, or a doubt such as mutual-information: the largest first."),
    ] = "path",
    batch: Annotated[int, Opt(min=1, metavar="N", help="Pictures a request.")] = _TOGETHER,
    in_flight: Annotated[int, Opt(min=1, metavar="N", help="Requests at a time.")] = 4,
    restart: Annotated[bool, Opt("--restart", help="Begin anew, whatever is there.")] = False,
) -> None:
    """Score the pictures of a folder: which of them should a person look at?

    Interrupted, the same command goes on. Of a picture that cannot be read, "error" says why.
    """
    service = _service(url, port)
    scores.check_format(out)
    found = scores.pictures(folder)
    asked = {"folder": str(folder), "model": model, "version": version}
    how = {"samples": samples, "seed": seed}
    with (
        journal_of(out, restart=restart) as journal,
        terminal.interruptible(lambda: "the same command goes on from here"),
    ):
        with DropserveClient(**service) as client:
            plan = journal.agree({k: v for k, v in asked.items() if v is not None} | how, client)
        missing = journal.missing(found)
        if missing:
            asyncio.run(_score(service, journal, plan, missing, batch, in_flight))
        scores.write(out, journal.rows, sort)
    bad = sum(row.error is not None for row in journal.rows)
    terminal.say(
        f"{out}: {len(journal.rows):,} pictures by {plan.model} version {plan.version}"
        + (f", {bad:,} of them with an error" if bad else "")
    )


async def _score(
    service: _Service,
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

        async with AsyncDropserveClient(**service, retries=8, max_wait=120.0) as client:
            batches = scores.batches(missing, batch)
            await scores.score(client, plan, batches, in_flight, done)


@commands.command()
@_reported
def watch(
    url: Url = None,
    port: Port = None,
    interval: Annotated[float, Opt(min=0.1, metavar="S", help="Seconds a look.")] = 1.0,
    once: Annotated[bool, Opt("--once", help="Look for one interval, say it, and leave.")] = False,
    as_json: Annotated[bool, Opt("--json", help="Print a line of JSON an interval.")] = False,
) -> None:
    """Stream a running service: traffic, latency, queue, and how sure its models are.

    Where the output is no terminal, a line an interval.
    """
    from dropserve.service.cli import dashboard

    service = _service(url, port)
    client = DropserveClient(**service, retries=0, timeout=5.0)
    with client, suppress(KeyboardInterrupt):
        seen = dashboard.look(client, interval)
        if once:
            dashboard.show_lines(islice(seen, 1), as_json, fail=True)
        elif as_json or not terminal.console().is_terminal:
            dashboard.show_lines(seen, as_json)
        else:
            dashboard.show_live(seen, service["url"])


def _service(url: str | None, port: int | None) -> _Service:
    """Read where the service is, and which key it is sent."""
    if url is not None and port is not None:
        raise Refused("--port is of a service on this machine: give it or --url")
    settings = read_settings(port=port)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        credentials(key)
    except ValueError as error:
        raise Refused(f"DROPSERVE_API_KEY: {error}") from error
    try:
        return {"url": base_url(url or settings.url), "api_key": key}
    except ValueError as error:
        raise Refused(f"--url: {error}") from error
