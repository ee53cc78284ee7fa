"""Where the service listens: is the place free, and a line for a person when it is there."""

import errno
import logging
import socket
import threading
import time
from contextlib import suppress

import typer

from dropserve.service.cli.terminal import Refused
from dropserve.service.client import DropserveClient
from dropserve.service.errors import DropserveError


def check_free(host: str, port: int) -> None:
    """Look, before the models are loaded, if another program listens there.

    Raises:
        Refused: one does, or there is no such address.
        PermissionError: ports below 1024 are not for everyone.
    """
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
        except OSError as error:  # what else may be wrong, the server says itself
            if error.errno == errno.EADDRINUSE:
                raise Refused(
                    f"{host}:{port} is in use by another program: stop it, or choose another port "
                    f"with --port"
                ) from error


def announce(url: str) -> None:
    """Print a line once the service answers there; returns at once."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the log is of requests that came
    threading.Thread(target=_wait, args=(url,), daemon=True).start()


def _wait(url: str) -> None:
    with DropserveClient(url, timeout=1.0) as client:
        while True:
            with suppress(DropserveError):
                models = client.readiness().models
                break
            time.sleep(0.1)
    served = ", ".join(f"{name} {m.version or '(refused)'}" for name, m in models.items())
    typer.echo(f"ready: {url} serves {served}; Ctrl-C stops it", err=True)
