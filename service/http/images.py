"""Decodes images, after their limits are checked.

What Pillow is given has been recognised by its first bytes, and this module reads its dimensions
from its header: the memory that decoding takes is known before Pillow starts.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.WebPImagePlugin import WebPImageFile

from dropserve.models.image_formats import IMAGE_FORMATS
from dropserve.service.errors import (
    AboutImage,
    InvalidRequest,
    MalformedRequest,
    RequestError,
    TooLarge,
    UnsupportedMediaType,
)
from dropserve.service.inference.decoder import BYTES_PER_PIXEL, Pixels, Steps
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.inference.classifier import Classifier

FORMATS = {f"image/{kind.lower()}": kind for kind in IMAGE_FORMATS}
"""Pillow's name of every format that is read, by media type: `image/` and the name."""
ACCEPTED = " or ".join(FORMATS)
SMALL_BYTES = 16_384
_SMALL_PIXELS = 64 * 64
Size = tuple[int, int]  # (width, height)
Chunks = list[tuple[int, int]]
SetScale = Callable[[Image.Image], None]
_SIZE, _CHUNK = struct.Struct(">II"), struct.Struct(">I4s")
# length of IHDR, bit depth, colour type, methods and interlacing of the commonest PNGs
_PLAIN = {b"\0\0\0\r\x08\0\0\0\0": "L", b"\0\0\0\r\x08\2\0\0\0": "RGB"}
_SMALL_CHUNKS = 8
_DECODED = (-1, 0)  # what Pillow's decoders return at the end of valid data
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers of a frame header,
_SCAN = 0xDA  # of the pixels,
_BARE = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))  # and those that no length follows

# limits of what a small file may cost: time,
_SCAN_MARKER = b"\xff\xda"
_PLAIN_HEADER = 1024  # bytes before the scan of a JPEG: tables take 600, metadata the rest
_MOST_SCANS = 100  # of a JPEG: usual are ten, and each costs time for all pixels
_MOST_SEGMENTS = 10_000  # of a JPEG before its pixels, or chunks of a PNG that are not its pixels
# and bytes of memory
_BYTES_PER_BYTE = 4  # for a byte of the file: its metadata is copied, and lists are made of it
_SMALL_MEMORY = _SMALL_PIXELS * BYTES_PER_PIXEL + SMALL_BYTES * _BYTES_PER_BYTE
_TEXT = 256 * 2**20  # that compressed text in a PNG may become in Pillow: 64 M characters
_GROUP_BYTES = 20_000  # for a group of Huffman tables in a lossless WebP, for 4 x 4 pixels each,
_MOST_GROUPS = 65_536
_TABLE_BYTES_PER_BYTE = 1200  # and for the tables that a byte of the file can describe


@dataclass(slots=True, eq=False)  # not frozen: that takes four times as long to make
class ImageSource:
    """An image within limits, not decoded yet.

    Attributes:
        decode: decodes it, or raises InvalidRequest or MemoryError; is given what sets a JPEG's
            scale, `Preprocessing.set_scale`.
        memory: bytes that this takes at most, and converting it to a network's pixels.
        plain: its pixels are all that there is to read, so few bytes take little time.
    """

    decode: Callable[[SetScale], Image.Image]
    memory: int
    plain: bool = True


def encoded(data: bytes, content_type: str | None, limits: Settings) -> ImageSource:
    """Read the header alone of a PNG, JPEG or WebP image.

    Args:
        data: the file's bytes.
        content_type: what the sender calls it; None or `application/octet-stream` says nothing.
        limits: of its size.

    Raises:
        MalformedRequest: there are no bytes.
        UnsupportedMediaType: another format, or not the format that `content_type` says.
        TooLarge: more pixels, or a longer side, than `limits` allow.
        InvalidRequest: damaged, without pixels, or of 16 bits a channel.
    """
    kind, size = _check(data, content_type, limits)
    memory = memory_of(size) + _BYTES_PER_BYTE * len(data)
    chunks = _chunks(data) if kind == "PNG" else []
    plain = len(data) <= SMALL_BYTES and (bool(chunks) or (kind == "JPEG" and _is_plain(data)))
    if kind == "PNG" and not chunks and (b"zTXt" in data or b"iTXt" in data):
        memory += _TEXT
    if kind == "WEBP" and (b"VP8L" in data or b"ALPH" in data):
        groups = min(-(-size[0] // 4) * -(-size[1] // 4), _MOST_GROUPS)
        memory += min(groups * _GROUP_BYTES, len(data) * _TABLE_BYTES_PER_BYTE)
    return ImageSource(partial(_load, data, kind, size, chunks), memory, plain)


def _is_plain(jpeg: bytes) -> bool:
    """Say if there is little but one scan: profiles and many scans may take long to read."""
    return jpeg.count(_SCAN_MARKER) == 1 and jpeg.find(_SCAN_MARKER) < _PLAIN_HEADER


def are_small(images: Sequence[ImageSource]) -> bool:
    """Say if decoding is so little work that another thread would cost more."""
    memory = 0
    for image in images:
        if not image.plain:
            return False
        memory += image.memory
    return memory <= _SMALL_MEMORY


def prepared(images: Sequence[ImageSource], model: "Classifier") -> Steps[Pixels]:
    """Decode images for a model, each prepared before the next is decoded: uint8 [B, C, H, W]."""
    rows = []
    for number, image in enumerate(images):
        yield image.memory
        with AboutImage(number, len(images)):
            rows.append(prepared_alone(image, model))
    return np.concatenate(rows) if len(rows) > 1 else rows[0]


def prepared_alone(image: ImageSource, model: "Classifier") -> Pixels:
    """Decode one image for a model at once: uint8 [1, C, H, W]."""
    how = model.preprocessing
    return how.prepare(image.decode(how.set_scale))[np.newaxis]


def _check(data: bytes, content_type: str | None, limits: Settings) -> tuple[str, Size]:
    if not data:
        raise MalformedRequest("the image has no bytes")
    kind, size = _recognise(data)
    check_size(size, limits)
    if kind not in FORMATS.values():
        raise UnsupportedMediaType(f"this image format is not read here: send {ACCEPTED}")
    if content_type not in (None, "application/octet-stream") and FORMATS.get(content_type) != kind:
        raise UnsupportedMediaType(f"the bytes are {kind}, the content type says otherwise")
    return kind, size


def memory_of(size: Size) -> int:
    """Return the bytes that the pixels of an image take while it is read."""
    return size[0] * size[1] * BYTES_PER_PIXEL


def check_size(size: Size, limits: Settings) -> None:
    """Raise TooLarge, or InvalidRequest for nothing at all, if a size is out of bounds."""
    if max(size) > limits.max_side or size[0] * size[1] > limits.max_pixels:
        raise TooLarge(
            f"the image has too many pixels: at most {limits.max_pixels} in all "
            f"(DROPSERVE_MAX_PIXELS) and {limits.max_side} a side (DROPSERVE_MAX_SIDE)"
        )
    if min(size) < 1:
        raise InvalidRequest("the image has no pixels")


def _load(data: bytes, kind: str, size: Size, chunks: Chunks, set_scale: SetScale) -> Image.Image:
    try:
        plain = _load_plain_png(data, size, chunks) if chunks else None
        return plain or _load_any(data, kind, size, set_scale)
    except (RequestError, MemoryError):
        raise
    except Exception as error:
        # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error, zlib.error and
        # others, depending on the damage; all mean the same to the sender.
        raise _damaged(kind) from error


def _load_any(data: bytes, kind: str, size: Size, set_scale: SetScale) -> Image.Image:
    """Decode by Pillow's own reader: the first frame."""
    if kind == "PNG":
        _check_chunks(data)
    opened = Image.open(io.BytesIO(data), formats=(kind,))
    if opened.size != size:
        raise _damaged(kind)
    if kind != "JPEG" and getattr(opened, "n_frames", 1) > 1:  # a JPEG's others are its previews
        raise InvalidRequest("the image is animated: send one frame")
    _ = opened.getexif()  # damaged EXIF is found here
    if kind == "JPEG":
        set_scale(opened)
    image = _load_webp(opened) if isinstance(opened, WebPImageFile) else opened
    image.load()
    _ = image.has_transparency_data  # and here a palette that is not there
    return image


def _load_webp(opened: WebPImageFile) -> Image.Image:
    """Do what `opened.load()` does, but free libwebp's two canvases, 8 bytes a pixel, before it."""
    raw, _timestamp, _duration = opened._get_next()  # noqa: SLF001  no public name
    opened._decoder = None  # noqa: SLF001
    image = Image.frombytes(opened.mode, opened.size, raw, "raw", opened.rawmode)
    image.info = opened.info
    return image


def _load_plain_png(data: bytes, size: Size, chunks: Chunks) -> Image.Image | None:
    """Decode the commonest PNG: 8-bit grey or RGB, of few chunks, and none but its pixels'.

    It goes straight to Pillow's decoder (what `Image.frombytes` does, without its checks): 28x28
    take less than half the time. All others, and damaged ones, are None: Pillow's reader decides.
    """
    mode = _PLAIN.get(data[8:12] + data[24:29])
    if mode is None or any(zlib.crc32(data[i:j]) != _big(data[j : j + 4]) for i, j in chunks):
        return None
    image = Image.new(mode, size, None)
    decoder = Image.core.zip_decoder(mode, mode)  # type: ignore[attr-defined]  # no public name
    decoder.setimage(image.im, (0, 0, *size))
    pixels = b"".join([data[i + 4 : j] for i, j in chunks[1:-1]])
    return image if decoder.decode(pixels) == _DECODED else None


def _chunks(data: bytes) -> Chunks:
    """Find the chunks of a PNG: where their kinds start and their checksums do.

    Empty if it is cut short, or has many chunks, or others than IHDR, IDAT and IEND.
    """
    found: Chunks = []
    start, kind = 8, b""
    while kind != b"IEND":
        if len(found) == _SMALL_CHUNKS or start + 12 > len(data):
            return []
        length, kind = _CHUNK.unpack_from(data, start)
        if found and kind not in (b"IDAT", b"IEND"):
            return []
        found.append((start + 4, start + 8 + length))
        start += 12 + length
    return found if start <= len(data) else []


def _check_chunks(data: bytes) -> None:
    """Raise InvalidRequest if a PNG is cut short, or what makes up its pixels is damaged.

    Pillow checks neither the checksums of IDAT nor the end, and keeps as much of other chunks as
    there are.
    """
    start, kind, others = 8, b"", 0
    while kind != b"IEND":
        others += kind != b"IDAT"
        end = start + 8 + _big(data[start : start + 4])
        kind = data[start + 4 : start + 8]
        critical = kind[:1].isupper()
        valid = not critical or zlib.crc32(data[start + 4 : end]) == _big(data[end : end + 4])
        if end + 4 > len(data) or not valid or others > _MOST_SEGMENTS:
            raise _damaged("PNG")
        start = end + 4


def _recognise(data: bytes) -> tuple[str, Size]:
    """Name the format by its first bytes, and read the size, which is (1, 1) if it is unknown."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if len(data) < 33 or data[12:16] != b"IHDR":
            raise _damaged("PNG")
        if data[24] == 16:
            raise InvalidRequest("the image has 16 bits a channel: send 8")
        return "PNG", _SIZE.unpack_from(data, 16)
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", _jpeg_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP", _webp_size(data)
    if data[:4] == b"GIF8" and len(data) >= 10:  # not read here, yet too large is too large
        return "GIF", (_little(data[6:8]), _little(data[8:10]))
    return "unknown", (1, 1)


def _jpeg_size(data: bytes) -> Size:
    """Read the size from the frame header (ITU-T T.81, B.2.2), among the segments before the scan.

    All of them are walked, because Pillow keeps as many as there are.
    """
    if data.count(_SCAN_MARKER) > _MOST_SCANS:
        raise InvalidRequest(f"the JPEG has more than {_MOST_SCANS} scans: save it with fewer")
    start, size = 2, None
    for _ in range(_MOST_SEGMENTS):
        start = data.find(b"\xff", start)
        if start < 0 or start + 9 > len(data):
            break
        marker = data[start + 1]
        if marker == _SCAN and size is not None:
            return size
        if marker in _FRAMES and size is None:
            size = _big(data[start + 7 : start + 9]), _big(data[start + 5 : start + 7])
        if marker == 0xFF:  # fills up
            start += 1
        else:
            start += 2 if marker in _BARE else 2 + _big(data[start + 2 : start + 4])
    raise _damaged("JPEG")


def _webp_size(data: bytes) -> Size:
    """Read the canvas size from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        return _little(data[24:27]) + 1, _little(data[27:30]) + 1
    if chunk == b"VP8L" and len(data) >= 25:
        bits = _little(data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(data) >= 30:
        return _little(data[26:28]) & 0x3FFF, _little(data[28:30]) & 0x3FFF
    raise _damaged("WEBP")


def _damaged(kind: str) -> InvalidRequest:
    return InvalidRequest(f"the image cannot be decoded: damaged or not {kind}")


def _big(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def _little(raw: bytes) -> int:
    return int.from_bytes(raw, "little")
