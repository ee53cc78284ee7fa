"""Structured logs: one JSON object per line, on standard output."""

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

FIELDS = "fields"  # attribute of a record with its own fields: `extra={FIELDS: {...}}`
_context: ContextVar[Mapping[str, object] | None] = ContextVar("_context", default=None)


@contextmanager
def context(**fields: object) -> Iterator[None]:
    """Add fields to every line that this thread logs inside the block, warnings included."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, logger, message, its own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
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
    """Log this process as lines of JSON, uvicorn and the warnings of Python and PyTorch too."""
    logging.config.dictConfig(config(level))
    warnings.showwarning = _log_warning
    # Pillow's warnings about damaged metadata vary in their text: they would pile up
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,  # noqa: ARG001  with `line`, what Python passes
    line: str | None = None,  # noqa: ARG001
) -> None:
    fields = {"kind": category.__name__, "where": f"{filename}:{lineno}"}
    logging.getLogger("py.warnings").warning(str(message), extra={FIELDS: fields})


def config(level: str) -> dict[str, Any]:
    """Return the `logging.config.dictConfig`."""
    stream = {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stdout": stream},
        "loggers": {"python_multipart": {"level": "ERROR"}},  # it warns of each bad request
        "root": {"handlers": ["stdout"], "level": level.upper()},
    }
