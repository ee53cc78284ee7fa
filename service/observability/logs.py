"""Structured logs: one JSON object a line, on standard output."""

import json
import logging
import logging.config
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import orjson

FIELDS = "fields"
"""Name under which a record carries its structured fields: `extra={FIELDS: {...}}`."""

_context: ContextVar[Mapping[str, object] | None] = ContextVar("_context", default=None)
_warnings = logging.getLogger("py.warnings")


@contextmanager
def context(**fields: object) -> Iterator[None]:
    """Add fields to all that this thread logs and warns of inside the block."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, logger, message and the record's own fields."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(_context.get() or {}),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # text that is not Unicode, or a number of more than 64 bits
            return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Log this process in lines of JSON from now on, what Python and PyTorch warn of as well."""
    logging.config.dictConfig(config(level))
    warnings.showwarning = _log_warning
    # Pillow warns of damaged metadata, in words that vary with it: they would pile up
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,  # noqa: ARG001  with `line`, what Python passes
    line: str | None = None,  # noqa: ARG001
) -> None:
    where = f"{filename}:{lineno}"
    _warnings.warning(str(message), extra={FIELDS: {"kind": category.__name__, "where": where}})


def config(level: str) -> dict[str, Any]:
    """Return a `logging.config.dictConfig` that sends everything, uvicorn's too, through it."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {
            "stdout": {
                "class": "logging.StreamHandler",
                "formatter": "json",
                "stream": "ext://sys.stdout",
            }
        },
        "loggers": {"python_multipart": {"level": "ERROR"}},  # it warns of each bad request
        "root": {"handlers": ["stdout"], "level": level.upper()},
    }
