"""What the clients send, how they read the answer, and whether they try again: no network I/O."""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from dropserve.service import schemas
from dropserve.service.errors import (
    DropserveError,
    MalformedRequest,
    NotFound,
    ServerError,
    Unreachable,
    UnsupportedMediaType,
    error_for,
)


@runtime_checkable
class _Array(Protocol):
    @property
    def dtype(self) -> object: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def tobytes(self) -> bytes: ...


@runtime_checkable
class _PillowImage(Protocol):
    @property
    def mode(self) -> str: ...
    @property
    def getexif(self) -> Callable[[], Any]: ...
    @property
    def convert(self) -> Callable[[str], Any]: ...
    @property
    def save(self) -> Callable[..., None]: ...


Image = bytes | Path | _Array | _PillowImage
"""A PNG, JPEG or WebP file, as its bytes or where it lies; or pixels, which are sent as a PNG: a
NumPy array of uint8 from 0 to 255, H x W or H x W x C (C 1, 3 or 4), or a PIL image of 8 bits."""

Images = Image | Sequence[Image]

_KINDS = "a pathlib.Path, the bytes of a file, a NumPy array or a PIL image"
_COLOURS = {1: 0, 3: 2, 4: 6}
"""PNG's colour type by the number of channels."""
_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA")
_ORIENTATION = 0x0112  # of EXIF
_FIRST_BACKOFF = 0.1  # seconds; doubles with each retry

Answer = TypeVar("Answer")
Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request, and how its answer is read.

    Attributes:
        read: makes the answer of the response's bytes.
        retried: whether a 503 is tried again.
        streamed: whether the answer is read as it comes, by an `EventReader`.
    """

    method: str
    path: str
    read: Callable[[bytes], Answer]
    images: tuple[bytes, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    retried: bool = True
    streamed: bool = False

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """One image is the body itself; several are parts of a form."""
        build = functools.partial(http.build_request, self.method, self.path, params=self.params)
        if len(self.images) == 1:
            headers = {"Content-Type": _content_type(self.images[0])}
            return build(content=self.images[0], headers=headers)
        files = [("file", (f"image-{i}", x, _content_type(x))) for i, x in enumerate(self.images)]
        return build(files=files or None)

    def parse(self, response: httpx.Response) -> Answer:
        """Read the answer of a response that is no error."""
        with _expecting(f"{response.url} did not answer"):
            return self.read(response.content)


def get(path: str, answer: type[Schema], *, retried: bool = True) -> Call[Schema]:
    """Make the call that reads a route."""
    return Call("GET", path, answer.model_validate_json, retried=retried)


def get_text(path: str) -> Call[str]:
    """Make the call that reads a route's text."""
    return Call("GET", path, bytes.decode)


def get_bytes(path: str) -> Call[bytes]:
    """Make the call that reads a route's bytes."""
    return Call("GET", path, bytes)


def stream(image: Image, arguments: Mapping[str, object]) -> Call[bytes]:
    """Make the call that has one image answered sample by sample; raises what `post()` does."""
    if not isinstance(image, Image):
        raise ValueError(f"give one image: {_KINDS}")  # noqa: TRY004  as post()
    path, images, params = _posted("uncertainty/stream", image, arguments)
    return Call("POST", path, bytes, images, params, streamed=True)


def post(
    action: str, answer: type[Schema], images: Images, arguments: Mapping[str, object]
) -> Call[Schema]:
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
    path, read, params = _posted(action, images, arguments)
    return Call("POST", path, answer.model_validate_json, read, params)


def _posted(
    action: str, images: Images, arguments: Mapping[str, object]
) -> tuple[str, tuple[bytes, ...], dict[str, str]]:
    """Return path, images and query of a call; an option that is None is left to the service."""
    params = dict(arguments)
    path = model_path(params.pop("model", None), params.pop("version", None), action)
    listed = [images] if isinstance(images, Image) else images
    if not listed or not all(isinstance(image, Image) for image in listed):
        raise ValueError(f"give at least one image: {_KINDS}")
    read = tuple(map(_file, listed))
    return path, read, {k: str(v).lower() for k, v in params.items() if v is not None}


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


def _file(image: Image) -> bytes:
    """Return the file of an image, of whatever kind.

    Raises:
        RequestError, OSError: a path is of no image.
        ValueError: pixels are of another type or shape.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Path):
        return _picture(image)
    return _png(image) if isinstance(image, _Array) else _saved(image)


def _png(array: _Array) -> bytes:
    """Write pixels as a PNG (RFC 2083): what Pillow would do, without Pillow."""
    height, width, channels = (*array.shape, 1)[:3] if len(array.shape) in (2, 3) else (0, 0, 0)
    if str(array.dtype) != "uint8" or channels not in _COLOURS or 0 in (height, width):
        raise ValueError(
            f"an array of pixels must be uint8 from 0 to 255, H x W or H x W x C with C 1, 3 or 4 "
            f"(several are a list), not {array.dtype} {' x '.join(map(str, array.shape))}"
        )
    raw, row = array.tobytes(), width * channels
    lines = b"".join(b"\0" + raw[i : i + row] for i in range(0, len(raw), row))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _saved(image: _PillowImage) -> bytes:
    """Have Pillow write an image as a PNG, with its orientation and nothing else of its EXIF."""
    if image.mode[0] in "IF":
        raise ValueError(f"an image of mode {image.mode} has no 8 bits a channel: convert it first")
    known = image.getexif()
    exif = type(known)()
    if _ORIENTATION in known:
        exif[_ORIENTATION] = known[_ORIENTATION]
    other = "RGBA" if image.mode[-1] in "aA" else "RGB"
    drawn = image if image.mode in _OF_PNG else image.convert(other)
    file = io.BytesIO()
    drawn.save(file, "PNG", exif=exif, compress_level=1)
    return file.getvalue()


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


class EventReader:
    """Cuts a stream of server-sent events, which comes in pieces of any size, into events."""

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    def feed(self, piece: bytes) -> Iterator[schemas.StreamEvent]:
        """Yield the events that a piece completes.

        Raises:
            DropserveError: the service said, in the stream, what went wrong.
        """
        self._rest += piece.replace(b"\r", b"")  # JSON has none of its own
        *whole, self._rest = self._rest.split(b"\n\n")
        for block in whole:
            fields = dict(line.split(b": ", 1) for line in block.splitlines() if b": " in line)
            kind, data = fields.get(b"event", b"").decode(), fields.get(b"data", b"")
            if kind == "error":
                raise _stated(data)
            if kind in schemas.EVENTS:  # else a comment, or an event of a newer service
                with _expecting("the stream did not go on"):
                    yield schemas.EVENTS[kind].model_validate_json(data)
                self._ended = kind == "end"

    def finish(self) -> None:
        """Raise `Unreachable` if the stream broke off before its last event."""
        if not self._ended:
            raise Unreachable("the stream broke off: the service stopped, or a proxy cut it")


def _stated(problem: bytes) -> DropserveError:
    """Read a problem that came inside of a stream."""
    with _expecting("the stream failed, and did not say so"):
        stated = schemas.Problem.model_validate_json(problem)
    error = error_for(stated.status, stated.detail)
    error.request_id = stated.request_id
    return error


@contextmanager
def _expecting(otherwise: str) -> Iterator[None]:
    """Turn an answer that is not as it should be into a `ServerError`."""
    try:
        yield
    except (ValidationError, UnicodeDecodeError) as error:
        expected = error.title if isinstance(error, ValidationError) else "text"
        raise ServerError(
            f"{otherwise} with a {expected}: is it Dropserve, of this version?"
        ) from error


def base_url(url: str) -> str:
    """Return a service's address.

    Raises:
        ValueError: it does not begin with http:// or https://.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or "/" in scheme:
        raise ValueError(f"{url!r} has no scheme: did you mean http://{url}?")
    if scheme.lower() not in ("http", "https"):
        raise ValueError(f"{url!r} begins with {scheme}://, and not with http:// or https://")
    return url


def credentials(api_key: str | None) -> dict[str, str]:
    """Make the headers that carry a key.

    Raises:
        ValueError: a header cannot carry it; the message does not repeat it.
    """
    if api_key is None:
        return {}
    if not api_key.isascii() or not api_key.isprintable() or api_key != api_key.strip():
        raise ValueError("an API key is printable ASCII, without spaces around it")
    return {"Authorization": f"Bearer {api_key}"}


def error_of(response: httpx.Response) -> DropserveError:
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
