"""Reads request bodies within limits, and parses images: raw, multipart or JSON."""

import asyncio
import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from dropserve.service.errors import (
    AboutImage,
    InvalidRequest,
    MalformedRequest,
    Overloaded,
    RequestTimeout,
    TooLarge,
    UnsupportedMediaType,
)
from dropserve.service.http.images import (
    ACCEPTED,
    ImageSource,
    check_size,
    encoded,
    memory_of,
)
from dropserve.service.inference.decoder import Pixels, Steps
from dropserve.service.schemas import SCALES
from dropserve.service.settings import Settings

MAX_ELEMENTS = 1_000_000
MAX_NAMES = 10_000  # a hundred at most are known; each takes 300 bytes of memory
MAX_PARTS = 1000
NUMBERS: frozenset[type] = frozenset((int, float))
LEAST_BYTES, WINDOW = 5 * 1024, 5.0
"""So many bytes of a body, or its rest, must arrive in so many seconds."""
Item = TypeVar("Item")


class BodyReader:
    """Reads bodies of bounded size in bounded time, and no more than `max_held_bytes` of all.

    The first 1/256 of that, of each body, may take all of it: 256 KiB by default. What is beyond,
    of all bodies together, takes half, or one body of the largest size: a few senders of large
    bodies leave room for small ones.
    """

    def __init__(self, limits: Settings) -> None:
        self._limits = limits
        most = limits.max_held_bytes
        self._share = most // 256
        self._most_beyond = max(most // 2, limits.max_body_bytes)
        self._held = self._held_beyond = 0

    async def read(self, request: Request) -> bytes:
        """Read a request's body, which counts as held until it is released.

        Raises:
            TooLarge: it has more bytes than allowed.
            RequestTimeout: it did not arrive in time, or too slowly.
            UnsupportedMediaType: it is compressed.
            Overloaded: too many bytes are held already.
            ClientDisconnect: the client went away.
        """
        headers, most = request.headers, self._limits.max_body_bytes
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("the body is compressed: send it as it is")
        if "expect" in headers and int(headers.get("content-length", "0")) > most:
            raise self._too_large()
        now = asyncio.get_running_loop().time()
        deadline = now + self._limits.body_timeout
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout_at(min(now + WINDOW, deadline)) as limit:
                await self._append(request, chunks, limit, deadline)
        except BaseException as error:
            self.release(sum(map(len, chunks)))
            if isinstance(error, TimeoutError):
                raise self._too_late(limit.when() == deadline) from None
            raise
        if cut := request.scope["state"].get("cut"):  # by http/connection.py
            self.release(sum(map(len, chunks)))
            raise cut
        return b"".join(chunks)

    async def _append(
        self, request: Request, chunks: list[bytes], limit: asyncio.Timeout, deadline: float
    ) -> None:
        """Append to `chunks` what arrives, and postpone `limit`, to the deadline at most.

        A sender of more than allowed is read for as many bytes again, so that it gets to see the
        answer; then the connection is closed.
        """
        loop, most = asyncio.get_running_loop(), self._limits.max_body_bytes
        size, expected = 0, LEAST_BYTES
        async for chunk in request.stream():
            size += len(chunk)
            if size > 2 * most:
                break
            if chunk and size <= most:
                if not self._take(size - len(chunk), len(chunk)):
                    raise Overloaded(
                        "too many bodies at once; try again in a second", "body_memory"
                    )
                chunks.append(chunk)
            if size >= expected:
                expected = size + LEAST_BYTES
                limit.reschedule(min(loop.time() + WINDOW, deadline))
        if size > most:
            raise self._too_large()

    def _too_large(self) -> TooLarge:
        most = self._limits.max_body_bytes
        return TooLarge(
            f"the body is larger than {most} bytes (DROPSERVE_MAX_BODY_BYTES)",
            headers={"Connection": "close"},
        )

    def _too_late(self, total: bool) -> RequestTimeout:
        detail = f"the body did not arrive within {self._limits.body_timeout:g} seconds"
        if not total:
            detail = f"fewer than {LEAST_BYTES} bytes of the body arrived in {WINDOW:g} seconds"
        return RequestTimeout(detail, headers={"Connection": "close"})

    def hold(self, body: bytes) -> bool:
        """Count a body that was read already as held until it is released, if `read` would."""
        return len(body) <= self._limits.max_body_bytes and self._take(0, len(body))

    def release(self, size: int) -> None:
        """Stop counting a body of so many bytes that `read` returned or `hold` counted."""
        self._held -= size
        self._held_beyond -= max(0, size - self._share)

    def _take(self, size: int, more: int) -> bool:
        """Count `more` bytes of a body of which `size` are counted, if there is room for them."""
        beyond = max(0, size + more - self._share) - max(0, size - self._share)
        fits = self._held + more <= self._limits.max_held_bytes
        if not fits or (beyond and self._held_beyond + beyond > self._most_beyond):
            return False
        self._held += more
        self._held_beyond += beyond
        return True


def parse_images(
    body: bytes, content_type: str, limits: Settings, scale: int | None = None
) -> Steps[list[ImageSource]]:
    """Find the images of a body, in order, at least one; they are not decoded yet.

    `content_type` is the header's value, `scale` the number that is white, if the query says so.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        yield json_memory(body)
        return _parse_json(body, limits, scale)
    check_encoded(scale)
    if media_type.startswith("image/"):
        return [encoded(body, media_type, limits)]
    if media_type == "multipart/form-data":
        yield 2 * len(body)
        parts = parse_multipart(body, content_type)
        check_count(len(parts), limits)
        return read_each(parts, lambda part: _read_part(part, limits))
    raise UnsupportedMediaType(
        f"send an image with Content-Type {ACCEPTED}, multipart/form-data with `file` parts, or "
        f"application/json with `images` or `instances`"
    )


def read_each(items: Sequence[Item], read: Callable[[Item], ImageSource]) -> list[ImageSource]:
    """Read images' headers or numbers; an error says which of them it is about."""
    images = []
    for number, item in enumerate(items):
        with AboutImage(number, len(items)):
            images.append(read(item))
    return images


def check_encoded(scale: int | None) -> None:
    """Refuse a scale for encoded images, whose numbers have one."""
    if scale == 1:
        raise InvalidRequest("scale: 1 is for numbers only; leave it out for encoded images")


def check_count(count: int, limits: Settings) -> None:
    """Raise an error if there are no images, or more than one body may have."""
    if count == 0:
        raise MalformedRequest("the body has no image")
    if count > limits.max_images:
        raise TooLarge(f"the body has more than {limits.max_images} images (DROPSERVE_MAX_IMAGES)")


# multipart/form-data (RFC 7578) in memory: Starlette's parser spools large parts to disk


@dataclass
class Part:
    """One part; file names are checked for, never kept."""

    name: str = ""
    has_filename: bool = False
    content_type: str | None = None
    data: bytes = b""


def parse_multipart(body: bytes, content_type: str) -> list[Part]:
    """Split a body into parts."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, section 5.1.1
        raise MalformedRequest("multipart needs a boundary of 1 to 70 characters")
    parts: list[Part] = []
    headers: dict[bytes, bytes] = {}
    name, value, data = bytearray(), bytearray(), bytearray()
    finished = False

    def begin() -> None:
        if len(parts) == MAX_PARTS:
            raise MalformedRequest(f"the body has more than {MAX_PARTS} parts")
        parts.append(Part())
        headers.clear()

    def end_header() -> None:
        headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def end_part() -> None:
        parts[-1].data = bytes(data)
        data.clear()

    def end() -> None:
        nonlocal finished
        finished = True

    def collect(into: bytearray) -> Callable[[bytes, int, int], None]:
        return lambda found, start, stop: into.extend(memoryview(found)[start:stop])

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": collect(name),
                "on_header_value": collect(value),
                "on_header_end": end_header,
                "on_headers_finished": lambda: _read_headers(parts[-1], headers),
                "on_part_data": collect(data),
                "on_part_end": end_part,
                "on_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest("the body is not valid multipart/form-data") from error
    if not finished:
        raise MalformedRequest("the multipart body ends before its closing boundary")
    return parts


def _read_headers(part: Part, headers: dict[bytes, bytes]) -> None:
    kind, options = parse_options_header(headers.get(b"content-disposition", b""))
    if kind != b"form-data" or not options.get(b"name"):
        raise MalformedRequest("a part has no `Content-Disposition: form-data` with a name")
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type.startswith(b"multipart/"):
        raise MalformedRequest("a part is multipart itself")
    part.name = options[b"name"].decode("utf-8", "replace")
    part.has_filename = b"filename" in options
    part.content_type = media_type.decode("latin-1") or None


def _read_part(part: Part, limits: Settings) -> ImageSource:
    if part.name != "file":
        raise InvalidRequest("a part is not named `file`")
    if not part.has_filename:
        raise InvalidRequest("a `file` part has no filename")
    return encoded(part.data, part.content_type, limits)


def _parse_json(body: bytes, limits: Settings, scale: int | None) -> list[ImageSource]:
    values = load_json(body)
    if isinstance(values, dict) and "scale" in values:
        if scale is not None:
            raise InvalidRequest("scale is in the query and in the body: leave one out")
        scale = values.pop("scale")
        if type(scale) is not int or scale not in SCALES:
            raise InvalidRequest("scale: must be 255 or 1")
    if not isinstance(values, dict) or len(values) != 1:
        raise InvalidRequest(
            "the JSON body must be an object with `images` or `instances`, and `scale` at most"
        )
    (key, items), *_ = values.items()
    if key not in ("images", "instances"):
        raise InvalidRequest(
            "the JSON body must have `images` or `instances`; options go in the query"
        )
    if not isinstance(items, list):
        raise InvalidRequest(f"`{key}` must be a list")
    check_count(len(items), limits)
    if key == "instances":
        return read_each(items, lambda item: _read_numbers(item, limits, scale or 255))
    check_encoded(scale)
    return read_each(items, lambda item: encoded(from_base64(item), None, limits))


def load_json(body: bytes) -> Any:  # noqa: ANN401  JSON is anything
    """Parse JSON as strictly as its standard: UTF-8, no name twice, no NaN."""
    if not body:
        raise MalformedRequest("the body is empty")
    if _count_elements(body) > MAX_ELEMENTS:  # parsing holds up all threads
        raise TooLarge(f"the JSON body has more than {MAX_ELEMENTS} elements")
    if body.count(b":") > MAX_NAMES:
        raise TooLarge(f"the JSON body has more than {MAX_NAMES} names")
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("the body is not valid JSON in UTF-8") from error


def json_memory(body: bytes) -> int:
    """Return the bytes that parsing JSON takes at most: text, values, and arrays of them."""
    character = 1 if body.isascii() else 4  # bytes in Python's strings, if one is beyond 16 bits
    return (1 + 2 * character) * len(body) + 128 * min(_count_elements(body), MAX_ELEMENTS)


def _count_elements(body: bytes) -> int:
    """Count what is in the lists and objects of some JSON, or more."""
    return body.count(b",") + body.count(b"[")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError
    return values


def _refuse_constant(_name: str) -> None:
    raise InvalidRequest("NaN and Infinity are not JSON numbers")


def from_base64(item: object) -> bytes:
    """Return the bytes that a string of JSON stands for."""
    try:
        if isinstance(item, str):
            return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise InvalidRequest("encoded images must be base64 strings: one is not")


def _read_numbers(item: object, limits: Settings, scale: int) -> ImageSource:
    items = np.array(item, dtype=object)  # no other dtype: it would pad and convert strings
    if items.ndim not in (2, 3) or items.size == 0 or items.shape[2:] not in ((), (1,), (3,)):
        raise InvalidRequest("`instances` must hold arrays of shape HxW or HxWxC, C 1 or 3")
    check_size((items.shape[1], items.shape[0]), limits)
    (image,) = from_pixels(to_pixels(items[np.newaxis], scale))
    return image


def to_pixels(
    numbers: npt.NDArray[Any], scale: int = 255, kinds: frozenset[type] = NUMBERS
) -> Pixels:
    """Convert the numbers of images [B, ...], floats or objects of these kinds, to pixels.

    Raises:
        InvalidRequest: one is of another kind, or not from 0 to `scale`; or an image's have been
            divided by 255 already.
    """
    wrong = InvalidRequest(f"pixels must be numbers from 0 to {scale}")
    if numbers.dtype == object:
        if not {type(number) for number in numbers.flat} <= kinds:
            raise wrong
        try:
            numbers = numbers.astype(np.float64)
        except OverflowError as error:
            raise wrong from error
    if not bool(((numbers >= 0) & (numbers <= scale)).all()):
        raise wrong
    for number, image in enumerate(numbers if scale == 255 else ()):
        if image.max() <= 1 and (image != np.rint(image)).any():
            with AboutImage(number, len(numbers)):
                raise InvalidRequest(
                    "no pixel is above 1 and some are not whole: they are scaled already. Send 0 "
                    "to 255, or scale=1 if 1 is white"
                )
    pixels: Pixels = np.rint(numbers * (255 // scale)).astype(np.uint8)
    return pixels


def from_pixels(pixels: Pixels) -> list[ImageSource]:
    """Make images of pixels [B, H, W], [B, H, W, 1] or [B, H, W, 3]."""
    if pixels.shape[3:] == (1,):
        pixels = pixels[..., 0]
    memory = memory_of(pixels.shape[1:3])
    return [ImageSource(partial(_from_array, image), memory) for image in pixels]


def _from_array(image: Pixels, _set_scale: object) -> Image.Image:
    return Image.fromarray(image)
