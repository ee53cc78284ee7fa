"""The command line: train, evaluate, serve, settings, and the commands that ask a service.

PyTorch is imported by the commands that need it, so that the others start at once.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, TypeVar

import typer

from models import catalogue
from models.errors import CheckpointRefused, ModelsError
from service.commands import terminal, versions
from service.commands.asking import commands
from service.commands.options import (
    AsJson,
    Checkpoints,
    DataDir,
    Opt,
    SavedVersion,
    allow_local_modules,
    read_settings,
)
from service.commands.terminal import Refused
from service.errors import DropserveError, RequestError
from service.registry import RegistryError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train image classifiers with dropout, and serve predictions that say how sure they are.",
)

Parsed = TypeVar("Parsed")

_reported = terminal.reported(
    wrong=(RequestError, ModelsError, RegistryError),
    failed=(DropserveError, OSError),
)


@app.command()
@_reported
def train(
    dataset: Annotated[
        str, Opt(help="digits, fashion-mnist, mnist, or a folder: a sub-folder a class.")
    ] = "digits",
    network: Annotated[str, Opt(help="mlp, cnn, or package.module:factory.")] = "mlp",
    name: Annotated[str | None, Opt(help="Of the model; DATASET-NETWORK if left out.")] = None,
    if_missing: Annotated[bool, Opt("--if-missing", help="Do nothing if there is one.")] = False,
    resume: Annotated[bool, Opt("--resume", help="Continue an interrupted run.")] = False,
    restart: Annotated[bool, Opt("--restart", help="Discard an interrupted run.")] = False,
    epochs: Annotated[int | None, Opt(help="At most so many.")] = None,
    batch_size: Annotated[int | None, Opt(help="Images a step.")] = None,
    learning_rate: Annotated[float | None, Opt(help="At its peak.")] = None,
    weight_decay: Annotated[float | None, Opt(help="Of matrices and kernels.")] = None,
    optimizer: Annotated[Literal["adamw", "sgd"] | None, Opt(help="Of the weights.")] = None,
    label_smoothing: Annotated[float | None, Opt(help="Share spread over all classes.")] = None,
    shift: Annotated[int | None, Opt(help="Augment: shift by at most so many pixels.")] = None,
    flip: Annotated[bool | None, Opt("--flip/--no-flip", help="Augment: mirror half.")] = None,
    patience: Annotated[int | None, Opt(help="Stop after so many epochs without a gain.")] = None,
    seed: Annotated[int, Opt(help="Of everything random.")] = 0,
    hidden: Annotated[str | None, Opt(help="Widths of the hidden layers: 256,256.")] = None,
    dropout: Annotated[str | None, Opt(help="Dropout rate after each of them: 0.2,0.5.")] = None,
    network_arguments: Annotated[str | None, Opt(help="A factory's arguments, as JSON.")] = None,
    size: Annotated[
        int | None, Opt(min=1, metavar="N", help="Side that a folder's images get.")
    ] = None,
    invert: Annotated[bool, Opt("--invert", help="Turn dark into light.")] = False,
    samples: Annotated[
        int, Opt(min=0, metavar="N", help="T of the evaluation; 0: eval mode alone.")
    ] = 100,
    accelerator: Annotated[
        Literal["auto", "cpu", "cuda"], Opt(metavar="A", help="To train on: auto, cpu, cuda.")
    ] = "auto",
    devices: Annotated[int, Opt(min=1, metavar="N", help="Processes that share the work.")] = 1,
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"],
        Opt(metavar="P", help="To train in: 32-true, bf16-mixed, 16-mixed."),
    ] = "32-true",
    checkpoints: Checkpoints = None,
    data_dir: DataDir = None,
) -> None:
    """Train a network and save it as the next version of a model."""
    options = locals()  # among them the fields of a recipe, under their names
    settings = read_settings(checkpoints=checkpoints, data_dir=data_dir)
    name = name or catalogue.default_name(dataset, network)
    if if_missing and (found := catalogue.versions(settings.checkpoints, name)):
        terminal.say(f"{name} has version {found[-1]} already: nothing to do")
        return

    from models import checkpoint, examples, recipes
    from models.evaluation import evaluate as score
    from models.training import Recipe, fit, launch
    from models.training_state import claimed, earlier_run

    allow_local_modules()
    if resume and restart:
        raise Refused("give --resume or --restart, not both")
    recipes.check_run(name, accelerator)
    plan = recipes.plan(
        dataset,
        network,
        settings.data_dir,
        recipe={f.name: options[f.name] for f in fields(Recipe) if options.get(f.name) is not None},
        size=size,
        invert=invert,
        hidden=_parsed("--hidden", hidden, lambda text: tuple(map(int, text.split(",")))),
        dropout=_parsed("--dropout", dropout, lambda text: tuple(map(float, text.split(",")))),
        arguments=_parsed("--network-arguments", network_arguments, lambda x: dict(json.loads(x))),
    )
    data, module, normalize = plan.data, plan.module, plan.data.preprocessing.normalize
    state = settings.checkpoints / name / ".training" / "state.safetensors"

    def hint() -> str:
        return "--resume continues" if state.exists() else "no epoch was finished"

    with claimed(state.parent), terminal.interruptible(hint):
        finished = earlier_run(state, resume=resume, restart=restart)
        fabric = launch(accelerator, devices, precision)
        made_with = {"network": plan.config.to_json(), "on": [precision, devices]}
        run: dict[str, Any] = {"state_path": state, "description": made_with, "fabric": fabric}
        if not fabric.is_global_zero:  # one of several processes: the first shows and saves
            list(fit(module, data.train, normalize, plan.recipe, **run))
            return
        terminal.say_what_is_read(data.name, len(data.train), len(data.test), finished)
        with terminal.TrainingProgress(plan.recipe.epochs, finished) as shown:
            run["progress"] = shown.batch
            for epoch in fit(module, data.train, normalize, plan.recipe, **run):
                shown.epoch(**asdict(epoch))
        with terminal.progress("evaluation") as moved:
            evaluation = score(module, data.test, normalize, samples, progress=moved)
        metadata = checkpoint.Metadata(
            name=name,
            network=plan.config,
            preprocessing=data.preprocessing,
            classes=data.classes,
            recipe=asdict(plan.recipe),
            data=data.origin(),
            evaluation=evaluation,
            examples=examples.choose(data.test, len(data.classes), data.preprocessing),
        )
        path = checkpoint.save(settings.checkpoints, module, metadata)
        shutil.rmtree(state.parent)
    terminal.show_scores(evaluation)
    trust = "" if plan.config.is_builtin else f"DROPSERVE_FACTORIES={network} "
    where = f" --checkpoints {checkpoints}" if checkpoints else ""
    terminal.say(f"saved {path}", f"next: {trust}dropserve serve{where}")
    with suppress(CheckpointRefused):  # a damaged pin is the service's to report
        if pinned := catalogue.pinned(settings.checkpoints, name):
            follow = f"dropserve pin {name} latest{where}"
            terminal.say(f"version {pinned} is pinned: to let the new one answer, {follow}")


def _parsed(option: str, text: str | None, parse: Callable[[str], Parsed]) -> Parsed | None:
    try:
        return None if text is None else parse(text)
    except (ValueError, TypeError) as error:
        raise Refused(f"{option}: cannot be read: {error}") from error


@app.command()
@_reported
def evaluate(
    name: Annotated[str, Opt(help="Of the model.")],
    version: SavedVersion = None,
    dataset: Annotated[str | None, Opt(help="The one it was trained on if left out.")] = None,
    samples: Annotated[
        int, Opt(min=0, metavar="N", help="Thinned networks, T; 0: eval mode alone.")
    ] = 100,
    checkpoints: Checkpoints = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Score a saved model on a dataset's test images."""
    from models import checkpoint, recipes
    from models.evaluation import evaluate as score

    allow_local_modules()
    settings = read_settings(checkpoints=checkpoints, data_dir=data_dir)
    version = catalogue.choose(settings.checkpoints, name, version)
    path = settings.checkpoints / name / str(version)
    module, metadata = checkpoint.load(path, settings.factories)
    data = recipes.evaluation_images(metadata, dataset, settings.data_dir)
    with terminal.progress("evaluation") as moved:
        normalize = metadata.preprocessing.normalize
        evaluation = score(module, data, normalize, samples, progress=moved)
    if as_json:
        terminal.print_json(evaluation)
    else:
        terminal.show_scores(evaluation)


@app.command()
@_reported
def serve(
    checkpoints: Checkpoints = None,
    host: Annotated[str | None, Opt(help="Address to listen on, or DROPSERVE_HOST.")] = None,
    port: Annotated[int | None, Opt(help="Port to listen on, or DROPSERVE_PORT.")] = None,
    workers: Annotated[int | None, Opt(help="Processes, or DROPSERVE_WORKERS.")] = None,
) -> None:
    """Serve the saved models over HTTP, until SIGTERM or Ctrl-C."""
    from service.commands import listening

    settings = read_settings(checkpoints=checkpoints, host=host, port=port, workers=workers)
    listening.check_free(settings.host, settings.port)
    if sys.stderr.isatty() and settings.port:
        listening.announce(settings.url)

    from service import server

    allow_local_modules()
    server.serve(settings)


app.add_typer(commands)
app.add_typer(versions.commands)


@app.command()
@_reported
def settings(as_json: AsJson = False) -> None:
    """List the settings, all environment variables: what they mean and what they are now."""
    rows = terminal.settings_rows(read_settings())
    if as_json:
        terminal.print_json(rows)
    else:
        terminal.show_settings(rows)
