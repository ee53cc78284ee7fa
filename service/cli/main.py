"""The command line: train, import, evaluate, serve, settings, and the commands that ask a service.

PyTorch is imported by the commands that need it, so that the others start at once.
"""

import json
import platform
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dropserve.models import catalogue
from dropserve.models.errors import CheckpointRefused, ModelsError
from dropserve.models.hyperparameters import Recipe, suggested
from dropserve.service.cli import terminal, versions
from dropserve.service.cli.asking import commands
from dropserve.service.cli.options import (
    AsJson,
    Checkpoints,
    DataDir,
    Group,
    Opt,
    SavedVersion,
    allow_local_modules,
    read_settings,
)
from dropserve.service.cli.terminal import Refused
from dropserve.service.errors import DropserveError, ModelStoreError, RequestError

if TYPE_CHECKING:
    from torch import nn

    from dropserve.models.checkpoint import Metadata
    from dropserve.models.data import Split

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train image classifiers with dropout, and serve predictions that say how sure they are.",
)

_reported = terminal.reported(
    wrong=(RequestError, ModelsError, ModelStoreError),
    failed=(DropserveError, OSError),
)


def _read(
    must: str,
    metavar: str,
    text: str,
    parse: Callable[[str], object],
    show_default: bool | str = True,
) -> Any:  # noqa: ANN401  Typer's own type
    """Make an option that is parsed; an error says what it must be."""

    def parsed(given: str) -> object:
        try:
            return parse(given)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"must be {must}") from error

    return Opt(parser=parsed, metavar=metavar, help=text, show_default=show_default)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _classes(text: str) -> list[str]:
    names = text.split(",") if "," in text else Path(text).read_text().splitlines()
    return [name.strip() for name in names]


def _floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _of(name: str, text: str, **settings: Any) -> Any:  # noqa: ANN401  likewise
    """Make the option of a recipe's field; its help says what is suggested."""
    return Opt(help=text, show_default=suggested(name), **settings)


_LIST = "numbers with commas between them"
_HXW = "pixels of a side, or height x width, as 48x64"
_NAMES = "names with commas between them, or a file of a name a line"
# Any is what the parser returns.
Hidden = Annotated[
    Any,
    _read(_LIST, "N,..", "Widths of the hidden layers.", lambda x: tuple(map(int, x.split(",")))),
]
Dropout = Annotated[Any, _read(_LIST, "P,..", "Rate after each hidden layer.", _floats)]
Arguments = Annotated[
    Any,
    _read('a JSON object, as {"a": 1}', "JSON", "Of a factory.", lambda x: dict(json.loads(x))),
]
FolderSize = Annotated[Any, _read(_HXW, "HxW", "Pixels of a folder's images.", _size, "32")]
InputSize = Annotated[Any, _read(_HXW, "HxW", "Pixels of the network's input.", _size)]
Classes = Annotated[Any, _read(_NAMES, "A,B,..", "By logit; or a file, a name a line.", _classes)]
Mean = Annotated[Any, _read(_LIST, "M,..", "Of each channel, in units of 0 to 1.", _floats)]
Std = Annotated[Any, _read(_LIST, "S,..", "Of each channel, likewise.", _floats)]
Invert = Annotated[bool, Opt("--invert", help="Turn dark into light.")]
Fit = Annotated[
    Literal["stretch", "crop", "pad"],
    Opt(metavar="HOW", help="Images of other proportions: stretch, crop (centre), or pad."),
]
SkipBroken = Annotated[bool, Opt("--skip-broken", help="Leave out images that cannot be read.")]
Samples = Annotated[
    int, Opt(min=0, metavar="N", help="Thinned networks, T, of the evaluation; 0: eval mode alone.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        python, torch = platform.python_version(), version_of("torch")
        terminal.say(f"dropserve {version_of('dropserve')} (Python {python}, PyTorch {torch})")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, Opt("--version", is_eager=True, callback=_show_version, help="Print the release.")
    ] = False,
) -> None:
    """Parse the options of `dropserve` itself."""


@app.command()
@_reported
def train(
    dataset: Annotated[
        str, Opt(help="digits, fashion-mnist, mnist, or a folder: a sub-folder a class.")
    ] = "digits",
    network: Annotated[
        str | None,
        Opt(show_default="mlp", help="mlp, cnn, package.module:factory or path/file.py:factory."),
    ] = None,
    name: Annotated[
        str | None, Opt(help="Of the model; DATASET-NETWORK, or that of --from, if left out.")
    ] = None,
    start: Annotated[
        str | None, Opt("--from", metavar="NAME[/N]", help="Train a saved version further.")
    ] = None,
    if_missing: Annotated[bool, Opt("--if-missing", help="Do nothing if there is one.")] = False,
    resume: Annotated[bool, Opt("--resume", help="Continue an interrupted run.")] = False,
    restart: Annotated[bool, Opt("--restart", help="Discard an interrupted run.")] = False,
    epochs: Annotated[int | None, _of("epochs", "At most so many.")] = None,
    batch_size: Annotated[int | None, _of("batch_size", "Images a step.")] = None,
    learning_rate: Annotated[
        float | None, _of("learning_rate", "At its peak; a tenth with --from.")
    ] = None,
    weight_decay: Annotated[float | None, _of("weight_decay", "Of matrices and kernels.")] = None,
    optimizer: Annotated[
        Literal["adamw", "sgd"] | None,
        _of("optimizer", "Of the weights: adamw, sgd.", metavar="O"),
    ] = None,
    label_smoothing: Annotated[
        float | None, _of("label_smoothing", "Share spread over all classes.")
    ] = None,
    shift: Annotated[int | None, _of("shift", "Augment: most pixels to shift by.")] = None,
    flip: Annotated[
        bool | None,
        Opt("--flip/--no-flip", help="Augment: mirror half.", show_default=suggested("flip")),
    ] = None,
    patience: Annotated[int | None, _of("patience", "Epochs without a gain, then stop.")] = None,
    seed: Annotated[int, Opt(help="Of everything random.")] = 0,
    threads: Annotated[
        int | None, Opt(help="CPU threads.", show_default="by the network's size")
    ] = None,
    hidden: Hidden = None,
    dropout: Dropout = None,
    network_arguments: Arguments = None,
    size: FolderSize = None,
    invert: Invert = False,
    fit: Fit | None = None,
    skip_broken: SkipBroken = False,
    samples: Samples = 100,
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
    root, (parent, _, number) = settings.checkpoints, (start or "").partition("/")
    name = name or parent or catalogue.default_name(dataset, network or "mlp")
    if if_missing and (found := catalogue.versions(root, name)):
        terminal.say(f"{name} has version {found[-1]} already: nothing to do")
        return

    from dropserve.models import checkpoint, recipes, training
    from dropserve.models.training_state import claimed, earlier_run

    allow_local_modules()
    if resume and restart:
        raise Refused("give --resume or --restart, not both")
    recipes.check_run(name, accelerator)
    asked = _given(**{f.name: options.get(f.name) for f in fields(Recipe)})
    if start is None:
        plan = recipes.plan(
            dataset,
            network or "mlp",
            settings.data_dir,
            recipe=asked,
            asked=_given(hidden=hidden, dropout=dropout, arguments=network_arguments),
            size=size,
            invert=invert,
            fit=fit or "stretch",
            skip_broken=skip_broken,
        )
    else:
        kept = ("network", "hidden", "dropout", "network_arguments", "size", "invert", "fit")
        given = [f"--{o}".replace("_", "-") for o in kept if options[o] not in (None, False)]
        if given:
            raise Refused(f"--from keeps the network and the preprocessing: not {', '.join(given)}")
        if not (number or "1").isdecimal():
            raise Refused("--from: must be NAME or NAME/VERSION")
        chosen = catalogue.choose(root, parent, int(number) if number else None)
        path = root / parent / str(chosen)
        plan = recipes.plan_from(
            path,
            settings.factories,
            dataset,
            settings.data_dir,
            recipe=asked,
            skip_broken=skip_broken,
        )
    data, module, normalize = plan.data, plan.module, plan.data.preprocessing.normalize
    state = root / name / ".training" / "state.safetensors"

    def hint() -> str:
        return "--resume continues" if state.exists() else "no epoch was finished"

    with claimed(state.parent), terminal.interruptible(hint):
        finished = earlier_run(state, resume=resume, restart=restart)
        fabric = training.launch(accelerator, devices, precision)
        recipe = training.with_threads(plan.recipe, module, normalize(data.train.images[:1]))
        made_with = plan.description() | {"on": [precision, devices]}
        run: dict[str, Any] = {"state_path": state, "description": made_with, "fabric": fabric}
        if not fabric.is_global_zero:  # one of several processes: the first shows and saves
            list(training.fit(module, data.train, normalize, recipe, **run))
            return
        if resume and not finished:
            terminal.say(f"no interrupted run of {name} to resume: a new one begins")
        before = f"; epochs done before: {finished}" if finished else ""
        terminal.say(data.summary() + before)
        with terminal.TrainingProgress(recipe.epochs, finished) as shown:
            run["progress"] = shown.batch
            for epoch in training.fit(module, data.train, normalize, recipe, **run):
                shown.epoch(**vars(epoch))
        with training.cpu_threads(recipe.threads):
            metadata = _scored(plan.metadata(name, recipe), module, data.test, samples)
            path = checkpoint.save(root, module, metadata)
        shutil.rmtree(state.parent)
    _say_saved(path, metadata, checkpoints)


@app.command("import")
@_reported
def import_(
    network: Annotated[
        str, Opt(help="package.module:factory, path/to/file.py:factory, mlp, or cnn.")
    ],
    weights: Annotated[Path, Opt(help="A safetensors file of all its tensors.")],
    classes: Classes,
    mean: Mean,
    std: Std,
    size: InputSize,
    name: Annotated[str, Opt(help="Of the model.")],
    channels: Annotated[
        int | None, Opt(metavar="C", help="1 or 3; as many as --mean has values if left out.")
    ] = None,
    network_arguments: Arguments = None,
    hidden: Hidden = None,
    dropout: Dropout = None,
    invert: Invert = False,
    fit: Fit = "stretch",
    evaluate: Annotated[
        str | None,
        Opt(metavar="DATASET", help="Score it: a folder, a sub-folder a class, or as in train."),
    ] = None,
    skip_broken: SkipBroken = False,
    samples: Samples = 100,
    checkpoints: Checkpoints = None,
    data_dir: DataDir = None,
) -> None:
    """Save a network that was trained elsewhere as the next version of a model."""
    from dropserve.models import checkpoint, recipes
    from dropserve.models.preprocessing import Preprocessing

    allow_local_modules()
    settings = read_settings(checkpoints=checkpoints, data_dir=data_dir)
    recipes.check_run(name)
    channels = channels or len(mean)
    mean, std = (values * (channels if len(values) == 1 else 1) for values in (mean, std))
    module, metadata = recipes.imported(
        name,
        weights,
        network,
        Preprocessing(size, channels, mean, std, invert, fit),
        classes,
        _given(hidden=hidden, dropout=dropout, arguments=network_arguments),
    )
    if evaluate is not None:
        test = recipes.evaluation_images(
            metadata, evaluate, settings.data_dir, skip_broken=skip_broken
        )
        metadata = _scored(metadata, module, test, samples)
    _say_saved(checkpoint.save(settings.checkpoints, module, metadata), metadata, checkpoints)


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _figures(
    metadata: "Metadata", module: "nn.Module", test: "Split", samples: int, *, confusion: bool
) -> dict[str, Any]:
    """Score a module, with a bar."""
    from dropserve.models.evaluation import evaluate as score

    normalize = metadata.preprocessing.normalize
    with terminal.progress("evaluation") as moved:
        figures = score(module, test, normalize, samples, progress=moved, confusion=confusion)
    return {**figures, **({"classes": metadata.classes} if confusion else {})}


def _scored(metadata: "Metadata", module: "nn.Module", test: "Split", samples: int) -> "Metadata":
    """Score a module; its figures and some of the images are saved with it."""
    from dropserve.models import examples

    figures = _figures(metadata, module, test, samples, confusion=False)
    shown = examples.choose(test, len(metadata.classes), metadata.preprocessing)
    return replace(metadata, evaluation=figures, examples=shown)


def _say_saved(path: Path, metadata: "Metadata", checkpoints: Path | None) -> None:
    if metadata.evaluation:
        terminal.show_scores(metadata.evaluation)
    kind = shlex.quote(metadata.network.kind)
    trust = "" if metadata.network.is_builtin else f"DROPSERVE_FACTORIES={kind} "
    where = f" --checkpoints {shlex.quote(str(checkpoints))}" if checkpoints else ""
    terminal.say(f"saved {path}", f"next: {trust}dropserve serve{where}")
    with suppress(CheckpointRefused):  # a damaged pin is the service's to report
        if pinned := catalogue.pinned(path.parent.parent, metadata.name):
            follow = f"dropserve pin {metadata.name} latest{where}"
            terminal.say(f"version {pinned} is pinned: to let the new one answer, {follow}")


@app.command()
@_reported
def evaluate(
    name: Annotated[str, Opt(help="Of the model.")],
    version: SavedVersion = None,
    dataset: Annotated[
        str | None, Opt(help="Left out: the one it was trained on; a folder must be named.")
    ] = None,
    samples: Samples = 100,
    confusion: Annotated[
        bool, Opt("--confusion", help="Show which classes are taken for which, in eval mode.")
    ] = False,
    skip_broken: SkipBroken = False,
    checkpoints: Checkpoints = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Score a saved model on a dataset's test images."""
    from dropserve.models import checkpoint, recipes

    allow_local_modules()
    settings = read_settings(checkpoints=checkpoints, data_dir=data_dir)
    version = catalogue.choose(settings.checkpoints, name, version)
    path = settings.checkpoints / name / str(version)
    module, metadata = checkpoint.load(path, settings.factories)
    data = recipes.evaluation_images(metadata, dataset, settings.data_dir, skip_broken=skip_broken)
    figures = _figures(metadata, module, data, samples, confusion=confusion)
    if as_json:
        terminal.print_json(figures)
        return
    terminal.show_scores(figures)
    if confusion:
        terminal.show_confusion(figures["confusion"], metadata.classes)


@app.command()
@_reported
def serve(
    checkpoints: Checkpoints = None,
    host: Annotated[str | None, Opt(help="Address to listen on, or DROPSERVE_HOST.")] = None,
    port: Annotated[int | None, Opt(help="Port to listen on, or DROPSERVE_PORT.")] = None,
    workers: Annotated[int | None, Opt(help="Processes, or DROPSERVE_WORKERS.")] = None,
) -> None:
    """Serve the saved models over HTTP, until SIGTERM or Ctrl-C."""
    from dropserve.service.cli import listening

    settings = read_settings(checkpoints=checkpoints, host=host, port=port, workers=workers)
    listening.check_free(settings.host, settings.port)
    if sys.stderr.isatty() and settings.port:
        listening.announce(settings.url)

    from dropserve.service import server

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
