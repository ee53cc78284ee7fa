"""Parses the options of a task from a request's path and query."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from pydantic import ValidationError

from dropserve.service.errors import InvalidRequest
from dropserve.service.inference.classifier import Compare, Predict, Stream, Task, Uncertainty
from dropserve.service.schemas import (
    CompareOptions,
    ImageOptions,
    PredictOptions,
    SamplingOptions,
    UncertaintyOptions,
)

OPTIONS: Mapping[str, type[ImageOptions]] = {
    "predict": PredictOptions,
    "uncertainty": UncertaintyOptions,
    "uncertainty/stream": SamplingOptions,
    "compare": CompareOptions,
}
"""The options of each action: what a path ends with."""
MODEL = "/v1/models/{name}"
VERSION = MODEL + "/versions/{version}"
PATHS = re.compile(
    r"(?:/v1/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?)?/(?P<action>"
    + "|".join(OPTIONS)
    + ")"
)
"""Paths of the task routes, whole."""
TIMEOUT = "X-Request-Timeout"
"""Header of a request: seconds that it may wait."""
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def action_of(target: bytes) -> str | None:
    """Return the action that a request's target, path and query, asks for; None: another route."""
    found = _task_path(target)
    return found and found["action"]


def route_of(method: str | None, target: bytes) -> str | None:
    """Return the task route that a request asks for, as it is declared; None: another route."""
    found = _task_path(target) if method == "POST" else None
    return found and route_template(found["name"], found["version"], found["action"])


def _task_path(target: bytes) -> re.Match[str] | None:
    return PATHS.fullmatch(target.partition(b"?")[0].decode("latin-1"))


def route_template(name: str | None, version: str | None, action: str) -> str:
    """Return the path of a task route as it is declared."""
    prefix = "" if name is None else MODEL if version is None else VERSION
    return f"{prefix}/{action}"


@dataclass(frozen=True)
class ParsedOptions:
    """The options of a query.

    Attributes:
        task: what to do.
        head: what the answer repeats.
        scale: value of white; None: not given.
    """

    task: Task
    head: Mapping[str, Any]
    scale: int | None


def read_options(action: str, query: bytes, max_samples: int) -> ParsedOptions:
    """Read the options of an action from a query; the last few are cached, if they are short.

    Raises:
        InvalidRequest: says which is wrong and what is allowed, and nothing of what was sent.
    """
    return (_cached if len(query) <= 256 else _parse)(action, query, max_samples)


def _parse(action: str, query: bytes, max_samples: int) -> ParsedOptions:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    sent = dict(pairs)
    if len(sent) < len(pairs):
        raise InvalidRequest("a parameter is given twice")
    try:
        options = OPTIONS[action].model_validate(sent)
    except ValidationError as error:
        raise invalid(error) from None
    scale = options.scale if "scale" in sent else None
    given = options.model_dump(exclude={"scale"})
    if isinstance(options, SamplingOptions):
        given["samples"] = limit_samples(options, max_samples)
        head = {"method": "dropout", **{n: given[n] for n in ("samples", "seed", "masks")}}
        sampling = Uncertainty if isinstance(options, UncertaintyOptions) else Stream
        return ParsedOptions(sampling(**given), {**head, "log_base": "e"}, scale)
    if isinstance(options, CompareOptions):
        head = {name: value for name, value in given.items() if value is not None}
        return ParsedOptions(Compare(**given), head, scale)
    if isinstance(options, PredictOptions):
        return ParsedOptions(Predict(), {}, scale)
    raise TypeError(f"{action}: no task is made of its options")


_cached = lru_cache(256)(_parse)


def read_timeout(values: Sequence[str], most: float) -> float:
    """Return the seconds that a request may wait: what its header says, or `most` if that is less.

    Raises:
        InvalidRequest: the header's values are not one positive decimal number.
    """
    if not values:
        return most
    seconds = float(values[0]) if len(values) == 1 and _SECONDS.fullmatch(values[0]) else 0.0
    if not seconds > 0:
        raise InvalidRequest(f"{TIMEOUT}: must be one positive decimal number of seconds")
    return min(seconds, most)


def limit_samples(options: SamplingOptions, max_samples: int) -> int:
    """Return how many samples to draw: the default is lowered to the limit, a request is not.

    Raises:
        InvalidRequest: more are asked for than allowed.
    """
    if "samples" in options.model_fields_set and options.samples > max_samples:
        raise InvalidRequest(f"samples: at most {max_samples} here")
    return min(options.samples, max_samples)


def invalid(error: ValidationError) -> InvalidRequest:
    """Say what pydantic found wrong, once each, and nothing of what was sent."""
    return InvalidRequest("; ".join(sorted(set(map(_describe, error.errors())))))


def _describe(error: Mapping[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {error['msg']}" if where else error["msg"]
