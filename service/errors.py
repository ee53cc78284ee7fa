"""Everything that goes wrong on purpose between a client and the service, on either side.

    DropserveError
    ├── RequestError              the request cannot be answered
    │   ├── MalformedRequest      400
    │   ├── Unauthorized          401, with WWW-Authenticate
    │   ├── Forbidden             403
    │   ├── NotFound              404
    │   ├── RequestTimeout        408
    │   ├── TooLarge              413
    │   ├── UriTooLong            414
    │   ├── UnsupportedMediaType  415
    │   ├── InvalidRequest        422
    │   └── HeadTooLarge          431
    ├── TooManyRequests           429, with Retry-After
    ├── Overloaded                503, with Retry-After
    ├── ServerError               any other status
    └── Unreachable               no answer at all; on the client's side only

The service raises them, `http/request_log.py` turns them into responses, and the client raises the
same ones from what it reads. Messages never repeat what was sent, but for the name of an unknown
parameter.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from math import ceil
from typing import ClassVar, Literal

OverloadReason = Literal[
    "queue",  # the batcher's is full (inference.py)
    "wait",  # it would take too long to start (inference.py)
    "timeout",  # it has not started within its time
    "memory",  # there was none for this request (http/request_log.py)
    "decode",  # too many images wait to be decoded
    "streams",  # too many at once
    "connections",  # more than the cap (http/connection.py)
    "body_memory",  # bodies of other requests take all of it (http/body.py)
    "draining",  # the time for open requests at shutdown is over (http/request_log.py)
    "no_model",  # none is served (http/common.py)
    "hung",  # the inference thread is dead or does not go on; of probes alone (http/common.py)
    "loading",  # the model is not in memory yet (model_store.py)
    "workers",  # others have not followed a load or unload yet (model_store.py)
]
"""Why a request was answered 503: a label of the metric, and a field of the log."""


class DropserveError(Exception):
    """The root. `str(error)` is the detail.

    Attributes:
        status: the HTTP status that it is sent with.
        headers: HTTP headers to send along.
        request_id: of the request that failed, on the client's side.
    """

    status: ClassVar[int] = 500

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.headers = headers or {}
        self.request_id: str | None = None


class RequestError(DropserveError):
    """The request cannot be answered; sending it again would not help."""

    status = 400


class MalformedRequest(RequestError):
    """The request breaks the rules of HTTP, of its format, or has no body."""


class Unauthorized(RequestError):
    """No credentials came, or wrong ones."""

    status = 401

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail, headers=headers or {"WWW-Authenticate": "Bearer"})


class Forbidden(RequestError):
    """The deployer has not allowed this."""

    status = 403


class NotFound(RequestError):
    """There is no such route, model or version."""

    status = 404


class RequestTimeout(RequestError):
    """The request did not arrive in time."""

    status = 408


class TooLarge(RequestError):
    """The body, or the image in it, is larger than the service accepts."""

    status = 413


class UriTooLong(RequestError):
    """The path and the query are longer than the service reads."""

    status = 414


class UnsupportedMediaType(RequestError):
    """The body is in a format that the service does not read."""

    status = 415


class InvalidRequest(RequestError):
    """The format is right and a value is not: an undecodable image, an option out of range."""

    status = 422


class HeadTooLarge(RequestError):
    """The header fields are larger, or more, than the service reads."""

    status = 431


class TooManyRequests(DropserveError):
    """The API key has reached one of its limits; try again after `Retry-After` seconds."""

    status = 429

    def __init__(self, detail: str, seconds: int = 1) -> None:
        super().__init__(detail, headers={"Retry-After": str(seconds)})


class Overloaded(DropserveError):
    """The service has no capacity for the request now; try again after `Retry-After` seconds.

    `wait` is when there may be capacity, in seconds.

    Attributes:
        reason: which limit was reached; None on the client's side.
    """

    status = 503

    def __init__(
        self, detail: str, reason: OverloadReason | None = None, wait: float = 1.0
    ) -> None:
        super().__init__(detail, headers={"Retry-After": str(max(1, ceil(wait)))})
        self.reason = reason


def stopping() -> Overloaded:
    """Make the error of what comes while the service stops, or is not done in its drain."""
    return Overloaded("the service is stopping", "draining")


class ServerError(DropserveError):
    """The service failed; its log says why, under the request's id."""


class Unreachable(DropserveError):
    """No answer came: nothing listens there, or the connection broke."""


class ModelStoreError(Exception):
    """There is nothing to serve at the start, or nothing to serve by default."""


@dataclass(slots=True, eq=False)
class AboutImage:
    """Says which image of several an error of the block is about, counted from 0."""

    image: int
    images: int

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Change the error's detail."""
        if isinstance(error, RequestError) and self.images > 1:
            error.args = (f"image {self.image}: {error}",)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End a message about an unknown name with the closest known one, if one is close."""
    lower = {each.lower(): each for each in known}
    close = get_close_matches(name[:100].lower(), lower, 1)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def error_for(status: int, detail: str) -> DropserveError:
    """Make the error that a response of this status stands for."""
    refused = RequestError.__subclasses__()
    kinds: tuple[type[DropserveError], ...] = (*refused, TooManyRequests, Overloaded)
    for kind in kinds:
        if kind.status == status:
            return kind(detail)
    return RequestError(detail) if 400 <= status < 500 else ServerError(detail)
