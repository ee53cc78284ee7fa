"""Runs the application under uvicorn."""

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import uvicorn
from pydantic import SecretStr

from dropserve.service.http.keys import Keys
from dropserve.service.inference.workers import StartupBarrier, shared_folder
from dropserve.service.observability import logs
from dropserve.service.settings import Settings, environment_name

if TYPE_CHECKING:
    from fastapi import FastAPI

_PATIENCE = 30
"""Seconds until a worker that does not answer its parent is replaced. Importing torch on a machine
that is busy takes longer than uvicorn's 5: workers were replaced for ever, and none began."""
_KEEP_ALIVE = 75
"""Seconds that a connection may rest: longer than clients and proxies let theirs (httpx 5, many
load balancers 60). Whoever asks must be who closes it, or a request crosses the closing."""


def serve(settings: Settings) -> None:
    """Load the models, then serve until SIGTERM or SIGINT; open requests are let finish.

    Raises:
        ModelStoreError: no model can be served, or not all that there is in a strict start. Nothing
            was listened on.
        ServerError: OpenTelemetry is not installed and should trace.
        OSError: nor are there API keys in the file that should have them.
    """
    logs.configure(settings.log_level)
    if settings.api_keys_file is not None:
        Keys(settings.api_keys_file)  # read for its errors: quicker than any model
    if settings.tracing:
        import dropserve.service.observability.tracing  # noqa: F401  read for its error, too
    options = uvicorn_options(settings)
    if settings.workers > 1:
        _serve_with_workers(settings, options)
        return
    from dropserve.service.app import create_app  # only now, as importing PyTorch may log warnings
    from dropserve.service.inference.inference import Inference

    app = create_app(settings, Inference(settings))
    server = uvicorn.Server(uvicorn.Config(app, **options))
    for stop in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains on these, then raises them again; by then the work is done: exit 0
        signal.signal(stop, lambda _signal, _frame: None)
    server.run()
    sys.exit(0 if server.started else 1)


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """Say how uvicorn is to run the application."""
    from dropserve.service.fastpath.connection import Connection  # loads torch

    return {
        "host": settings.host,
        "port": settings.port,
        "loop": "uvloop",
        "http": Connection if settings.fast_path and not settings.tracing else "httptools",
        "ws": "none",
        "access_log": False,
        "proxy_headers": False,  # who sent a request is neither used nor logged
        "log_config": None,
        "server_header": False,
        "timeout_worker_healthcheck": _PATIENCE,
        "timeout_keep_alive": _KEEP_ALIVE,
        "timeout_graceful_shutdown": settings.drain_seconds,
    }


def _serve_with_workers(settings: Settings, options: dict[str, Any]) -> None:
    """Run several processes, each with its own models and queue."""
    from dropserve.service.inference.inference import Inference

    inference = Inference(settings)  # checks the start: workers do not, see `Repository`
    inference.close()
    if inference.store.default is not None:  # one that starts later might find another
        settings = settings.model_copy(update={"default_model": inference.store.default})
    for name in settings.model_fields_set:
        os.environ[environment_name(name)] = _text(getattr(settings, name))
    with shared_folder():
        uvicorn.run(
            "dropserve.service.server:worker_app", factory=True, workers=settings.workers, **options
        )


def worker_app() -> "FastAPI":
    """Make the application of one of several processes, from the environment."""
    settings = Settings()
    logs.configure(settings.log_level)
    from dropserve.service.app import create_app

    return create_app(settings, line=StartupBarrier.of_this_worker(settings.workers))


def _text(value: object) -> str:
    """Write a setting as its environment variable has it."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return ",".join(value) if isinstance(value, tuple) else str(value)
