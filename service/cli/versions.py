"""The commands that keep a model's versions in order: manifest, pin, rollback, prune.

They work on the checkpoints folder; services that read it follow at their next poll.
"""

from collections.abc import Iterable
from typing import Annotated

import typer

from dropserve.models import catalogue
from dropserve.models.errors import CheckpointRefused, ModelsError
from dropserve.service.cli import terminal
from dropserve.service.cli.options import (
    Checkpoints,
    Opt,
    allow_local_modules,
    read_settings,
)
from dropserve.service.cli.terminal import Refused
from dropserve.service.settings import Settings

commands = typer.Typer()
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the model.")]

_reported = terminal.reported(wrong=(ModelsError,), failed=(OSError,))


@commands.command()
@_reported
def manifest(
    name: Name,
    version: Annotated[
        int | None, Opt(min=1, metavar="N", help="Of the model; all if left out.")
    ] = None,
    checkpoints: Checkpoints = None,
) -> None:
    """Verify a model's versions, all or one, and write the manifest of those that have none."""
    from dropserve.models import checkpoint

    root = read_settings(checkpoints=checkpoints).checkpoints
    chosen = catalogue.choose(root, name, version)
    refused = []
    for number in [chosen] if version else catalogue.versions(root, name):
        try:
            found = checkpoint.read(root / name / str(number))
        except CheckpointRefused as error:
            refused.append(str(error))
            continue
        done = "verified"
        if found.manifest_sha256 is None:
            found, done = checkpoint.add_manifest(found), "manifest written"
        terminal.say(f"{name} {number}: {done}, SHA-256 of the manifest {found.manifest_sha256}")
    if refused:
        raise Refused("; ".join(refused))


@commands.command()
@_reported
def pin(
    name: Name,
    version: Annotated[str, typer.Argument(metavar="N|latest", help="Which is to answer.")],
    checkpoints: Checkpoints = None,
) -> None:
    """Let one version of a model answer, whatever newer ones come; or the latest again."""
    settings = read_settings(checkpoints=checkpoints)
    if version == "latest":
        catalogue.choose(settings.checkpoints, name)
        _pin(settings, name, None)
    elif version.isascii() and version.isdecimal():
        from dropserve.models import checkpoint

        number = catalogue.choose(settings.checkpoints, name, int(version))
        checkpoint.read(settings.checkpoints / name / str(number))  # for its errors
        _pin(settings, name, number)
    else:
        raise Refused("give the number of a version, or latest")


@commands.command()
@_reported
def rollback(name: Name, checkpoints: Checkpoints = None) -> None:
    """Pin the version before the one that answers now, and that can be served."""
    settings = read_settings(checkpoints=checkpoints)
    now = _answering(settings, name)
    older = [v for v in catalogue.versions(settings.checkpoints, name) if v < now]
    before = _first_that_loads(settings, name, reversed(older))
    if before is None:
        raise Refused(f"{name}: version {now} answers, and none before it can be served")
    _pin(settings, name, before)
    terminal.say(f"version {now} answered until now")


@commands.command()
@_reported
def prune(
    name: Name,
    keep: Annotated[int, Opt(min=1, metavar="N", help="Newest versions that stay.")],
    dry_run: Annotated[
        bool, Opt("--dry-run", help="Say what would go, and remove nothing.")
    ] = False,
    checkpoints: Checkpoints = None,
) -> None:
    """Remove a model's old versions; never the one that answers, nor one that is pinned."""
    settings = read_settings(checkpoints=checkpoints)
    root = settings.checkpoints
    catalogue.choose(root, name)
    there = catalogue.versions(root, name)
    kept = {*there[-keep:], catalogue.pinned(root, name), _fixed(settings, name)}
    if not kept.issuperset(there):
        kept.add(_answering(settings, name))
    for version in there:
        if version not in kept and (dry_run or catalogue.remove(root, name, version)):
            terminal.say(f"{'would remove' if dry_run else 'removed'} {root / name / str(version)}")
    stay = [v for v in there if v in kept] if dry_run else catalogue.versions(root, name)
    terminal.say(f"{name}: {'would keep' if dry_run else 'has'} {', '.join(map(str, stay))}")


def _pin(settings: Settings, name: str, version: int | None) -> None:
    if (fixed := _fixed(settings, name)) is not None:
        raise Refused(f"DROPSERVE_DEFAULT_VERSION is {fixed} and wins over a pin: change that")
    catalogue.pin(settings.checkpoints, name, version)
    what = "no version is pinned" if version is None else f"version {version} is pinned"
    when = f"at their next poll, within {settings.poll_seconds:g} s"
    terminal.say(f"{name}: {what}; services that read {settings.checkpoints} follow {when}")
    if version is not None:
        terminal.say(f"to follow the latest version again: dropserve pin {name} latest")


def _fixed(settings: Settings, name: str) -> int | None:
    """Return the version of the model that the settings want to answer, if they do."""
    return settings.default_version if settings.default_model in (None, name) else None


def _answering(settings: Settings, name: str) -> int:
    """Return the version that answers where services find what this process finds.

    Raises:
        Refused: there is none.
    """
    catalogue.choose(settings.checkpoints, name)
    wanted = _fixed(settings, name) or catalogue.pinned(settings.checkpoints, name)
    there = catalogue.versions(settings.checkpoints, name)
    in_turn = sorted(there, key=lambda v: (v != wanted, -v))
    found = _first_that_loads(settings, name, in_turn)
    if found is None:
        raise Refused(f"{name}: no version can be served; nothing was changed")
    return found


def _first_that_loads(settings: Settings, name: str, versions: Iterable[int]) -> int | None:
    """Load versions as the service does until one can be served; say what is wrong with others."""
    from dropserve.service.inference.model_store import CheckpointFolder

    allow_local_modules()
    load = CheckpointFolder(settings).load
    for version in versions:
        try:
            load(name, version)
        except Exception as error:  # code that the version names may raise anything
            typer.echo(f"version {version} is not served: {error}", err=True)
        else:
            return version
    return None
