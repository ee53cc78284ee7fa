"""The command line: training and serving, and asking a running service.

PyTorch is imported by the commands that need it, so that the others start at once.
"""

import errno
import logging
import platform
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version as version_of
from typing import Annotated, Any

import httpx
import typer
from pydantic import ValidationError
from rich.table import Table
from typer.core import TyperGroup, TyperOption

from dropserve.lab import cli as lab
from dropserve.models.errors import ModelsError
from dropserve.service.cli import ask, options, score, terminal, train, versions, watch
from dropserve.service.cli.options import Opt
from dropserve.service.cli.terminal import Refused
from dropserve.service.client import DropserveClient
from dropserve.service.errors import DropserveError, ModelStoreError, RequestError
from dropserve.service.settings import Settings, environment_name

_WRONG = (
    Refused, RequestError, ModelsError, ModelStoreError,
    FileNotFoundError, IsADirectoryError, PermissionError,
)  # fmt: skip
"""Errors that the user of the command can fix: exit code 2."""


class Group(TyperGroup):
    """All commands: their flags show no type in the help; errors are lines on stderr."""

    def get_params(self, ctx: Any) -> Any:  # noqa: ANN401  Typer does not export its types
        """Return the options of the group itself."""
        return _untyped(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401  likewise
        """Return a command by its name, if there is one."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and ctx is not None:
            for each in (command, *getattr(command, "commands", {}).values()):
                _untyped(each.get_params(ctx))
        return command

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  likewise
        """Run a command; expected errors become lines on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if not isinstance(error.__cause__, ValidationError) or error.param is None:
                raise
            reason = "; ".join(map(options.plain, error.__cause__.errors()))
            typer.echo(f"error: {' / '.join(error.param.opts)}: {reason}", err=True)
            raise typer.Exit(2) from error
        except BrokenPipeError:  # the reader has left; Typer exits silently
            raise
        except (*_WRONG, DropserveError, OSError) as error:
            typer.echo(f"error: {terminal.one_line(error)}", err=True)
            for note in getattr(error, "__notes__", ()):
                typer.echo(note, err=True)
            raise typer.Exit(2 if isinstance(error, _WRONG) else 1) from error


def _untyped(parameters: Sequence[Any]) -> Sequence[Any]:
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and parameter.is_flag:
            parameter.metavar = ""
    return parameters


def _show_version(wanted: bool) -> None:
    if wanted:
        python, torch = platform.python_version(), version_of("torch")
        terminal.say(f"dropserve {version_of('dropserve')} (Python {python}, PyTorch {torch})")
        raise typer.Exit


def main(
    _: Annotated[
        bool, Opt("--version", is_eager=True, callback=_show_version, help="Print the release.")
    ] = False,
) -> None:
    """Train image classifiers with dropout, and serve predictions that say how sure they are."""


def serve(
    checkpoints: options.Checkpoints = None,
    host: Annotated[str | None, Opt(help="Address to listen on (DROPSERVE_HOST).")] = None,
    port: Annotated[int | None, Opt(help="Port to listen on (DROPSERVE_PORT).")] = None,
    workers: Annotated[int | None, Opt(help="Server processes (DROPSERVE_WORKERS).")] = None,
) -> None:
    """Serve the saved models over HTTP, until SIGTERM or Ctrl-C."""
    settings = options.read_settings(checkpoints=checkpoints, host=host, port=port, workers=workers)
    check_free(settings.host, settings.port)
    if sys.stderr.isatty() and settings.port:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # log requests received, not sent
        threading.Thread(target=_announce, args=(settings.url,), daemon=True).start()

    from dropserve.service import server

    options.allow_local_modules()
    server.serve(settings)


def check_free(host: str, port: int) -> None:
    """Refuse a port that another program listens on, before the models are loaded."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise Refused(f"no address to listen on is called {host}: {error.strerror}") from error
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except PermissionError as error:
            raise PermissionError(error.errno, error.strerror, f"{host}:{port}") from error
        except OSError as error:  # the server reports other errors itself
            if error.errno == errno.EADDRINUSE:
                raise Refused(
                    f"{host}:{port} is in use by another program: stop it, or choose another port "
                    f"with --port"
                ) from error


def _announce(url: str) -> None:
    own = httpx.HTTPTransport(verify=False)  # of this process; the certificate is for its name
    with DropserveClient(url, timeout=1.0, transport=own) as client:
        while True:
            with suppress(DropserveError):
                models = client.readiness().models
                break
            time.sleep(0.1)
    otherwise = {True: "(on request)", False: "(refused)"}
    served = ", ".join(
        f"{n} {m.version or otherwise[m.on_request != []]}" for n, m in models.items()
    )
    typer.echo(f"ready: {url} serves {served}; Ctrl-C stops it", err=True)


def settings(as_json: options.AsJson = False) -> None:
    """List the settings (environment variables): meaning and current value."""
    values = options.read_settings().model_dump(mode="json")
    defaults = Settings.model_construct().model_dump(mode="json")  # reads no environment
    table = Table()
    table.add_column("variable", no_wrap=True)
    for heading in ("default", "now", "meaning"):
        table.add_column(heading, overflow="fold")
    rows = []
    for name, field in Settings.model_fields.items():
        row = {"variable": environment_name(name), "default": defaults[name]}
        rows.append(row | {"value": values[name], "meaning": field.description})
        table.add_row(*map(_cell, rows[-1].values()))
    if as_json:
        terminal.print_json(rows)
    else:
        terminal.console().print(table)


def _cell(value: object) -> str:
    if value in (None, [], ""):
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False)
app.callback()(main)
app.command(cls=train.TrainCommand)(train.train)
app.command("import")(train.import_)
for command in (
    train.evaluate, train.convert, serve, settings,
    ask.predict, ask.uncertainty, ask.models, score.score, watch.watch,
    versions.manifest, versions.pin, versions.rollback, versions.prune,
):  # fmt: skip
    app.command()(command)
app.add_typer(lab.app, name="lab")

if __name__ == "__main__":
    app()
