"""What the commands of the command line have in common: options, settings, and how they fail."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup, TyperOption

from dropserve.service.cli.terminal import Refused
from dropserve.service.client import DropserveClient
from dropserve.service.errors import did_you_mean
from dropserve.service.schemas import ModelDetails
from dropserve.service.settings import Settings, environment_name

Opt = typer.Option
AsJson = Annotated[bool, Opt("--json", help="Print JSON.")]
Checkpoints = Annotated[Path | None, Opt(help="Folder of models, or DROPSERVE_CHECKPOINTS.")]
DataDir = Annotated[Path | None, Opt(help="Folder of datasets, or DROPSERVE_DATA_DIR.")]
Version = Annotated[
    int | None, Opt(min=1, metavar="N", help="Of the model; the one that answers if left out.")
]
SavedVersion = Annotated[
    int | None, Opt(min=1, metavar="N", help="Of the model; the latest if left out.")
]

_WORDS = {
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "greater_than": "must be above {gt}",
    "less_than": "must be below {lt}",
    "literal_error": "must be {expected}",
    "too_short": "must have at least {min_length} characters",
}
"""What pydantic's errors are called here, by their type."""


class Group(TyperGroup):
    """All commands: their flags show no type, and values that are wrong are told in plain words."""

    def get_params(self, ctx: Any) -> Any:  # noqa: ANN401  Typer does not export its types
        """Return the options of the group itself."""
        return _untyped(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401  likewise
        """Return a command by its name, if there is one."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and ctx is not None:
            _untyped(command.get_params(ctx))
        return command

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  likewise
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if not isinstance(error.__cause__, ValidationError) or error.param is None:
                raise
            told = "; ".join(map(_plain, error.__cause__.errors()))
            typer.echo(f"error: {' / '.join(error.param.opts)}: {told}", err=True)
            raise typer.Exit(2) from error


def _untyped(parameters: Sequence[Any]) -> Sequence[Any]:
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and parameter.is_flag:
            parameter.metavar = ""
    return parameters


def read_settings(**given: object) -> Settings:
    """Read the settings; options that were given win over the environment.

    Raises:
        Refused: names each that is wrong, and what is wrong with it.
    """
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    try:
        return Settings(**options)
    except ValidationError as error:
        wrong = (
            ": ".join([*(environment_name(str(field)) for field in e["loc"][:1]), _plain(e)])
            for e in error.errors()
        )
        raise Refused("; ".join(wrong)) from error


def find_model(client: DropserveClient, name: str | None, version: int | None) -> ModelDetails:
    """Look up the model that is meant on a service: its default one where no name is given.

    Raises:
        Refused: there is none; says which there are.
        DropserveError: the service does not answer.
    """
    if version is not None and not name:
        raise Refused("--version is of a model: give --model as well")
    served = {model.name: model for model in client.models().models}
    there = f"there are {', '.join(served) or 'none'}"
    name = name or next((model.name for model in served.values() if model.default), None)
    if name is None:
        raise Refused(f"give --model: {there}")
    if name not in served:
        hint = did_you_mean(name, served) or "; /readyz says what was refused"
        raise Refused(f"no model {name!r} is served: {there}{hint}")
    if version not in (None, *(versions := served[name].versions)):
        there = f"there are {', '.join(map(str, versions))}"
        raise Refused(f"no version {version} of {name!r} is served: {there}")
    return client.model(name, version)


def allow_local_modules() -> None:
    """Let package.module:factory name a file in the current folder, as `python -m` does."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def _plain(error: Mapping[str, Any]) -> str:
    """Say what a value must be, without repeating it: it may be a secret."""
    if words := _WORDS.get(error["type"]):
        return words.format(**error.get("ctx", {}))
    return str(error["msg"]).removeprefix("Value error, ")
