"""What commands share: options, settings, and how they find a running service and its models."""

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from dropserve.models.bucket import open_repository
from dropserve.models.repository import Repository
from dropserve.service.cli.terminal import Refused
from dropserve.service.client import DropserveClient, base_url, credentials
from dropserve.service.errors import DropserveError, NotFound
from dropserve.service.schemas import MAX_SAMPLES, ModelDetails
from dropserve.service.settings import Settings, environment_name


def find_service(url: str | None, port: int | None) -> dict[str, Any]:
    """Return a client's `url` and `api_key`: as the options say, else as the settings say."""
    if url is not None and port is not None:
        raise Refused("--port is of a service on this machine: give it or --url")
    settings = read_settings(port=port)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        credentials(key)
    except ValueError as error:
        raise Refused(f"DROPSERVE_API_KEY: {error}") from error
    return {"url": url or settings.url, "api_key": key}


def find_model(client: DropserveClient, name: str | None, version: int | None) -> ModelDetails:
    """Look up a model of the service: its default one where no name is given."""
    if version is not None and not name:
        raise Refused("--version is of a model: give --model as well")
    if not name:
        served = client.models().models
        name = next((model.name for model in served if model.default), None)
        if name is None:
            there = ", ".join(model.name for model in served)
            raise Refused(f"give --model: there are {there or 'none'}")
    try:
        return client.model(name, version)
    except NotFound as error:
        raise Refused(f"{error}; /readyz says what was refused") from error


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a model by asking the service, if it runs."""
    with suppress(DropserveError, Refused):
        service = find_service(context.params.get("url"), context.params.get("port"))
        with DropserveClient(**service, retries=0, timeout=1.0) as client:
            return [m.name for m in client.models().models if m.name.startswith(incomplete)]
    return []


def read_settings(**given: object) -> Settings:
    """Read the settings, or refuse those that are invalid; options win over the environment."""
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    try:
        return Settings(**options)
    except ValidationError as error:
        wrong = [
            ": ".join([*(environment_name(str(field)) for field in e["loc"][:1]), plain(e)])
            for e in error.errors()
        ]
        raise Refused("; ".join(wrong)) from error


def repository(settings: Settings) -> Repository:
    """Open the checkpoints."""
    return open_repository(settings.checkpoints, settings.cache, settings.cache_bytes)


def plain(error: Mapping[str, Any]) -> str:
    """Say what pydantic expects of a value, without repeating it: it may be a secret."""
    if error["type"] == "too_short":
        return f"must have at least {error['ctx']['min_length']} characters"
    message = re.sub("^(Input|String) should", "must", error["msg"])
    return message.removeprefix("Value error, ").partition(", unable to")[0]


def allow_local_modules() -> None:
    """Let package.module:factory name a file in the current folder, as `python -m` does."""
    if "" not in sys.path:
        sys.path.insert(0, "")


Opt = typer.Option
AsJson = Annotated[bool, Opt("--json", help="Print JSON.")]
Checkpoints = Annotated[
    str | None,
    Opt(metavar="PLACE", help="Models: a folder or s3://, gs://, az:// (DROPSERVE_CHECKPOINTS)."),
]
DataDir = Annotated[Path | None, Opt(help="Folder of datasets (DROPSERVE_DATA_DIR).")]
Url = Annotated[
    str | None,
    Opt(parser=base_url, metavar="URL", help="Service; default: DROPSERVE_HOST and _PORT."),
]
Port = Annotated[int | None, Opt(min=1, max=65535, metavar="N", help="Port of a local service.")]
Model = Annotated[str | None, Opt(help="Model, if not the default.", autocompletion=model_names)]
Version = Annotated[int | None, Opt(min=1, metavar="N", help="Version, if not the default.")]
Samples = Annotated[
    int, Opt(min=1, max=MAX_SAMPLES, metavar="T", help="Number of thinned networks.")
]
Seed = Annotated[int, Opt(min=0, metavar="N", help="Seed of the dropout masks.")]
