"""What the commands of the command line have in common: options, settings, and how they fail."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service.commands.terminal import Refused
from service.settings import Settings, environment_name

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
            ": ".join(
                [
                    *(environment_name(str(field)) for field in e["loc"][:1]),
                    e["msg"].removeprefix("Value error, "),
                ]
            )
            for e in error.errors()
        )
        raise Refused("; ".join(wrong)) from error


def allow_local_modules() -> None:
    """Let package.module:factory name a file in the current folder, as `python -m` does."""
    if "" not in sys.path:
        sys.path.insert(0, "")
