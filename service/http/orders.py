"""What a request for a task asks for: read off its path and its query."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from pydantic import ValidationError

from dropserve.service.errors import InvalidRequest
from dropserve.service.http.front import invalid
from dropserve.service.inference.classifier import Compare, Predict, Stream, Task, Uncertainty
from dropserve.service.schemas import (
    CompareOptions,
    PredictOptions,
    SamplingOptions,
    UncertaintyOptions,
)

PATHS = re.compile(
    r"(?:/v1/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?)?"
    r"/(?P<task>predict|uncertainty(?:/stream)?|compare)"
)
_OPTIONS: Mapping[str, type[PredictOptions]] = {
    "predict": PredictOptions,
    "uncertainty": UncertaintyOptions,
    "uncertainty/stream": SamplingOptions,
    "compare": CompareOptions,
}
_REPEATED = ("samples", "seed", "masks")


@dataclass(frozen=True)
class ParsedOptions:
    """What a query asks for.

    Attributes:
        task: what to do.
        head: what the answer repeats of it.
        scale: the number that is white; None: it does not say.
    """

    task: Task
    head: Mapping[str, Any]
    scale: int | None


def template(name: str | None, version: str | None, kind: str) -> str:
    """Name the route as it was declared."""
    if name is None:
        return f"/{kind}"
    return "/v1/models/{name}" + ("/versions/{version}" if version else "") + f"/{kind}"


def read_options(kind: str, query: bytes, max_samples: int) -> ParsedOptions:
    """Do as `parse_options`; the last few queries are remembered, if they are short."""
    parse = _remembered if len(query) <= 256 else parse_options
    return parse(kind, query, max_samples)


def parse_options(kind: str, query: bytes, max_samples: int) -> ParsedOptions:
    """Read the options of a task.

    Args:
        kind: the task's name in a path.
        query: of the request.
        max_samples: that a request may ask for.

    Raises:
        InvalidRequest: says which is wrong and what is allowed, and nothing of what was sent.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    sent = dict(pairs)
    if len(sent) < len(pairs):
        raise InvalidRequest("a parameter is given twice")
    try:
        options = _OPTIONS[kind].model_validate(sent)
    except ValidationError as error:
        raise invalid(error) from None
    scale = options.scale if "scale" in sent else None
    given = options.model_dump(exclude={"scale"})
    if isinstance(options, SamplingOptions):
        given["samples"] = held_to(max_samples, options)
        head = {"method": "dropout", **{n: given[n] for n in _REPEATED}, "log_base": "e"}
        kind_of = Uncertainty if isinstance(options, UncertaintyOptions) else Stream
        return ParsedOptions(kind_of(**given), head, scale)
    if isinstance(options, CompareOptions):
        repeated = {n: value for n, value in given.items() if value is not None}
        return ParsedOptions(Compare(**given), repeated, scale)
    return ParsedOptions(Predict(), {}, scale)


def held_to(max_samples: int, options: SamplingOptions) -> int:
    """Return how many samples to draw: as many as may be where fewer may be than is usual.

    Raises:
        InvalidRequest: more are asked for than may be.
    """
    if "samples" in options.model_fields_set and options.samples > max_samples:
        raise InvalidRequest(f"samples: at most {max_samples} here")
    return min(options.samples, max_samples)


_remembered = lru_cache(256)(parse_options)
