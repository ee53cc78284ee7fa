"""Commands that ask a running service: predict, uncertainty, models. Loads no PyTorch."""

import asyncio
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from dropserve.models.defaults import DEFAULT_SAMPLES, MaskKind
from dropserve.service import errors, schemas
from dropserve.service.cli import options, terminal
from dropserve.service.cli.options import Opt
from dropserve.service.cli.terminal import BAR, Refused, console, say
from dropserve.service.client import AsyncDropserveClient, DropserveClient

Image = Path | bytes
Images = Annotated[list[Path], typer.Argument(help="PNG, JPEG or WebP files; - is standard input.")]
BATCH = 16  # images per request
_MAX_BYTES = 16 * 2**20  # of a request: half of what a service takes by default
_BAD_IMAGE = (
    errors.MalformedRequest, errors.TooLarge, errors.UnsupportedMediaType, errors.InvalidRequest,
    OSError,
)  # fmt: skip
_GOOD_IMAGE = bytes.fromhex(  # a PNG of one grey pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a4944415478da6368000000820081da45083b0000000049454e44ae426082"
)


def predict(
    images: Images,
    url: options.Url = None,
    port: options.Port = None,
    model: options.Model = None,
    version: options.Version = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask a running service what images show, in eval mode."""
    show = None if as_json else show_prediction
    _ask("predict", images, options.find_service(url, port), model, version, show)


def uncertainty(
    images: Images,
    url: options.Url = None,
    port: options.Port = None,
    model: options.Model = None,
    version: options.Version = None,
    samples: options.Samples = DEFAULT_SAMPLES,
    seed: options.Seed = 0,
    masks: Annotated[
        MaskKind, Opt(metavar="KIND", help="Masks: stratified, or independent.")
    ] = "stratified",
    level: Annotated[
        float, Opt(min=0.001, max=0.999, metavar="L", help="Share of networks in the interval.")
    ] = 0.9,
    as_json: options.AsJson = False,
) -> None:
    """Ask a running service what images show and how sure it is, under Monte Carlo dropout."""
    how = {"samples": samples, "seed": seed, "masks": masks, "level": level}
    show = None if as_json else partial(show_uncertainty, samples=samples)
    _ask("uncertainty", images, options.find_service(url, port), model, version, show, **how)


def models(
    url: options.Url = None, port: options.Port = None, as_json: options.AsJson = False
) -> None:
    """List the models of a running service."""
    with DropserveClient(**options.find_service(url, port)) as client:
        answer = client.models()
        if as_json:
            say(answer.model_dump_json(indent=2))
        else:
            loaded = [m for m in answer.models if m.versions]
            show_models([client.model(m.name, m.version) for m in loaded])
            for model in answer.models:
                if model.on_request:
                    versions = ", ".join(map(str, model.on_request))
                    say(f"{model.name} is loaded when it is asked for: versions {versions}")


def _ask(
    action: Literal["predict", "uncertainty"],
    paths: Sequence[Path],
    service: Mapping[str, Any],
    model: str | None,
    version: int | None,
    show: Callable[[str, Any, Sequence[str]], None] | None,
    **how: Any,  # noqa: ANN401  what the client's method takes
) -> None:
    """Ask about images and show each answer; without `show`, print one response in JSON.

    An image without an answer is a line on stderr, null in the JSON, and exit code 2 at the end.
    """
    images = _read_stdin(paths)
    with DropserveClient(**service) as client:
        found = options.find_model(client, model, version)
    response: dict[str, Any] = {}
    predictions: list[Any] = []

    def done(part: Sequence[Image], answer: Any) -> None:  # noqa: ANN401  of either action
        names = ["standard input" if isinstance(image, bytes) else str(image) for image in part]
        if isinstance(answer, Exception):
            reason = terminal.one_line(answer).removeprefix(f"{names[0]}: ")
            typer.echo(f"error: {names[0]}: {reason}", err=True)
            predictions.append(None)
            return
        response.update(answer.model_dump(mode="json"))
        predictions.extend(response["predictions"])
        for name, prediction in zip(names, answer.predictions, strict=True):
            if show is not None:
                show(name, prediction, found.classes)

    how |= {"model": found.name, "version": found.version}
    send_all(AsyncDropserveClient(**service), action, images, done, **how)
    if show is None and response:
        terminal.print_json(response | {"predictions": predictions})
    if None in predictions:
        raise typer.Exit(2)


def _read_stdin(paths: Sequence[Path]) -> list[Image]:
    for folder in (path for path in paths if path.is_dir()):
        table = f"dropserve score {folder} --out scores.csv"
        raise Refused(f"{folder} is a folder: `{table}` makes a table of the images in it")
    if paths.count(Path("-")) > 1:
        raise Refused("- can be given once: standard input holds one image")
    images = [sys.stdin.buffer.read() if path == Path("-") else path for path in paths]
    if b"" in images:
        raise Refused("-: standard input is empty")
    return images


def send_all(
    client: AsyncDropserveClient,
    action: Literal["predict", "uncertainty"],
    images: Sequence[Image],
    done: Callable[[Sequence[Any], Any], None],
    *,
    batch: int = BATCH,
    in_flight: int = 1,
    **how: Any,  # noqa: ANN401  likewise
) -> None:
    """Send images in requests of `batch` images, so many `in_flight` at a time; close the client.

    `done` takes some images and their response, or one image and why it has none; with one
    request in flight, in the order of the images.

    Raises:
        DropserveError: the service is unreachable, or refuses any image.
    """
    requests = batches(images, batch)
    ask = partial(getattr(client, action), **how)

    async def send(some: Sequence[Image]) -> None:
        try:
            answer = await ask(some)
        except _BAD_IMAGE as error:
            if len(some) > 1:  # halve it until the bad images are alone
                await send(some[: len(some) // 2])
                await send(some[len(some) // 2 :])
                return
            if not isinstance(error, OSError):
                await ask([_GOOD_IMAGE])  # if this fails too, the image is not the cause
            answer = error
        done(some, answer)

    async def work() -> None:
        for some in requests:
            await send(some)

    async def run() -> None:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(work())

    try:
        asyncio.run(run())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def batches(images: Iterable[Image], most: int) -> Iterator[list[Image]]:
    """Group images into requests of at most so many, and of at most 16 MB."""
    batch: list[Image] = []
    total = 0
    for image in images:
        size = 0
        with suppress(OSError):  # the client will raise it, too
            size = len(image) if isinstance(image, bytes) else image.stat().st_size
        if batch and (len(batch) == most or total + size > _MAX_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(image)
        total += size
    if batch:
        yield batch


def show_prediction(image: str, prediction: schemas.Prediction, classes: Sequence[str]) -> None:
    """Print an image's label and a bar a class, the most probable first."""
    say(f"{image}: {prediction.label} ({prediction.probability:.1%})")
    p = prediction.probabilities
    _show_rows((f"  {classes[i]}", _bar(p[i], p[i], p[i]), f"{p[i]:6.1%}") for i in _ranked(p))


def show_uncertainty(
    image: str, prediction: schemas.UncertainPrediction, classes: Sequence[str], samples: int
) -> None:
    """Print an image's label, a bar with an interval a class, and the parts of the uncertainty."""
    mean, level = prediction.mean, prediction.interval.level
    say(f"{image}: {prediction.label} ({mean[prediction.index]:.1%}, mean of {samples} samples)")
    rows = []
    for i in _ranked(mean):
        low, high = prediction.interval.lower[i], prediction.interval.upper[i]
        numbers = f"{mean[i]:6.1%}  [{low:.1%}, {high:.1%}]"
        rows.append((f"  {classes[i]}", _bar(low, mean[i], high), numbers))
    _show_rows(rows)
    say(f"  █▓ up to the mean; ▓░ and [ ]: where {level:.0%} of the thinned networks lie")
    parts = (
        ("uncertainty", "predictive entropy", f", at most {math.log(len(mean)):.3f}"),
        ("from the data", "expected entropy", ": each network alone is unsure"),
        ("from the model", "mutual information", ": the networks disagree"),
    )
    rows = []
    for words, name, rest in parts:
        nats = getattr(prediction, name.replace(" ", "_"))
        rows.append((f"  {words}", f"{nats:.3f} nats", name + rest))
    votes = f"{prediction.variation_ratio:.1%} of the networks"
    _show_rows([*rows, ("  votes against", votes, "variation ratio")])


def show_models(models: Sequence[schemas.ModelDetails]) -> None:
    """Print the models of a service, and how Monte Carlo dropout runs on each."""
    table = Table("model", "version", "all versions", "default", "path", "precision")
    for model in models:
        version = f"{model.version}{' (pinned)' if model.version == model.pinned else ''}"
        precision = model.precision.dtype if model.precision else ""
        versions, default = ", ".join(map(str, model.versions)), "yes" if model.default else ""
        table.add_row(model.name, version, versions, default, model.path or "", precision)
    console().print(table)
    for model in models:
        for refused in model.refused:
            say(f"{model.name} {refused.version} refused: {refused.reason}")
        for changed in model.changed:
            say(f"{model.name} {changed.version} served from memory: {changed.reason}")
        if model.pin_problem is not None:
            say(f"{model.name}: the pin is not followed: {model.pin_problem}")


def _show_rows(rows: Iterable[tuple[str, ...]]) -> None:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _ranked(values: Sequence[float]) -> list[int]:
    """Return the indices of the ten largest values, the largest first."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:10]


def _bar(lower: float, mean: float, upper: float) -> str:
    """Draw a bar up to the mean, its shaded end and what is beyond it the interval."""
    start, middle, end = (round(p * BAR) for p in (min(lower, mean), mean, max(mean, upper)))
    return ("█" * start + "▓" * (middle - start) + "░" * (end - middle)).ljust(BAR)
