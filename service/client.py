"""A typed client of the service, synchronous and asynchronous. It loads no torch, NumPy or FastAPI.

`Calls` describes each request and how its answer is read; both clients send what it describes.
Retries are made here: httpx-retries drops the proxies of the environment, tries again before
`Retry-After` has passed where `max_wait` is shorter, and sends all clients back at the same moment.
"""

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
)
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from dropserve.models.defaults import MaskKind
from dropserve.service import errors, schemas
from dropserve.service.schemas import EVENTS, StreamEvent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as PillowImage

Image: TypeAlias = "bytes | Path | NDArray[np.uint8] | PillowImage"
"""A PNG, JPEG or WebP file, as its bytes or its path; or pixels, which are sent as a PNG: a NumPy
array of uint8 from 0 to 255, H x W or H x W x C (C 1, 3 or 4), or a PIL image of 8 bits."""
Images: TypeAlias = "Image | Sequence[Image]"

DEFAULT_URL = "http://127.0.0.1:8000"
_KINDS = "a pathlib.Path, the bytes of a file, a NumPy array or a PIL image"
_FIRST_BACKOFF = 0.1  # seconds; doubles with each retry
_RETRIED = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

Answer = TypeVar("Answer")
Schema = TypeVar("Schema", bound=BaseModel)
P = ParamSpec("P")
Http = TypeVar("Http")
Transport = TypeVar("Transport")
Sleep = TypeVar("Sleep")


class Target(TypedDict, total=False):
    """Which model answers; left out: the service's default one, and the version that answers."""

    model: str | None
    version: int | None


class Streaming(Target, total=False):
    """Meaning and defaults are those of `schemas.UncertaintyOptions`."""

    samples: int
    seed: int
    masks: MaskKind
    level: float


class Sampling(Streaming, total=False):
    """As `Streaming`."""

    include_samples: bool


class Comparing(Target, total=False):
    """Meaning and defaults are those of `schemas.CompareOptions`."""

    passes: int
    seed: int
    p: float | None


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request, and how its answer is read; a 429 or 503 is tried again if `retried`.

    `body` are arguments of `httpx.Client.build_request`; None: it is a GET.
    """

    path: str
    read: Callable[[bytes], Answer]
    body: Mapping[str, Any] | None = None
    retried: bool = True

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Build the request."""
        return http.build_request("POST" if self.body else "GET", self.path, **self.body or {})

    def parse(self, response: httpx.Response) -> Answer:
        """Read the answer of a successful response."""
        return _parse(self.read, response.content, f"{response.url} did not answer")


class Calls:
    """What can be asked of the service: the methods of both clients."""

    @staticmethod
    def predict(images: Images, **target: Unpack[Target]) -> Call[schemas.PredictResponse]:
        """Classify images in eval mode."""
        return _post("predict", schemas.PredictResponse, images, target)

    @staticmethod
    def uncertainty(
        images: Images, **options: Unpack[Sampling]
    ) -> Call[schemas.UncertaintyResponse]:
        """Classify images with many thinned networks: mean, variance, sources of uncertainty."""
        return _post("uncertainty", schemas.UncertaintyResponse, images, options)

    @staticmethod
    def compare(images: Images, **options: Unpack[Comparing]) -> Call[schemas.CompareResponse]:
        """Run images in eval mode and, `passes` times, in train mode."""
        return _post("compare", schemas.CompareResponse, images, options)

    @staticmethod
    def models() -> Call[schemas.ModelList]:
        """List the models that are served."""
        return _get("/v1/models", schemas.ModelList)

    @staticmethod
    def model(name: str, version: int | None = None) -> Call[schemas.ModelDetails]:
        """Describe a model: its classes, input, dropout sites and evaluation."""
        return _get(_model_path(name, version), schemas.ModelDetails)

    @staticmethod
    def examples(name: str, version: int | None = None) -> Call[schemas.ExampleList]:
        """List the test images that are stored with a model."""
        return _get(_model_path(name, version, "examples"), schemas.ExampleList)

    @staticmethod
    def example(name: str, version: int, number: int) -> Call[bytes]:
        """Fetch one of a version's test images, counted from 0: a PNG that can be sent back."""
        return Call(_model_path(name, version, f"examples/{number}"), bytes)

    @staticmethod
    def metrics() -> Call[str]:
        """Fetch what Prometheus would, in its text format."""
        return Call("/metrics", bytes.decode)

    @staticmethod
    def readiness() -> Call[schemas.Readiness]:
        """Fetch which versions are ready and which are refused; a 503 is `Overloaded` at once."""
        return _get("/readyz", schemas.Readiness, retried=False)


def _get(path: str, schema: type[Schema], *, retried: bool = True) -> Call[Schema]:
    return Call(path, schema.model_validate_json, retried=retried)


def _stream(image: Image, options: Mapping[str, object]) -> Call[schemas.UncertaintyResponse]:
    if isinstance(image, Sequence) and not isinstance(image, bytes):
        raise ValueError(f"give one image: {_KINDS}")  # noqa: TRY004  as for none
    return _post("uncertainty/stream", schemas.UncertaintyResponse, image, options)


def _post(
    action: str, schema: type[Schema], images: Images, options: Mapping[str, object]
) -> Call[Schema]:
    """Describe a POST: one image is the body itself, several are parts of a form."""
    options = dict(options)
    path = _model_path(options.pop("model", None), options.pop("version", None), action)
    listed = [images] if isinstance(images, bytes) or not isinstance(images, Sequence) else images
    if not listed:
        raise ValueError(f"give at least one image: {_KINDS}")
    files = [(image := _file(x), _content_type(image)) for x in listed]
    body: dict[str, Any] = {
        "params": {k: str(v).lower() for k, v in options.items() if v is not None}
    }
    if len(files) == 1:
        body["content"], body["headers"] = files[0][0], {"Content-Type": files[0][1]}
    else:
        body["files"] = [("file", (f"image-{i}", *file)) for i, file in enumerate(files)]
    return Call(path, schema.model_validate_json, body)


def _model_path(model: object, version: object, action: str = "") -> str:
    if model is None and version is not None:
        raise ValueError("a version is one of a model: name the model as well")
    if not str(model).strip("."):
        raise errors.NotFound("no model has an empty name, or one of dots alone")
    path = "" if model is None else f"/v1/models/{quote(str(model), safe='')}"
    path += "" if version is None else f"/versions/{version}"
    return f"{path}/{action}".rstrip("/")


def _file(image: object) -> bytes:
    """Return the file of an image; a path that is of no image is refused by its name."""
    if isinstance(image, bytes):
        return image
    if hasattr(image, "getexif") or hasattr(image, "dtype"):
        return _png(image)
    if not isinstance(image, Path):
        raise ValueError(f"give at least one image: {_KINDS}")  # noqa: TRY004  as for none
    data = image.read_bytes()
    if not data:
        raise errors.MalformedRequest(f"{image}: an empty file")
    if _content_type(data) == "application/octet-stream":
        raise errors.UnsupportedMediaType(f"{image}: no PNG, JPEG or WebP image")
    return data


def _png(pixels: Any) -> bytes:  # noqa: ANN401  of NumPy or Pillow, which are not loaded here
    """Have Pillow write pixels as a PNG, turned as their EXIF says and without EXIF."""
    from PIL import Image, ImageOps

    if hasattr(pixels, "dtype"):
        channels = (*pixels.shape, 1)[2] if pixels.ndim in (2, 3) else 0
        if pixels.dtype != "uint8" or channels not in (1, 3, 4) or 0 in pixels.shape:
            raise ValueError(
                "an array of pixels must be uint8 from 0 to 255, H x W or H x W x C with C 1, 3 or "
                f"4 (several are a list), not {pixels.dtype} {' x '.join(map(str, pixels.shape))}"
            )
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    elif pixels.mode[0] in "IF":
        raise ValueError(f"an image of mode {pixels.mode} has no 8 bits a channel: convert it")
    else:
        image = ImageOps.exif_transpose(pixels)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.mode[-1] in "aA" else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG", exif=b"", compress_level=1)
    return file.getvalue()


def _content_type(image: bytes) -> str:
    """Name the format by its first bytes; the service refuses what is not known."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "image/webp"
    if image.startswith(b"\x89PNG"):
        return "image/png"
    return "image/jpeg" if image.startswith(b"\xff\xd8\xff") else "application/octet-stream"


class _Backoff:
    """Decides how long to wait after each response to one call."""

    def __init__(self, retries: int, max_wait: float) -> None:
        self._delays = [_FIRST_BACKOFF * 2.0**i for i in reversed(range(retries))]
        self._left = max_wait

    def after(self, response: httpx.Response) -> float:
        """Return the seconds to wait before the next try; where there is none, raise the error."""
        asked: str = response.headers.get("Retry-After", "")
        if response.status_code in _RETRIED and self._delays:
            jitter = random.uniform(0.5, 1)  # noqa: S311  so that clients do not return together
            delay = self._delays.pop() * jitter + (float(asked) if asked.isdecimal() else 0.0)
            self._left -= delay
            if self._left >= 0:
                return delay
        error = errors.error_for(
            response.status_code, f"{response.status_code} {response.reason_phrase}".strip()
        )
        error.request_id = response.headers.get("X-Request-ID")
        with suppress(ValidationError):  # of a proxy's page, perhaps
            problem = schemas.Problem.model_validate_json(response.content)
            error.args, error.request_id = (problem.detail,), problem.request_id
        error.headers = {"retry-after": asked} if asked else {}
        raise error


class _EventReader:
    """Splits a stream of server-sent events, which arrives in chunks of any size, into events."""

    def __init__(self) -> None:
        self._rest, self._ended = b"", False

    def feed(self, chunk: bytes) -> Iterator[StreamEvent]:
        """Yield the events that a chunk completes; raise the error that the service sent."""
        self._rest += chunk.replace(b"\r", b"")  # JSON has none of its own
        *whole, self._rest = self._rest.split(b"\n\n")
        for block in whole:
            fields = dict(line.split(b": ", 1) for line in block.splitlines() if b": " in line)
            kind, data = fields.get(b"event", b"").decode(), fields.get(b"data", b"")
            if kind == "error":
                read = schemas.Problem.model_validate_json
                problem = _parse(read, data, "the stream failed, and ended")
                error = errors.error_for(problem.status, problem.detail)
                error.request_id = problem.request_id
                raise error
            if kind in EVENTS:  # else a comment, or an event of a newer service
                event: Callable[[bytes], StreamEvent] = EVENTS[kind].model_validate_json
                yield _parse(event, data, "the stream did not continue")
                self._ended = kind == "end"

    def finish(self) -> None:
        """Raise `Unreachable` if the stream broke off before its last event."""
        if not self._ended:
            raise errors.Unreachable("the stream broke off: the service stopped, or a proxy cut it")


def _parse(read: Callable[[bytes], Answer], data: bytes, otherwise: str) -> Answer:
    try:
        return read(data)
    except (ValidationError, UnicodeDecodeError) as error:
        expected = error.title if isinstance(error, ValidationError) else "text"
        raise errors.ServerError(
            f"{otherwise} with a {expected}: is it Dropserve, of this version?"
        ) from error


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn what httpx raises where no answer comes into `Unreachable`."""
    try:
        yield
    except (httpx.RequestError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        remedy = "is it running? `dropserve serve` starts it"
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            remedy = "SSL_CERT_FILE can name the authority that signed its certificate"
        elif isinstance(error, httpx.RemoteProtocolError):
            remedy = "is it Dropserve, and is the scheme right, http or https?"
        raise errors.Unreachable(f"no answer from {url} ({reason}): {remedy}") from error


def base_url(url: str) -> str:
    """Return a service's address; a ValueError if it does not begin with http:// or https://."""
    scheme, separator, _ = url.partition("://")
    if not separator or "/" in scheme:
        raise ValueError(f"{url!r} has no scheme: did you mean http://{url}?")
    if scheme.lower() not in ("http", "https"):
        raise ValueError(f"{url!r} begins with {scheme}://, and not with http:// or https://")
    return url


def credentials(api_key: str | None) -> dict[str, str]:
    """Return the headers that carry a key; a ValueError, without the key, if none can."""
    if api_key is None:
        return {}
    if not api_key.isascii() or not api_key.isprintable() or api_key != api_key.strip():
        raise ValueError("an API key is printable ASCII, without spaces around it")
    return {"Authorization": f"Bearer {api_key}"}


def _sync(
    describe: Callable[P, Call[Answer]],
) -> "Callable[Concatenate[DropserveClient, P], Answer]":
    @wraps(describe)
    def method(self: "DropserveClient", /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        call = describe(*args, **kwargs)
        return call.parse(self._send(call))

    return method


def _async(
    describe: Callable[P, Call[Answer]],
) -> "Callable[Concatenate[AsyncDropserveClient, P], Awaitable[Answer]]":
    @wraps(describe)
    async def method(self: "AsyncDropserveClient", /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        call = describe(*args, **kwargs)
        return call.parse(await self._send(call))

    return method


class _Client(Generic[Http, Transport, Sleep]):
    _http_class: Callable[..., Http]

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        retries: int = 5,
        max_wait: float = 30.0,
        timeout: float = 60.0,
        api_key: str | None = None,
        transport: Transport | None = None,
        sleep: Sleep | None = None,
    ) -> None:
        options = {"base_url": base_url(url), "timeout": timeout, "headers": credentials(api_key)}
        with _reaching(url):
            self._http = self._http_class(transport=transport, **options)
        self._url, self._retries, self._max_wait, self._sleep = url, retries, max_wait, sleep


class DropserveClient(_Client[httpx.Client, httpx.BaseTransport, Callable[[float], object]]):
    """Talks to a running service; `with` closes its connections.

    Methods raise a `DropserveError`: `Unreachable` where no answer came, else the one that the
    answer's status stands for, with its `request_id`; `OSError` where a path cannot be read, and
    `ValueError` for what is no image and for a version without a model.

    Args:
        url: where the service listens, http:// or https://.
        retries: how often a 429 or 503 is tried again, after `Retry-After` and a random back-off.
        max_wait: seconds to wait between tries in all; a longer wait is given up at once.
        timeout: seconds for a connection, and for each read and write.
        api_key: one of the service's, where it asks for one.
        transport, sleep: what sends and what waits, for tests.
    """

    _http_class = httpx.Client
    predict = _sync(Calls.predict)
    uncertainty = _sync(Calls.uncertainty)
    compare = _sync(Calls.compare)
    models = _sync(Calls.models)
    model = _sync(Calls.model)
    examples = _sync(Calls.examples)
    example = _sync(Calls.example)
    metrics = _sync(Calls.metrics)
    readiness = _sync(Calls.readiness)

    def uncertainty_stream(
        self, image: Image, **options: Unpack[Streaming]
    ) -> Iterator[StreamEvent]:
        """Yield one image's thinned networks as they run: a start, the samples, an end.

        Leaving the loop over it early cancels the work.
        """
        reader, call = _EventReader(), _stream(image, options)
        with _reaching(self._url), closing(self._send(call, stream=True)) as response:
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)
        reader.finish()

    def ready(self) -> bool:
        """Say if the service is reachable and takes requests."""
        return self._succeeds("/readyz")

    def live(self) -> bool:
        """Say if the service is reachable."""
        return self._succeeds("/livez")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        backoff = _Backoff(self._retries if call.retried else 0, self._max_wait)
        while True:
            with _reaching(self._url):
                response = self._http.send(call.request(self._http), stream=stream)
                if response.is_success:
                    return response
                response.read()
            (self._sleep or time.sleep)(backoff.after(response))

    def _succeeds(self, path: str) -> bool:
        with suppress(httpx.RequestError):
            return self._http.get(path).is_success
        return False


class AsyncDropserveClient(
    _Client[httpx.AsyncClient, httpx.AsyncBaseTransport, Callable[[float], Awaitable[object]]]
):
    """`DropserveClient` for asyncio: the same arguments, methods, answers and errors."""

    _http_class = httpx.AsyncClient
    predict = _async(Calls.predict)
    uncertainty = _async(Calls.uncertainty)
    compare = _async(Calls.compare)
    models = _async(Calls.models)
    model = _async(Calls.model)
    examples = _async(Calls.examples)
    example = _async(Calls.example)
    metrics = _async(Calls.metrics)
    readiness = _async(Calls.readiness)

    async def uncertainty_stream(
        self, image: Image, **options: Unpack[Streaming]
    ) -> AsyncIterator[StreamEvent]:
        """Yield as `DropserveClient` does; `contextlib.aclosing` cancels the work early."""
        reader, call = _EventReader(), _stream(image, options)
        with _reaching(self._url):
            async with aclosing(await self._send(call, stream=True)) as response:
                async for chunk in response.aiter_bytes():
                    for event in reader.feed(chunk):
                        yield event
        reader.finish()

    async def ready(self) -> bool:
        """Say if the service is reachable and takes requests."""
        return await self._succeeds("/readyz")

    async def live(self) -> bool:
        """Say if the service is reachable."""
        return await self._succeeds("/livez")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        backoff = _Backoff(self._retries if call.retried else 0, self._max_wait)
        while True:
            with _reaching(self._url):
                response = await self._http.send(call.request(self._http), stream=stream)
                if response.is_success:
                    return response
                await response.aread()
            await (self._sleep or asyncio.sleep)(backoff.after(response))

    async def _succeeds(self, path: str) -> bool:
        with suppress(httpx.RequestError):
            return (await self._http.get(path)).is_success
        return False
