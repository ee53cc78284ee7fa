"""Runs the application under uvicorn: in this process, or in several.

`app.create_app` is an ASGI application for any server; without uvicorn there is no fast path.
"""

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import uvicorn
from pydantic import SecretStr

from dropserve.service import tls
from dropserve.service.http.keys import Keys
from dropserve.service.inference.workers import StartupBarrier, shared_folder
from dropserve.service.observability import logs
from dropserve.service.settings import Settings, environment_name
from dropserve.service.supervisor import Server, Supervisor

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(settings: Settings) -> None:
    """Load the models, then serve until SIGTERM or SIGINT; open requests are finished.

    A ModelStoreError (no model can be served, or not all in a strict start), a ConfigError (no such
    device), a ServerError (no OpenTelemetry) or an OSError (no API keys, no certificate) is raised
    before anything listens.
    """
    logs.configure(settings.log_level)
    if settings.api_keys_file is not None:
        Keys(settings.api_keys_file)  # for its errors, before the models are loaded
    tls.check(settings)
    if settings.tracing:
        import dropserve.service.observability.tracing  # noqa: F401  for its error, too
    from dropserve.service.inference.inference import (  # loads PyTorch, which may log
        Inference,
        only_to_check,
    )

    options = uvicorn_options(settings)
    _configure_collector()
    alone = settings.workers == 1
    inference = Inference(settings if alone else only_to_check(settings))
    if not alone:  # this was to check the start: the workers do not
        inference.close()
        if inference.store.default is not None:  # a worker that starts later might find another
            settings = settings.model_copy(update={"default_model": inference.store.default})
        for name in settings.model_fields_set:
            os.environ[environment_name(name)] = _as_text(getattr(settings, name))
        with shared_folder():
            sys.exit(_supervise(settings.workers, options))
    from dropserve.service.app import create_app

    server = Server(uvicorn.Config(create_app(settings, inference), **options))
    for stop in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains on these, then raises them again; by then the work is done: exit 0
        signal.signal(stop, signal.SIG_IGN)
    server.run()
    sys.exit(0 if server.started else 1)


def _supervise(workers: int, options: dict[str, Any]) -> int:
    """Run several workers on one port; return the exit status."""
    # keep_freed_memory() would come too late: a worker has threads before it loads models
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    app = "dropserve.service.server:worker_app"
    config = uvicorn.Config(app, factory=True, workers=workers, **options)
    return Supervisor(config, [config.bind_socket()]).run()


def worker_app() -> "FastAPI":
    """Make the application of one of several processes, from the environment."""
    settings = Settings()
    logs.configure(settings.log_level)
    from dropserve.service.app import create_app

    _configure_collector()
    return create_app(settings, barrier=StartupBarrier.of_this_worker(settings.workers))


def _configure_collector() -> None:
    """Have garbage collected less often: requests leave none that holds their bodies."""
    gc.freeze()  # a full collection of all that PyTorch's import made takes a tenth of a second
    gc.set_threshold(5_000)  # the objects of 32 requests in flight are more than the usual 700


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """Return how uvicorn is to run the application."""
    from dropserve.service.fastpath.uvicorn_protocol import FastPathProtocol
    from dropserve.service.http.connection import Connection

    fast = settings.fast_path and not settings.tracing  # spans are made by ASGI middleware
    return {
        "host": settings.host,
        "port": settings.port,
        "loop": "uvloop",
        "http": FastPathProtocol if fast else Connection,
        "ws": "none",
        "access_log": False,
        "proxy_headers": False,  # the client's address is neither used nor logged
        "log_config": None,
        "server_header": False,
        "headers": security_headers(settings),
        # the default is longer than clients and proxies keep theirs (httpx 5, many load balancers
        # 60): if the server closed a connection first, a request could cross the closing
        "timeout_keep_alive": settings.keep_alive,
        "timeout_graceful_shutdown": settings.drain_seconds,
        **tls.uvicorn_tls(settings),
    }


def security_headers(settings: Settings) -> list[tuple[str, str]]:
    """Return the headers of every response, whatever writes it; pages add policies of their own."""
    headers = [
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "frame-ancestors 'none'"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
    ]
    if not settings.cors_origins:
        headers.append(("Cross-Origin-Resource-Policy", "same-origin"))
    if settings.tls_cert is not None:
        headers.append(("Strict-Transport-Security", "max-age=31536000"))
    return headers


def _as_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return ",".join(value) if isinstance(value, tuple) else str(value)
