"""Commands that make and score models; they import PyTorch when they run."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.progress import TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from dropserve.models import checkpoint
from dropserve.models.defaults import DEFAULT_SAMPLES
from dropserve.models.errors import CheckpointError, CheckpointRefused, ConfigError, ModelsError
from dropserve.models.hyperparameters import Recipe, suggested
from dropserve.service.cli import options, terminal
from dropserve.service.cli.options import Opt
from dropserve.service.cli.terminal import Refused, console, say
from dropserve.service.cli.versions import Name

if TYPE_CHECKING:
    from torch import nn

    from dropserve.models.checkpoint import Metadata
    from dropserve.models.data import Split
    from dropserve.models.recipes import Plan
    from dropserve.models.repository import Repository
    from dropserve.models.training import Epoch
    from dropserve.service.settings import Settings

_SCORES = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE"}
_FEW = 1000  # test images; with fewer, scores vary much by chance


def _parsed(must: str, metavar: str, text: str, parse: Callable[[str], object]) -> Any:  # noqa: ANN401  Typer's own type
    """Make an option that is parsed; an error says what it must be."""

    def parsed(given: str) -> object:
        try:
            return parse(given)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"must be {must}") from error

    return Opt(parser=parsed, metavar=metavar, help=text)


def _recipe(name: str, text: str, **more: Any) -> Any:  # noqa: ANN401  likewise
    """Make the option of a recipe's field, with its default by dataset in the help."""
    return Opt(help=text, show_default=suggested(name), **more)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _names(text: str) -> list[str]:
    names = text.split(",") if "," in text else Path(text).read_text().splitlines()
    return [name.strip() for name in names]


def _object(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


def _list(kind: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    return lambda text: tuple(map(kind, text.split(",")))


Optimizer = Literal["adamw", "sgd"] | None
Schedule = Literal["cosine", "constant"] | None
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Int = int | None
Float = float | None
Text = str | None
_DATASETS = "digits, fashion-mnist, mnist, or a folder"
_NETWORKS = "mlp, cnn, gru, wrn, vit, package.module:factory or path/file.py:factory."
_LIST = "numbers with commas between them"
_HXW = "pixels of a side, or height x width, as 48x64"
_NAMES = "names with commas between them, or a file of a name a line"
# Any is what the parser returns.
Hidden = Annotated[Any, _parsed(_LIST, "N,..", "Widths of the hidden layers.", _list(int))]
Dropout = Annotated[Any, _parsed(_LIST, "P,..", "Rate of each layer, or of all.", _list(float))]
Channels = Annotated[Any, _parsed(_LIST, "N,..", "Channels of a cnn or wrn.", _list(int))]
Scope = Literal["example", "batch", "epoch"] | None
Arguments = Annotated[Any, _parsed('a JSON object, as {"a": 1}', "JSON", "For a factory.", _object)]
Size = Annotated[Any, _parsed(_HXW, "HxW", "Pixels of the input; 32 for a folder.", _size)]
Classes = Annotated[Any, _parsed(_NAMES, "A,B,..", "In logit order; or a file.", _names)]
Mean = Annotated[Any, _parsed(_LIST, "M,..", "Per channel, in units of 0 to 1.", _list(float))]
Std = Annotated[Any, _parsed(_LIST, "S,..", "Per channel, in units of 0 to 1.", _list(float))]
Invert = Annotated[bool, Opt("--invert", help="Invert the brightness.")]
Fit = Annotated[
    Literal["stretch", "crop", "pad"],
    Opt(metavar="HOW", help="Images of other proportions: stretch, crop (centre), or pad."),
]
SkipBroken = Annotated[bool, Opt("--skip-broken", help="Leave out images that cannot be read.")]
Samples = Annotated[int, Opt(min=0, metavar="T", help="Thinned networks to score; 0: none.")]


class TrainCommand(TyperCommand):
    """`train`, whose help describes each regularizer."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401  Typer exports no types
        """Show the help; the registry needs PyTorch."""
        from dropserve.models.regularizers import METHODS

        methods = (
            f"{name} ({', '.join(method.networks)}): {(method.layer.__doc__ or '').splitlines()[0]}"
            for name, method in METHODS.items()
        )
        self.epilog = "\n\n".join(["Regularizers, and networks that can have them:", *methods])
        super().format_help(ctx, formatter)


def train(
    dataset: Annotated[str, Opt(help=f"{_DATASETS}: one sub-folder per class.")] = "digits",
    network: Annotated[Text, Opt(show_default="mlp", help=_NETWORKS)] = None,
    name: Annotated[Text, Opt(help="Model; default: DATASET-NETWORK, or that of --from.")] = None,
    start: Annotated[Text, Opt("--from", metavar="NAME[/N]", help="Train this further.")] = None,
    if_missing: Annotated[bool, Opt("--if-missing", help="Do nothing if it exists.")] = False,
    resume: Annotated[bool, Opt("--resume", help="Continue an interrupted run.")] = False,
    restart: Annotated[bool, Opt("--restart", help="Discard an interrupted run.")] = False,
    epochs: Annotated[Int, _recipe("epochs", "Most epochs.")] = None,
    batch_size: Annotated[Int, _recipe("batch_size", "Images per step.")] = None,
    learning_rate: Annotated[Float, _recipe("learning_rate", "Peak; a tenth with --from.")] = None,
    weight_decay: Annotated[Float, _recipe("weight_decay", "Matrices and kernels only.")] = None,
    optimizer: Annotated[Optimizer, _recipe("optimizer", "adamw or sgd.", metavar="O")] = None,
    schedule: Annotated[Schedule, _recipe("schedule", "cosine or constant.", metavar="S")] = None,
    label_smoothing: Annotated[Float, _recipe("label_smoothing", "Share for all classes.")] = None,
    shift: Annotated[Int, _recipe("shift", "Augment: most pixels to shift by.")] = None,
    flip: Annotated[bool | None, _recipe("flip", "Augment: mirror half.")] = None,
    patience: Annotated[Int, _recipe("patience", "Epochs without a gain, then stop.")] = None,
    decay_biases: Annotated[bool | None, Opt("--decay-biases", help="Decay biases too.")] = None,
    l1: Annotated[Float, Opt(help="Penalty on absolute weights.", show_default="0")] = None,
    max_norm: Annotated[Float, Opt(help="Norm of a unit's weights.", show_default="none")] = None,
    seed: Annotated[int, Opt(help="Seed of everything random.")] = 0,
    threads: Annotated[Int, Opt(help="CPU threads.", show_default="by the network's size")] = None,
    hidden: Hidden = None,
    channels: Channels = None,
    blocks: Annotated[Int, Opt(help="Blocks of a vit, or a wrn's stage.")] = None,
    regularizer: Annotated[Text, Opt(show_default="dropout", help="Listed below.")] = None,
    dropout: Dropout = None,
    input_dropout: Annotated[Float, Opt(help="Rate on the input.", show_default="0")] = None,
    spatial_dropout: Annotated[Float, Opt(help="Rate of a cnn's channels.")] = None,
    stochastic_depth: Annotated[Float, Opt(help="Rate of a wrn's or vit's last block.")] = None,
    noise_mean: Annotated[Float, Opt(help="Mean of additive noise.", show_default="0")] = None,
    mask_scope: Annotated[
        Scope, Opt(metavar="S", help="A draw per example, batch or epoch.", show_default="example")
    ] = None,
    before_activation: Annotated[
        bool | None, Opt("--before-activation", help="Noise before the activation.")
    ] = None,
    batch_norm: Annotated[bool | None, Opt("--batch-norm", help="In an mlp's layers.")] = None,
    init_std: Annotated[Float, Opt(help="Std of fresh weights.", show_default="PyTorch's")] = None,
    network_arguments: Arguments = None,
    size: Size = None,
    invert: Invert = False,
    fit: Fit | None = None,
    skip_broken: SkipBroken = False,
    samples: Samples = DEFAULT_SAMPLES,
    device: Annotated[
        Device, Opt("--device", "--accelerator", metavar="D", help="auto, cpu or cuda.")
    ] = "auto",
    devices: Annotated[Int, Opt(min=1, metavar="N", help="Processes that share the work.")] = None,
    accumulate: Annotated[int, Opt(min=1, metavar="N", help="Parts of a batch, one by one.")] = 1,
    precision: Annotated[
        Precision, Opt(metavar="P", help="32-true, bf16-mixed or 16-mixed.")
    ] = "32-true",
    checkpoints: options.Checkpoints = None,
    data_dir: options.DataDir = None,
) -> None:
    """Train a network and save it as the next version of a model."""
    given = locals()  # among them fields of a recipe and of a network, under their names
    settings = options.read_settings(checkpoints=checkpoints, data_dir=data_dir)
    models, (parent, _, number) = options.repository(settings), (start or "").partition("/")
    name = name or parent or checkpoint.default_name(dataset, network or "mlp")
    if if_missing and (found := models.versions(name)):
        say(f"{name} has version {found[-1]} already: nothing to do")
        return

    import torch

    from dropserve.models import processes, recipes, training
    from dropserve.models.networks import NetworkConfig

    network_options = [field.name for field in fields(NetworkConfig) if field.name in given]
    options.allow_local_modules()
    if resume and restart:
        raise Refused("give --resume or --restart, not both")
    recipes.check_run(name, device)
    _start_others(devices or 1)
    fabric = processes.launch(device, precision, devices)
    asked = _given(**{field.name: given.get(field.name) for field in fields(Recipe)})
    data_options = _data_options(settings, skip_broken=skip_broken)
    if start is None:
        own = _given(arguments=network_arguments, **{o: given[o] for o in network_options})
        data_options |= {"asked": own, "size": size, "invert": invert, "fit": fit or "stretch"}
        make = partial(recipes.plan, dataset, network or "mlp", settings.data_dir)
    else:
        kept = ("network", *network_options, "network_arguments", "size", "invert", "fit")
        wrong = [f"--{o}".replace("_", "-") for o in kept if given[o] not in (None, False)]
        if wrong:
            raise Refused(f"--from keeps the network and the preprocessing: not {', '.join(wrong)}")
        if not (number or "1").isdecimal():
            raise Refused("--from: must be NAME or NAME/VERSION")
        chosen = models.choose(parent, int(number) if number else None)
        make = partial(
            _plan_from, models, parent, chosen, settings.factories, dataset, settings.data_dir
        )
    with _shown_once(ModelsError), _reading(dataset, shown=fabric.is_global_zero) as moved:
        plan = make(recipe=asked, progress=moved, **data_options)
    data, module, normalize = plan.data, plan.module, plan.data.preprocessing.normalize
    state = models.workspace(name) / "state.safetensors"

    def hint() -> str:
        return "--resume continues" if state.exists() else "no epoch was finished"

    example = normalize(data.train.take(torch.arange(1)).images)
    recipe = training.with_threads(plan.recipe, module, example)
    made_with = plan.description() | {"on": [precision, fabric.world_size]}
    run: dict[str, Any] = {"state_path": state, "description": made_with, "fabric": fabric}
    run |= {"accumulate": accumulate}
    if not fabric.is_global_zero:  # one of several processes: the first shows and saves
        with _shown_once(ConfigError, CheckpointError):
            list(training.fit(module, data.train, normalize, recipe, **run))
        return
    with training.claimed(state.parent):
        with terminal.interruptible(hint):
            finished = training.earlier_run(state, resume=resume, restart=restart)
            if resume and not finished:
                say(f"no interrupted run of {name} to resume: a new one begins")
            told = f"; processes: {fabric.world_size}" if fabric.world_size > 1 else ""
            told += f"; epochs done before: {finished}" if finished else ""
            say(data.summary() + told)

            def fit_(progress: Callable[[int, int], None]) -> "Iterator[Epoch]":
                return training.fit(module, data.train, normalize, recipe, progress=progress, **run)

            last = show_epochs(fit_, recipe.epochs, finished)
            # A run that was killed after its last epoch may have saved its version already.
            saved = models.holding(name, module) if last == finished else None
            with training.cpu_threads(recipe.threads):
                metadata = plan.metadata(name, recipe)
                version, metadata = saved or _save(models, metadata, module, data.test, samples)
        _say_saved(models, version, metadata, checkpoints)
        training.discard(state)


def import_(
    network: Annotated[str, Opt(help=_NETWORKS)],
    weights: Annotated[Path, Opt(help="A safetensors file of all its tensors.")],
    classes: Classes,
    mean: Mean,
    std: Std,
    size: Size,
    name: Annotated[str, Opt(help="Model.")],
    channels: Annotated[Int, Opt(metavar="C", help="1 or 3, else as many as means.")] = None,
    network_arguments: Arguments = None,
    hidden: Hidden = None,
    dropout: Dropout = None,
    invert: Invert = False,
    fit: Fit = "stretch",
    evaluate: Annotated[Text, Opt(metavar="DATASET", help="Test data, as of train.")] = None,
    skip_broken: SkipBroken = False,
    samples: Samples = DEFAULT_SAMPLES,
    checkpoints: options.Checkpoints = None,
    data_dir: options.DataDir = None,
) -> None:
    """Save a network that was trained elsewhere as the next version of a model."""
    from dropserve.models import recipes
    from dropserve.models.preprocessing import Preprocessing

    options.allow_local_modules()
    settings = options.read_settings(checkpoints=checkpoints, data_dir=data_dir)
    recipes.check_run(name)
    channels = channels or len(mean)
    mean, std = (values * (channels if len(values) == 1 else 1) for values in (mean, std))
    preprocessing = Preprocessing(size, channels, mean, std, invert, fit)
    own = _given(hidden=hidden, dropout=dropout, arguments=network_arguments)
    module, metadata = recipes.imported(name, weights, network, preprocessing, classes, own)
    if evaluate is not None:
        how = _data_options(settings, skip_broken=skip_broken)
        test = recipes.evaluation_images(metadata, evaluate, settings.data_dir, **how)
        metadata = _evaluated(metadata, module, test, samples)
    models = options.repository(settings)
    _say_saved(models, models.save(module, metadata), metadata, checkpoints)


def evaluate(
    name: Annotated[str, Opt(help="Model.")],
    version: Annotated[Int, Opt(min=1, metavar="N", help="Version; default: latest.")] = None,
    dataset: Annotated[Text, Opt(help="Default: that of the training.")] = None,
    samples: Samples = DEFAULT_SAMPLES,
    method: Annotated[
        Literal["dropout", "moment-matching"], Opt(metavar="M", help="Or moment-matching.")
    ] = "dropout",
    confusion: Annotated[bool, Opt("--confusion", help="Show confused classes.")] = False,
    skip_broken: SkipBroken = False,
    checkpoints: options.Checkpoints = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Score a saved model on a dataset's test images."""
    from dropserve.models import recipes

    options.allow_local_modules()
    settings = options.read_settings(checkpoints=checkpoints, data_dir=data_dir)
    models = options.repository(settings)
    with models.local(name, models.choose(name, version)) as path:
        module, metadata = checkpoint.load(path, settings.factories)
    how = _data_options(settings, skip_broken=skip_broken)
    data = recipes.evaluation_images(metadata, dataset, settings.data_dir, **how)
    figures = _figures(metadata, module, data, samples, method=method, confusion=confusion)
    if as_json:
        terminal.print_json({**figures, **({"classes": metadata.classes} if confusion else {})})
        return
    show_scores(figures)
    if confusion:
        show_confusion(figures["confusion"], metadata.classes)


def convert(
    name: Name,
    version: Annotated[Int, Opt(min=1, metavar="N", help="Version; default: latest.")] = None,
    dropout: Dropout = None,
    input_dropout: Annotated[Float, Opt(metavar="P", help="Rate on the input.")] = None,
    remove_dropout: Annotated[bool, Opt("--remove-dropout", help="Set all rates to 0.")] = False,
    to: Annotated[
        Literal["vanilla", "inverted"] | None,
        Opt(metavar="HOW", help="vanilla or inverted: dropout whose eval mode scales or does not."),
    ] = None,
    checkpoints: options.Checkpoints = None,
) -> None:
    """Save a model with other dropout rates, or none, and the same eval mode, as its next version.

    Weights are scaled where eval mode depends on the rate, as it does with vanilla dropout.
    """
    from dropserve.models import conversion

    models = options.repository(options.read_settings(checkpoints=checkpoints))
    found = models.read(name, models.choose(name, version))
    regularizer = to and conversion.CONVENTIONS[to]
    asked = _given(dropout=dropout, input_dropout=input_dropout, regularizer=regularizer)
    module, metadata = conversion.converted(found, asked, remove=remove_dropout)
    saved = models.save(module, metadata)
    done, network = metadata.recipe["converted"], metadata.network.to_json()
    for field, was in done["was"].items():
        say(f"{field}: {was}, now {network[field]}")
    for layer, ratio in done["scaled"].items():
        say(f"weights of {layer}: multiplied by {ratio:.6g}")
    _say_saved(models, saved, metadata, checkpoints)
    command = f"dropserve evaluate --name {name} --version {saved}{_where(checkpoints)}"
    say(f"to score it again: {command}")


def _start_others(devices: int) -> None:
    """Run this command in several processes and exit, unless they run already."""
    from dropserve.models import processes

    if devices > 1 and not processes.is_started():
        command = ["-m", "dropserve.service.cli.main", *sys.argv[1:]]
        raise typer.Exit(processes.run(command, devices))


def _data_options(settings: "Settings", *, skip_broken: bool) -> dict[str, Any]:
    """Return what `load_dataset` is told of every folder."""
    return {"skip_broken": skip_broken, "max_bytes": settings.dataset_mb * 2**20}


@contextmanager
def _shown_once(*errors: type[Exception]) -> Iterator[None]:
    """Leave errors that each process of this machine has to the first of them."""
    from dropserve.models import processes

    try:
        yield
    except errors as error:
        if processes.is_further():
            raise typer.Exit(2) from error
        raise


@contextmanager
def _reading(dataset: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far a folder is read."""
    if shown and Path(dataset).is_dir():
        with terminal.progress("reading images") as moved:
            yield moved
    else:
        yield lambda _done, _total: None


def _plan_from(
    models: "Repository",
    name: str,
    version: int,
    *how: Any,  # noqa: ANN401  what `plan_from` takes
    **options: Any,  # noqa: ANN401  likewise
) -> "Plan":
    from dropserve.models import recipes

    with models.local(name, version) as path:
        return recipes.plan_from(path, *how, **options)


def _given(**given: object) -> dict[str, object]:
    return {name: value for name, value in given.items() if value is not None}


def show_epochs(
    fit: "Callable[[Callable[[int, int], None]], Iterator[Epoch]]", epochs: int, finished: int
) -> int:
    """Train, and show a live bar with the last epoch's figures; without a terminal, lines.

    Returns the number of the last epoch, `finished` where none was left to do.
    """
    with terminal.bar(TextColumn("{task.fields[figures]}"), TimeRemainingColumn()) as shown:
        task = shown.add_task("", total=epochs, completed=finished, figures="")

        def progress(done: int, total: int) -> None:
            description = f"epoch {min(finished + 1, epochs)}/{epochs}"
            shown.update(task, description=description, completed=finished + done / total)

        for epoch in fit(progress):
            finished = epoch.number
            figures = (
                f"loss {epoch.loss:.4f}, accuracy {epoch.train_accuracy:.2%} in training, "
                f"{epoch.validation_accuracy:.2%} in validation{' (best)' if epoch.best else ''}, "
                f"{epoch.images_per_second:,.0f} images/s"
            )
            shown.update(task, completed=finished, figures=figures)
            if shown.disable:
                say(f"epoch {finished}/{epochs}: {figures}, {epoch.seconds:.1f} s")
    return finished


def _figures(
    metadata: "Metadata",
    module: "nn.Module",
    test: "Split",
    samples: int,
    **how: Any,  # noqa: ANN401  what `evaluate` takes
) -> Mapping[str, Any]:
    from dropserve.models.evaluation import evaluate as score

    normalize = metadata.preprocessing.normalize
    with terminal.progress("evaluation") as moved:
        return score(module, test, normalize, samples, progress=moved, **how)


def _evaluated(
    metadata: "Metadata", module: "nn.Module", test: "Split", samples: int
) -> "Metadata":
    """Add a module's scores and some of the test images, which are saved with it."""
    from dropserve.models import examples

    figures = _figures(metadata, module, test, samples)
    shown = examples.choose(test, len(metadata.classes), metadata.preprocessing)
    return replace(metadata, evaluation=figures, examples=shown)


def _save(
    models: "Repository", metadata: "Metadata", module: "nn.Module", test: "Split", samples: int
) -> "tuple[int, Metadata]":
    """Score a module and save it as the next version."""
    metadata = _evaluated(metadata, module, test, samples)
    return models.save(module, metadata), metadata


def _say_saved(
    models: "Repository", version: int, metadata: "Metadata", checkpoints: str | None
) -> None:
    if metadata.evaluation:
        show_scores(metadata.evaluation)
    kind = shlex.quote(metadata.network.kind)
    trust = "" if metadata.network.is_builtin else f"DROPSERVE_FACTORIES={kind} "
    where = _where(checkpoints)
    say(f"saved {models.place(metadata.name, version)}", f"next: {trust}dropserve serve{where}")
    with suppress(CheckpointRefused):  # the service reports a damaged pin
        if pinned := models.pinned(metadata.name):
            follow = f"dropserve pin {metadata.name} latest{where}"
            say(f"version {pinned} is pinned: to let the new one answer, {follow}")


def _where(checkpoints: str | None) -> str:
    return f" --checkpoints {shlex.quote(checkpoints)}" if checkpoints else ""


def show_scores(evaluation: Mapping[str, Any]) -> None:
    """Print what `dropserve.models.evaluation.evaluate` returns, and whether dropout helped."""
    table = Table(title=f"{evaluation['images']:,} test images", title_justify="left")
    table.add_column("mode", no_wrap=True)
    for heading in _SCORES.values():
        table.add_column(heading, justify="right")
    for key, title in (("eval", "eval mode"), ("dropout", "Monte Carlo dropout")):
        if figures := evaluation.get(key):
            title += f", T = {figures['samples']}" if "samples" in figures else ""
            table.add_row(title, *(f"{figures[name]:.4f}" for name in _SCORES))
    console().print(table)
    if "dropout" not in evaluation:
        return
    gains = {
        name: evaluation["eval"][name] - evaluation["dropout"][name] for name in ("nll", "ece")
    }
    lower = " and ".join(_SCORES[name] for name, gain in gains.items() if gain > 0)
    higher = " and ".join(_SCORES[name] for name, gain in gains.items() if gain < 0)
    which = ", ".join(["lower " + lower] * bool(lower) + ["higher " + higher] * bool(higher))
    text = (
        f"hint: Monte Carlo dropout's probabilities have {which or 'the same NLL and ECE'} than "
        f"eval mode's (lower is better)"
    )
    if evaluation["images"] < _FEW:
        text += f", perhaps by chance: {evaluation['images']} images are few"
    if higher:
        text += "; it helps overconfident networks: for others take eval mode's probabilities"
    say(text)


def show_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Print counts, a row a label, a column a prediction; of many classes, the worst 20 pairs."""
    if len(classes) <= 12:
        head = ["label", *map(str, range(len(classes)))]
        rows = [
            [f"{k} {classes[k]}", *(str(count or "·") for count in row)]
            for k, row in enumerate(counts)
        ]
    else:
        pairs = [(-n, i, k) for i, row in enumerate(counts) for k, n in enumerate(row) if i != k]
        head = ["label", "answer", "images", "of the label's"]
        rows = [
            [classes[i], classes[k], str(-n), f"{-n / sum(counts[i]):.1%}"]
            for n, i, k in sorted(pairs)[:20]
            if n
        ]
    table = Table(title="answers in eval mode", title_justify="left", box=SIMPLE)
    for title in head:
        table.add_column(title, justify="left" if title in ("label", "answer") else "right")
    for row in rows:
        table.add_row(*row)
    console().print(table)
