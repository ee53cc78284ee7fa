"""Commands that manage a model's versions: manifest, pin, rollback, prune.

They work on the checkpoints; services that read them follow at their next poll.
"""

from collections.abc import Iterable
from typing import Annotated

import typer

from dropserve.models import checkpoint
from dropserve.models.errors import CheckpointRefused
from dropserve.models.repository import Repository
from dropserve.service.cli.options import (
    Checkpoints,
    Opt,
    allow_local_modules,
    read_settings,
    repository,
)
from dropserve.service.cli.terminal import Refused, say
from dropserve.service.settings import Settings

Name = Annotated[str, typer.Argument(metavar="NAME", help="Model.")]


def manifest(
    name: Name,
    version: Annotated[int | None, Opt(min=1, metavar="N", help="Version; default: all.")] = None,
    checkpoints: Checkpoints = None,
) -> None:
    """Verify a model's versions, all or one, and write the manifest of those that have none."""
    models = repository(read_settings(checkpoints=checkpoints))
    chosen = models.choose(name, version)
    refused = []
    for number in [chosen] if version else models.versions(name):
        try:
            found, done = models.read(name, number), "verified"
            if found.manifest_sha256 is None:
                found, done = checkpoint.add_manifest(found), "manifest written"
            say(f"{name} {number}: {done}, SHA-256 of the manifest {found.manifest_sha256}")
        except CheckpointRefused as error:
            refused.append(str(error))
    if refused:
        raise Refused("; ".join(refused))


def pin(
    name: Name,
    version: Annotated[str, typer.Argument(metavar="N|latest", help="Version to answer.")],
    checkpoints: Checkpoints = None,
) -> None:
    """Pin the version of a model that answers; `latest` removes the pin."""
    if version != "latest" and not (version.isascii() and version.isdecimal()):
        raise Refused("give the number of a version, or latest")
    settings = read_settings(checkpoints=checkpoints)
    number = None if version == "latest" else int(version)
    models = repository(settings)
    models.choose(name, number)
    if number is not None:
        models.read(name, number)  # for its errors
    _pin(settings, models, name, number)


def rollback(name: Name, checkpoints: Checkpoints = None) -> None:
    """Pin the last version before the one that answers now that can be served."""
    settings = read_settings(checkpoints=checkpoints)
    models = repository(settings)
    now = _answering(settings, models, name)
    older = [v for v in models.versions(name) if v < now]
    before = _first_that_loads(settings, name, reversed(older))
    if before is None:
        raise Refused(f"{name}: version {now} answers, and none before it can be served")
    _pin(settings, models, name, before)
    say(f"version {now} answered until now")


def prune(
    name: Name,
    keep: Annotated[int, Opt(min=1, metavar="N", help="Newest versions that stay.")],
    dry_run: Annotated[bool, Opt("--dry-run", help="Only list what would be removed.")] = False,
    checkpoints: Checkpoints = None,
) -> None:
    """Remove a model's old versions; never the one that answers, nor one that is pinned."""
    settings = read_settings(checkpoints=checkpoints)
    models = repository(settings)
    models.choose(name)
    there = models.versions(name)
    kept = {*there[-keep:], models.pinned(name), _fixed(settings, name)}
    if not kept.issuperset(there):
        kept.add(_answering(settings, models, name))
    for version in sorted({*there} - kept):
        if dry_run or models.remove(name, version):
            say(f"{'would remove' if dry_run else 'removed'} {models.place(name, version)}")
            there.remove(version)
    say(f"{name}: {'would keep' if dry_run else 'has'} {', '.join(map(str, there))}")


def _pin(settings: Settings, models: Repository, name: str, version: int | None) -> None:
    if (fixed := _fixed(settings, name)) is not None:
        raise Refused(f"DROPSERVE_DEFAULT_VERSION is {fixed} and wins over a pin: change that")
    models.pin(name, version)
    what = "no version is pinned" if version is None else f"version {version} is pinned"
    when = f"at their next poll, within {settings.poll_seconds:g} s"
    say(f"{name}: {what}; services that read {settings.checkpoints} follow {when}")
    if version is not None:
        say(f"to follow the latest version again: dropserve pin {name} latest")


def _fixed(settings: Settings, name: str) -> int | None:
    return settings.default_version if settings.default_model in (None, name) else None


def _answering(settings: Settings, models: Repository, name: str) -> int:
    models.choose(name)
    wanted = _fixed(settings, name) or models.pinned(name)
    there = models.versions(name)
    found = _first_that_loads(settings, name, sorted(there, key=lambda v: (v != wanted, -v)))
    if found is None:
        raise Refused(f"{name}: no version can be served; nothing was changed")
    return found


def _first_that_loads(settings: Settings, name: str, versions: Iterable[int]) -> int | None:
    """Load versions as the service does until one can be served; print why others cannot."""
    from dropserve.service.inference.model_store import CheckpointSource

    allow_local_modules()
    load = CheckpointSource(settings).load
    for version in versions:
        try:
            load(name, version)
        except Exception as error:  # code that the version names may raise anything
            typer.echo(f"version {version} is not served: {error}", err=True)
        else:
            return version
    return None
