"""What the clients send, how they read the answer, and whether they try again: no network I/O."""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from service import schemas
from service.errors import (
    DropserveError,
    MalformedRequest,
    NotFound,
    ServerError,
    Unreachable,
    UnsupportedMediaType,
    error_for,
)

Images = bytes | Path | Sequence[bytes | Path]
"""PNG, JPEG or WebP files: the bytes of each, or where it lies."""

_FIRST_BACKOFF = 0.1  # seconds; doubles with each retry

Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request, and what its answer is read as."""

    method: str
    path: str
    answer: type[Answer]
    images: tuple[bytes, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """One image is the body itself; several are parts of a form."""
        build = functools.partial(http.build_request, self.method, self.path, params=self.params)
        if len(self.images) == 1:
            headers = {"Content-Type": _content_type(self.images[0])}
            return build(content=self.images[0], headers=headers)
        files = [("file", (f"image-{i}", x, _content_type(x))) for i, x in enumerate(self.images)]
        return build(files=files or None)

    def parse(self, response: httpx.Response) -> Answer:
        """Read the answer, or raise the error that it stands for."""
        if not response.is_success:
            raise _error(response)
        try:
            return self.answer.model_validate_json(response.content)
        except ValidationError as error:
            expected = f"{response.url} did not answer with a {self.answer.__name__}"
            raise ServerError(f"{expected}: is it Dropserve, of this version?") from error


def post(
    action: str, answer: type[Answer], images: Images, arguments: Mapping[str, object]
) -> Call[Answer]:
    """Make the call that has images answered.

    Args:
        action: "predict", "uncertainty" or "compare".
        answer: schema of the response.
        images: one or several.
        arguments: `model`, `version` and the options of the action.

    Raises:
        RequestError: a file is no picture.
        ValueError: no image, or a version of no model.
    """
    params = dict(arguments)
    path = model_path(params.pop("model", None), params.pop("version", None), action)
    listed = [images] if isinstance(images, bytes | Path) else images
    if not listed or not all(isinstance(image, bytes | Path) for image in listed):
        raise ValueError("give at least one image, each as bytes or a pathlib.Path")
    read = tuple(x if isinstance(x, bytes) else _picture(x) for x in listed)
    return Call("POST", path, answer, read, {k: str(v).lower() for k, v in params.items()})


def model_path(model: object, version: object, action: str = "") -> str:
    """Name the route of a model, or of what it is asked to do.

    Raises:
        NotFound: no model can have that name.
        ValueError: a version of no model.
    """
    if model is None and version is not None:
        raise ValueError("a version is one of a model: name the model as well")
    if not str(model).strip("."):
        raise NotFound("no model has an empty name, or one of dots alone")
    path = "" if model is None else f"/v1/models/{quote(str(model), safe='')}"
    path += "" if version is None else f"/versions/{version}"
    return f"{path}/{action}".rstrip("/")


def _picture(path: Path) -> bytes:
    """Read a file; what is no picture is refused here, where its name is known."""
    data = path.read_bytes()
    if not data:
        raise MalformedRequest(f"{path}: an empty file")
    if _content_type(data) == "application/octet-stream":
        raise UnsupportedMediaType(f"{path}: no PNG, JPEG or WebP picture")
    return data


def _content_type(image: bytes) -> str:
    """Name the format by its first bytes; what is not known is for the service to refuse."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "image/webp"
    if image.startswith(b"\x89PNG"):
        return "image/png"
    return "image/jpeg" if image.startswith(b"\xff\xd8\xff") else "application/octet-stream"


class Backoff:
    """Decides how long to wait after each response to one call."""

    def __init__(self, retries: int, max_wait: float) -> None:
        self._delays = [_FIRST_BACKOFF * 2**i for i in reversed(range(retries))]
        self._left = max_wait

    def after(self, response: httpx.Response) -> float | None:
        """Return seconds to wait before the next try; None: it is not to be tried again."""
        if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE or not self._delays:
            return None
        asked = response.headers.get("Retry-After", "")
        jitter = random.uniform(0.5, 1)  # noqa: S311  so that clients do not return all at once
        delay = (float(asked) if asked.isdecimal() else 0.0) + self._delays.pop() * jitter
        self._left -= delay
        return delay if self._left >= 0 else None


def _error(response: httpx.Response) -> DropserveError:
    """Read a problem (RFC 9457); what is none, a proxy's page perhaps, goes by its status."""
    try:
        problem = schemas.Problem.model_validate_json(response.content)
        detail, request_id = problem.detail, problem.request_id
    except ValidationError:
        detail = f"{response.status_code} {response.reason_phrase}".strip()
        request_id = response.headers.get("X-Request-ID")
    error = error_for(response.status_code, detail)
    error.headers = {k: v for k, v in response.headers.items() if k == "retry-after"}
    error.request_id = request_id
    return error


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what httpx raises where no answer comes into `Unreachable`."""
    try:
        yield
    except (httpx.RequestError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(
            f"no answer from {url} ({reason}): is it running? `dropserve serve` starts it"
        ) from error
