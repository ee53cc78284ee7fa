"""From a request's body to its pictures: raw, multipart or JSON. Read with limits, strictly."""

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from dropserve.service.errors import (
    InvalidRequest,
    MalformedRequest,
    Overloaded,
    RequestTimeout,
    TooLarge,
    UnsupportedMediaType,
    about,
)
from dropserve.service.http.decoding import Pixels, Steps
from dropserve.service.http.images import ImageLimits, ImageSource, check_size, encoded, memory_of
from dropserve.service.http.multipart import Part, parse_multipart
from dropserve.service.http.waiting import Deadline
from dropserve.service.schemas import SCALES

_ACCEPTED = (
    "send a picture with Content-Type image/png, image/jpeg or image/webp, multipart/form-data "
    "with `file` parts, or application/json with `images` or `instances`"
)
_SCALED = (
    "no pixel is above 1 and some are not whole: they are scaled already. Send 0 to 255, or "
    "scale=1 if 1 is white"
)
_MAX_ELEMENTS = 1_000_000
_MAX_NAMES = 10_000  # a hundred at most are known; each takes 300 bytes of memory
_CLOSE = {"Connection": "close"}
NUMBERS: frozenset[type] = frozenset((int, float))
Item = TypeVar("Item")


@dataclass(frozen=True)
class BodyLimits:
    """What one request may send."""

    max_bytes: int
    max_images: int
    timeout: float
    image: ImageLimits


class BodyReader:
    """Reads bodies of bounded size in bounded time, and of bounded size together.

    Args:
        limits: of one body.
        max_held: bytes of all bodies that are being read or decoded.
    """

    def __init__(self, limits: BodyLimits, max_held: int) -> None:
        self.limits = limits
        self._most = limits.max_bytes
        self._max_held = max_held
        self._held = 0

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """Read a request's body, which counts as held until it is released.

        Args:
            headers: of the request, names in lower case.
            receive: the request's ASGI channel.

        Raises:
            TooLarge: it has more bytes than allowed.
            RequestTimeout: it did not arrive in time.
            UnsupportedMediaType: it is compressed.
            Overloaded: too many bytes are held already.
            ClientDisconnect: the client went away.
        """
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedMediaType("the body is compressed: send it as it is")
        if b"expect" in headers and int(headers.get(b"content-length", b"0")) > self._most:
            raise self._too_large()
        chunks: list[bytes] = []
        try:
            with Deadline(self.limits.timeout, self._too_late):
                await self._append(receive, chunks)
        except BaseException:
            self._held -= sum(map(len, chunks))
            raise
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def hold(self, body: bytes) -> bool:
        """Count a body that was read already as held until it is released, if there is room."""
        fits = self._held + len(body) <= self._max_held
        self._held += len(body) if fits else 0
        return fits

    def release(self, size: int) -> None:
        """Give back the room of a body of so many bytes that `read` returned or `hold` counted."""
        self._held -= size

    async def _append(self, receive: Receive, chunks: list[bytes]) -> None:
        """Append to `chunks` what comes.

        A sender of more than allowed is read out for as many bytes again, so that it gets to see
        the answer; then the connection is closed.
        """
        size, more = 0, True
        while more and size <= 2 * self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message["body"], message["more_body"]
            size += len(chunk)
            if size <= self._most:
                chunks.append(chunk)
                self._held += len(chunk)
                if self._held > self._max_held:
                    raise Overloaded(
                        "too many bodies at once; try again in a second", reason="body_memory"
                    )
        if size > self._most:
            raise self._too_large()

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the body is larger than {self._most} bytes (DROPSERVE_MAX_BODY_BYTES)", headers=_CLOSE
        )

    def _too_late(self) -> RequestTimeout:
        seconds = f"{self.limits.timeout:g} seconds"
        return RequestTimeout(f"the body did not arrive within {seconds}", headers=_CLOSE)


def parse_images(
    body: bytes, content_type: str, limits: BodyLimits, scale: int | None = None
) -> Steps[list[ImageSource]]:
    """Find the pictures of a body, in order; at least one. They are not decoded yet.

    Args:
        body: all of it.
        content_type: the header's value, with its parameters.
        limits: of number and size.
        scale: the number that is white, if the query says so.

    Raises:
        RequestError: the body cannot be read as it says it should.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        yield json_memory(body)
        return _parse_json(body, limits, scale)
    check_encoded(scale)
    if media_type.startswith("image/"):
        return [encoded(body, media_type, limits.image)]
    if media_type == "multipart/form-data":
        yield 2 * len(body)
        parts = parse_multipart(body, content_type)
        check_count(len(parts), limits)
        return read_each(parts, lambda part: _read_part(part, limits))
    raise UnsupportedMediaType(_ACCEPTED)


def read_each(items: Sequence[Item], read: Callable[[Item], ImageSource]) -> list[ImageSource]:
    """Read pictures' headers or numbers; an error says which of them it is about."""
    pictures = []
    for number, item in enumerate(items):
        with about(number, len(items)):
            pictures.append(read(item))
    return pictures


def _read_part(part: Part, limits: BodyLimits) -> ImageSource:
    if part.name != "file":
        raise InvalidRequest("a part has another name than `file`")
    if not part.has_filename:
        raise InvalidRequest("a `file` part has no filename")
    return encoded(part.data, part.content_type, limits.image)


def _parse_json(body: bytes, limits: BodyLimits, scale: int | None) -> list[ImageSource]:
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
        return read_each(items, lambda item: _read_numbers(item, limits.image, scale or 255))
    check_encoded(scale)
    return read_each(items, lambda item: encoded(from_base64(item), None, limits.image))


def check_encoded(scale: int | None) -> None:
    """Refuse a scale for encoded pictures, whose numbers have one."""
    if scale == 1:
        raise InvalidRequest(
            "scale: 1 is for numbers only; encoded pictures have theirs: leave it out"
        )


def check_count(count: int, limits: BodyLimits) -> None:
    """Raise an error if there are no images, or more than one body may have."""
    if count == 0:
        raise MalformedRequest("the body has no image")
    if count > limits.max_images:
        raise TooLarge(f"the body has more than {limits.max_images} images (DROPSERVE_MAX_IMAGES)")


def load_json(body: bytes) -> Any:  # noqa: ANN401  JSON is anything
    """Parse JSON as strictly as its standard: UTF-8, no name twice, no NaN."""
    if not body:
        raise MalformedRequest("the body is empty")
    if _elements(body) > _MAX_ELEMENTS:  # parsing holds up all threads
        raise TooLarge(f"the JSON body has more than {_MAX_ELEMENTS} elements")
    if body.count(b":") > _MAX_NAMES:
        raise TooLarge(f"the JSON body has more than {_MAX_NAMES} names")
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("the body is not sound JSON in UTF-8") from error


def json_memory(body: bytes) -> int:
    """Return the bytes that parsing JSON takes at most: text, values, and arrays of them."""
    character = 1 if body.isascii() else 4  # bytes in Python's strings, if one is beyond 16 bits
    return (1 + 2 * character) * len(body) + 128 * min(_elements(body), _MAX_ELEMENTS)


def _elements(body: bytes) -> int:
    """Count what is in the lists and objects of some JSON, or more."""
    return body.count(b",") + body.count(b"[")


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError
    return values


def _refuse_constant(_name: str) -> None:
    raise InvalidRequest("NaN and Infinity are no numbers of JSON")


def from_base64(item: object) -> bytes:
    """Return the bytes that a string of JSON stands for."""
    if not isinstance(item, str):
        raise InvalidRequest("encoded pictures must be base64 strings")
    try:
        return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("encoded pictures must be base64 strings: one is not") from error


def _read_numbers(item: object, limits: ImageLimits, scale: int) -> ImageSource:
    not_array = InvalidRequest("`instances` must hold arrays of shape HxW or HxWxC, C 1 or 3")
    try:
        items = np.array(item, dtype=object)  # no other dtype: it would pad and convert strings
    except ValueError as error:
        raise not_array from error
    if items.ndim not in (2, 3) or items.size == 0 or items.shape[2:] not in ((), (1,), (3,)):
        raise not_array
    check_size((items.shape[1], items.shape[0]), limits)
    (picture,) = from_pixels(to_pixels(items[np.newaxis], scale))
    return picture


def to_pixels(
    numbers: npt.NDArray[Any], scale: int = 255, kinds: frozenset[type] = NUMBERS
) -> Pixels:
    """Make pixels, whole numbers from 0 to 255, of the numbers of pictures.

    Args:
        numbers: as JSON had them (objects), or floats; [B, ...].
        scale: the number that is white: 255, or 1.
        kinds: what objects may be.

    Raises:
        InvalidRequest: one is of another kind or size, or no number; or a picture's are what 255
            was divided out of.
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
    if scale == 255:
        for number, picture in enumerate(numbers):
            if picture.max() <= 1 and (picture != np.rint(picture)).any():
                with about(number, len(numbers)):
                    raise InvalidRequest(_SCALED)
    pixels: Pixels = np.rint(numbers * (255 // scale)).astype(np.uint8)
    return pixels


def from_pixels(pixels: Pixels) -> list[ImageSource]:
    """Make pictures of pixels [B, H, W], [B, H, W, 1] or [B, H, W, 3]."""
    if pixels.shape[3:] == (1,):
        pixels = pixels[..., 0]
    memory = memory_of(pixels.shape[1:3])
    return [ImageSource(partial(Image.fromarray, picture), memory) for picture in pixels]
