"""A typed client of the service, synchronous and asynchronous. No torch, no NumPy, no FastAPI.

What to send, how to read the answer and whether to try again is decided in the lower half, which
does no I/O; the two clients only send and sleep.
"""

import asyncio
import functools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Generic, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from service import schemas
from service.errors import DropserveError, NotFound, ServerError, Unreachable, error_for

DEFAULT_URL = "http://127.0.0.1:8000"
Images = bytes | Path | Sequence[bytes | Path]
"""PNG, JPEG or WebP files: the bytes of each, or where it lies."""

_FIRST_BACKOFF = 0.1  # seconds; doubles with each retry

Answer = TypeVar("Answer", bound=BaseModel)


class Target(TypedDict, total=False):
    """Which model answers; left out: the service's default one, and its latest version."""

    model: str | None
    version: int | None


class Sampling(Target, total=False):
    """Meaning and defaults are those of `schemas.UncertaintyOptions`."""

    samples: int
    seed: int
    masks: schemas.MaskKind
    level: float
    include_samples: bool


class Comparing(Target, total=False):
    """Meaning and defaults are those of `schemas.CompareOptions`."""

    passes: int
    seed: int


class DropserveClient:
    """Talks to a running service.

    Methods raise a `service.errors.DropserveError`: `Unreachable` where no answer came, else the
    one that the answer's status stands for, with its `request_id`. An image given as a path is
    read at once, and raises `OSError` where it cannot be.

    Args:
        url: where the service listens.
        retries: how often a 503 is tried again, after `Retry-After` and a random back-off.
        max_wait: seconds to wait between tries in all; what would take longer is given up at once.
        timeout: seconds for a connection, and for each read and write.
        transport, sleep: what sends and what waits, for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 5,
        max_wait: float = 30.0,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        with _reaching(url):
            self._http = httpx.Client(base_url=url, timeout=timeout, transport=transport)
        self._url, self._retries, self._max_wait, self._sleep = url, retries, max_wait, sleep

    def predict(self, images: Images, **target: Unpack[Target]) -> schemas.PredictResponse:
        """Classify images in eval mode."""
        return self._answer(_post("predict", schemas.PredictResponse, images, target))

    def uncertainty(self, images: Images, **how: Unpack[Sampling]) -> schemas.UncertaintyResponse:
        """Classify images with many thinned networks: mean, variance, and where doubt is from."""
        return self._answer(_post("uncertainty", schemas.UncertaintyResponse, images, how))

    def compare(self, images: Images, **how: Unpack[Comparing]) -> schemas.CompareResponse:
        """Run images in eval mode and, `passes` times, in train mode."""
        return self._answer(_post("compare", schemas.CompareResponse, images, how))

    def models(self) -> schemas.ModelList:
        """List the models that are served."""
        return self._answer(_Call("GET", "/v1/models", schemas.ModelList))

    def model(self, name: str, version: int | None = None) -> schemas.ModelDetails:
        """Describe a model: its classes, input, dropout sites and evaluation."""
        return self._answer(_Call("GET", _path(name, version), schemas.ModelDetails))

    def ready(self) -> bool:
        """Say if the service is there and takes requests; where it is not is no error."""
        with suppress(httpx.RequestError):
            return self._http.get("/readyz").is_success
        return False

    def close(self) -> None:
        """Close the connections; leaving a `with` block does the same."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _answer(self, call: "_Call[Answer]") -> Answer:
        backoff = _Backoff(self._retries, self._max_wait)
        while True:
            with _reaching(self._url):
                response = self._http.send(call.request(self._http))
            if (delay := backoff.after(response)) is None:
                return call.parse(response)
            self._sleep(delay)


class AsyncDropserveClient:
    """`DropserveClient` for asyncio: the same arguments, methods, answers and errors."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 5,
        max_wait: float = 30.0,
        timeout: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        with _reaching(url):
            self._http = httpx.AsyncClient(base_url=url, timeout=timeout, transport=transport)
        self._url, self._retries, self._max_wait, self._sleep = url, retries, max_wait, sleep

    async def predict(self, images: Images, **target: Unpack[Target]) -> schemas.PredictResponse:
        """Classify images in eval mode."""
        return await self._answer(_post("predict", schemas.PredictResponse, images, target))

    async def uncertainty(
        self, images: Images, **how: Unpack[Sampling]
    ) -> schemas.UncertaintyResponse:
        """Classify images with many thinned networks: mean, variance, and where doubt is from."""
        return await self._answer(_post("uncertainty", schemas.UncertaintyResponse, images, how))

    async def compare(self, images: Images, **how: Unpack[Comparing]) -> schemas.CompareResponse:
        """Run images in eval mode and, `passes` times, in train mode."""
        return await self._answer(_post("compare", schemas.CompareResponse, images, how))

    async def models(self) -> schemas.ModelList:
        """List the models that are served."""
        return await self._answer(_Call("GET", "/v1/models", schemas.ModelList))

    async def model(self, name: str, version: int | None = None) -> schemas.ModelDetails:
        """Describe a model: its classes, input, dropout sites and evaluation."""
        return await self._answer(_Call("GET", _path(name, version), schemas.ModelDetails))

    async def ready(self) -> bool:
        """Say if the service is there and takes requests; where it is not is no error."""
        with suppress(httpx.RequestError):
            return (await self._http.get("/readyz")).is_success
        return False

    async def close(self) -> None:
        """Close the connections; leaving a `with` block does the same."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _answer(self, call: "_Call[Answer]") -> Answer:
        backoff = _Backoff(self._retries, self._max_wait)
        while True:
            with _reaching(self._url):
                response = await self._http.send(call.request(self._http))
            if (delay := backoff.after(response)) is None:
                return call.parse(response)
            await self._sleep(delay)


@dataclass(frozen=True)
class _Call(Generic[Answer]):
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


def _post(
    action: str, answer: type[Answer], images: Images, arguments: Mapping[str, object]
) -> _Call[Answer]:
    params = dict(arguments)
    path = _path(params.pop("model", None), params.pop("version", None), action)
    listed = [images] if isinstance(images, bytes | Path) else images
    if not listed or not all(isinstance(image, bytes | Path) for image in listed):
        raise ValueError("give at least one image, each as bytes or a pathlib.Path")
    read = tuple(x if isinstance(x, bytes) else x.read_bytes() for x in listed)
    return _Call("POST", path, answer, read, {k: str(v).lower() for k, v in params.items()})


def _path(model: object, version: object, action: str = "") -> str:
    if model is None and version is not None:
        raise ValueError("a version is one of a model: name the model as well")
    if not str(model).strip("."):
        raise NotFound("no model has an empty name, or one of dots alone")
    path = "" if model is None else f"/v1/models/{quote(str(model), safe='')}"
    path += "" if version is None else f"/versions/{version}"
    return f"{path}/{action}".rstrip("/")


def _content_type(image: bytes) -> str:
    """Name the format by its first bytes; what is not known is for the service to refuse."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "image/webp"
    if image.startswith(b"\x89PNG"):
        return "image/png"
    return "image/jpeg" if image.startswith(b"\xff\xd8\xff") else "application/octet-stream"


class _Backoff:
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
def _reaching(url: str) -> Iterator[None]:
    """Turn what httpx raises where no answer comes into `Unreachable`."""
    try:
        yield
    except (httpx.RequestError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(
            f"no answer from {url} ({reason}): is it running? `dropserve serve` starts it"
        ) from error
