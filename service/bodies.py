"""From a request's body to pictures: raw, multipart or JSON. Read with limits, parsed strictly."""

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service.errors import (
    InvalidRequest,
    MalformedRequest,
    Overloaded,
    RequestTimeout,
    TooLarge,
    UnsupportedMediaType,
)
from service.images import ImageLimits, check_size, decode
from service.multipart import Part, parse_multipart
from service.waiting import Deadline

_ACCEPTED = (
    "send a picture with Content-Type image/png, image/jpeg or image/webp, multipart/form-data "
    "with `file` parts, or application/json with `images` or `instances`"
)
_MAX_ELEMENTS = 1_000_000
_CLOSE = {"Connection": "close"}
_NUMBERS: frozenset[type] = frozenset((int, float))
Pixels = npt.NDArray[np.uint8]


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

    def release(self, body: bytes) -> None:
        """Give back the room of a body that `read` returned, or that `hold` counted."""
        self._held -= len(body)

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
                    raise Overloaded("too many bodies at once; try again in a second")
        if size > self._most:
            raise self._too_large()

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._most} bytes", headers=_CLOSE)

    def _too_late(self) -> RequestTimeout:
        seconds = f"{self.limits.timeout:g} seconds"
        return RequestTimeout(f"the body did not arrive within {seconds}", headers=_CLOSE)


def parse_images(body: bytes, content_type: str, limits: BodyLimits) -> Iterator[Image.Image]:
    """Decode the pictures of a body, in order; at least one.

    One at a time, as they are asked for: all of a body's pictures may need far more memory than it.

    Args:
        body: all of it.
        content_type: the header's value, with its parameters.
        limits: of number and size.

    Raises:
        RequestError: the body cannot be read as it says it should.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("image/"):
        return iter([decode(body, media_type, limits.image)])
    if media_type == "multipart/form-data":
        parts = parse_multipart(body, content_type)
        check_count(len(parts), limits)
        return bounded((_decode_part(part, limits) for part in parts), limits)
    if media_type == "application/json":
        return _parse_json(body, limits)
    raise UnsupportedMediaType(_ACCEPTED)


def _decode_part(part: Part, limits: BodyLimits) -> Image.Image:
    if part.name != "file":
        raise InvalidRequest("a part has another name than `file`")
    if not part.has_filename:
        raise InvalidRequest("a `file` part has no filename")
    return decode(part.data, part.content_type, limits.image)


def _parse_json(body: bytes, limits: BodyLimits) -> Iterator[Image.Image]:
    values = load_json(body)
    if not isinstance(values, dict) or len(values) != 1:
        raise InvalidRequest("the JSON body must be an object with `images` or `instances` alone")
    (key, items), *_ = values.items()
    decoders = {"images": _decode_text, "instances": _decode_numbers}
    if key not in decoders:
        raise InvalidRequest(
            "the JSON body must have `images` or `instances`; options go in the query"
        )
    if not isinstance(items, list):
        raise InvalidRequest(f"`{key}` must be a list")
    check_count(len(items), limits)
    return bounded((decoders[key](item, limits.image) for item in items), limits)


def bounded(images: Iterable[Image.Image], limits: BodyLimits) -> Iterator[Image.Image]:
    """Stop when the pictures have more pixels together than one may have."""
    pixels = 0
    for image in images:
        pixels += image.width * image.height
        if pixels > limits.image.max_pixels:
            most = limits.image.max_pixels
            raise TooLarge(f"the pictures have more than {most} pixels together")
        yield image


def check_count(count: int, limits: BodyLimits) -> None:
    """Raise an error if there are no images, or more than one body may have."""
    if count == 0:
        raise MalformedRequest("the body has no image")
    if count > limits.max_images:
        raise TooLarge(f"the body has more than {limits.max_images} images")


def load_json(body: bytes) -> Any:  # noqa: ANN401  JSON is anything
    """Parse JSON as strictly as its standard: UTF-8, no name twice, no NaN."""
    if not body:
        raise MalformedRequest("the body is empty")
    if body.count(b",") + body.count(b"[") > _MAX_ELEMENTS:  # parsing holds up all threads
        raise TooLarge(f"the JSON body has more than {_MAX_ELEMENTS} elements")
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("the body is not sound JSON in UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError
    return values


def _refuse_constant(_name: str) -> None:
    raise InvalidRequest("NaN and Infinity are no numbers of JSON")


def _decode_text(item: object, limits: ImageLimits) -> Image.Image:
    return decode(from_base64(item), None, limits)


def from_base64(item: object) -> bytes:
    """Return the bytes that a string of JSON stands for."""
    if not isinstance(item, str):
        raise InvalidRequest("encoded pictures must be base64 strings")
    try:
        return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("encoded pictures must be base64 strings: one is not") from error


def _decode_numbers(item: object, limits: ImageLimits) -> Image.Image:
    not_array = InvalidRequest("`instances` must hold arrays of shape HxW or HxWxC, C 1 or 3")
    try:
        items = np.array(item, dtype=object)  # no other dtype: it would pad and convert strings
    except ValueError as error:
        raise not_array from error
    if items.ndim not in (2, 3) or items.size == 0 or items.shape[2:] not in ((), (1,), (3,)):
        raise not_array
    check_size((items.shape[1], items.shape[0]), limits)
    pixels = to_pixels(items)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(pixels)


def to_pixels(numbers: npt.NDArray[Any], kinds: frozenset[type] = _NUMBERS) -> Pixels:
    """Round numbers from 0 to 255 to whole ones.

    Args:
        numbers: as JSON had them (objects), or floats.
        kinds: what objects may be.

    Raises:
        InvalidRequest: one is of another kind or size, or no number.
    """
    wrong = InvalidRequest("pixels must be numbers from 0 to 255")
    if numbers.dtype == object:
        if not {type(number) for number in numbers.flat} <= kinds:
            raise wrong
        try:
            numbers = numbers.astype(np.float64)
        except OverflowError as error:
            raise wrong from error
    if not bool(((numbers >= 0) & (numbers <= 255)).all()):
        raise wrong
    pixels: Pixels = np.rint(numbers).astype(np.uint8)
    return pixels
