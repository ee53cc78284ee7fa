"""Structured logs: one JSON object a line, on standard output."""

import logging
import time
from typing import Any

import orjson

FIELDS = "fields"
"""Name under which a record carries its structured fields: `extra={FIELDS: {...}}`."""


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
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


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
