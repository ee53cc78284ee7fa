"""Pictures that are refused: each is built here, byte by byte, and sent to a server as well."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from dropserve.service.errors import (
    InvalidRequest,
    MalformedRequest,
    TooLarge,
    UnsupportedMediaType,
)
from dropserve.service.http.images import are_small
from dropserve.service.http.images import encoded as read_header
from dropserve.service.settings import Settings
from tests.helpers import chunk, decode, encode, png

LIMITS = Settings(max_pixels=16 * 10**6, max_side=16_384)
ERRORS = {
    400: MalformedRequest,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: InvalidRequest,
}


def encoded(kind, size=(8, 8), mode="RGB", **options):
    image = Image.new(mode, size, 77 if mode == "L" else (10, 20, 30))
    return encode(image, kind, **options)


def animated(kind, **options):
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 99, 200)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def jpeg_of(width, height):
    """A small JPEG whose header claims another size."""
    data = encoded("JPEG", mode="L")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_frame(width, height):
    return b"\xff\xc0\0\x0b\x08" + struct.pack(">HH", height, width) + b"\1\1\x11\0"


def webp_extended(width, height):
    """A WebP whose canvas is larger than what follows."""
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + canvas + encoded("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_lossless(width, height):
    data = bytearray(encoded("WEBP", lossless=True))
    bits = (width - 1) | (height - 1) << 14
    data[21:25] = struct.pack("<I", bits | (data[24] >> 4) << 28)
    return bytes(data)


def webp_lossy(width, height):
    data = bytearray(encoded("WEBP"))
    data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


def gif(width, height):
    return b"GIF89a" + struct.pack("<HH", width, height) + encoded("GIF")[10:]


def bomb(size):
    return zlib.compress(bytes(size), 9)


PNG, JPEG, WEBP = "image/png", "image/jpeg", "image/webp"
ICC = b"MARKER\0\0"
TEXT = b"MARKER\0\0"
REFUSED = {
    "no bytes": (400, PNG, b""),
    "truncated JPEG": (422, JPEG, encoded("JPEG", (64, 64))[:-200]),
    "JPEG of its first bytes alone": (422, JPEG, b"\xff\xd8\xff\xe0"),
    "truncated PNG": (422, PNG, png(64, 64, rows=[range(64)] * 64)[:90]),
    "PNG of its header alone": (422, PNG, png()[:33]),
    "PNG cut in its header": (422, PNG, png()[:20]),
    "PNG without IDAT": (422, PNG, png(data=False)),
    "PNG whose first chunk is another": (422, PNG, png()[:12] + b"IDAT" + png()[16:]),
    "PNG with a bad checksum": (422, PNG, png()[:29] + b"\0\0\0\0" + png()[33:]),
    "PNG whose pixels have a bad checksum": (422, PNG, png()[:-14] + b"\0\0" + png()[-12:]),
    "PNG cut in its end": (422, PNG, png()[:-10]),
    "PNG of a palette that is not there": (422, PNG, png(colour=3)),
    "PNG of no width": (422, PNG, png(0, 4)),
    "PNG of no height": (422, PNG, png(4, 0)),
    "PNG with a zTXt bomb": (422, PNG, png(before=chunk(b"zTXt", TEXT + bomb(50_000_000)))),
    "PNG with an iTXt bomb": (
        422,
        PNG,
        png(before=chunk(b"iTXt", b"MARKER\0\1\0\0\0" + bomb(50_000_000))),
    ),
    "PNG with an ICC bomb": (422, PNG, png(before=chunk(b"iCCP", ICC + bomb(50_000_000)))),
    "PNG of two headers": (
        422,
        PNG,
        png(before=chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))),
    ),
    "PNG of 20,000 texts": (422, PNG, png(before=chunk(b"tEXt", TEXT) * 20_000)),
    "JPEG of 20,000 segments": (
        422,
        JPEG,
        b"\xff\xd8" + b"\xff\xe1\0\2" * 20_000 + encoded("JPEG")[2:],
    ),
    "JPEG without a frame": (422, JPEG, b"\xff\xd8\xff\xda\0\2" + bytes(50)),
    "JPEG of two frames": (
        422,
        JPEG,
        encoded("JPEG")[:-2].replace(b"\xff\xda", jpeg_frame(99, 99) + b"\xff\xda", 1),
    ),
    "PNG of 16 bits, grey": (422, PNG, png(bits=16, rows=[bytes(8)] * 4)),
    "PNG of 16 bits, colour": (422, PNG, png(bits=16, colour=2, rows=[bytes(24)] * 4)),
    "PNG that is animated": (422, PNG, animated("PNG")),
    "PNG with EXIF in hexadecimal that is none": (
        422,
        PNG,
        png(before=chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nMARKER")),
    ),
    "WebP that is animated": (422, WEBP, animated("WEBP", lossless=True)),
    "WebP that is truncated": (422, WEBP, encoded("WEBP", (64, 64))[:-30]),
    "WebP cut in its header": (422, WEBP, encoded("WEBP")[:20]),
    "WebP of an unknown chunk": (422, WEBP, encoded("WEBP")[:12] + b"MARK" + bytes(40)),
    "GIF with corrupt LZW": (415, "image/gif", encoded("GIF")[:-8] + b"\xff" * 8),
    "PNG of 13,000 x 13,000": (413, PNG, png(13_000, 13_000, rows=b"")),
    "PNG of 2^31 x 1": (413, PNG, png(2**31, 1, rows=b"")),
    "PNG of 2^32-1 squared": (413, PNG, png(2**32 - 1, 2**32 - 1, rows=b"")),
    "JPEG of 65,535 x 1": (413, JPEG, jpeg_of(65_535, 1)),
    "JPEG of 65,535 x 65,535": (413, JPEG, jpeg_of(65_535, 65_535)),
    "GIF bomb": (413, "image/gif", gif(65_535, 65_535)),
    "WebP bomb, extended": (413, WEBP, webp_extended(16_777_216, 16_777_216)),
    "WebP bomb, lossless": (413, WEBP, webp_lossless(16_384, 16_384)),
    "WebP bomb, lossy": (413, WEBP, webp_lossy(16_383, 16_383)),
    "TIFF": (415, "image/tiff", encoded("TIFF")),
    "TIFF called a PNG": (415, PNG, encoded("TIFF")),
    "GIF": (415, "image/gif", encoded("GIF")),
    "BMP": (415, "image/bmp", encoded("BMP")),
    "SVG": (415, "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'>MARKER</svg>"),
    "PDF": (415, PNG, b"%PDF-1.7\nMARKER"),
    "EPS": (415, PNG, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nMARKER"),
    "JPEG called a PNG": (415, PNG, encoded("JPEG")),
    "PNG called a JPEG": (415, JPEG, png()),
    "PNG called a WebP": (415, WEBP, png()),
    "one byte": (415, PNG, b"\x89"),
}


@pytest.fixture(params=REFUSED.values(), ids=REFUSED)
def refused(request):
    return request.param


def test_a_bad_picture_is_refused_with_its_error_and_little_memory(refused):
    status, content_type, data = refused
    tracemalloc.start()
    try:
        with pytest.raises(ERRORS[status]) as caught:
            decode(data, content_type, LIMITS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status == status
    assert "MARKER" not in str(caught.value)
    assert peak < 8_000_000


def test_a_bad_picture_gets_its_status_from_the_server(refused, http, problem):
    status, content_type, data = refused
    response = http.post("/predict", content=data, headers={"Content-Type": content_type})
    problem(response, status)
    good = http.post("/predict", content=png(), headers={"Content-Type": PNG})
    assert good.status_code == 200


@pytest.mark.parametrize("name", ["WebP bomb, extended", "PNG of 13,000 x 13,000"])
def test_the_native_memory_of_a_bomb_is_not_allocated(name, http, server):
    _, content_type, data = REFUSED[name]
    before = server.resident()
    for _ in range(5):
        http.post("/predict", content=data, headers={"Content-Type": content_type})
    assert server.resident() - before < 50_000_000


def test_the_limits_are_the_ones_given():
    assert decode(png(20, 10), PNG, Settings(max_pixels=200, max_side=20)).size == (20, 10)
    with pytest.raises(TooLarge, match=r"at most 199 in all \(DROPSERVE_MAX_PIXELS\) and 20 "):
        decode(png(20, 10), PNG, Settings(max_pixels=199, max_side=20))
    with pytest.raises(TooLarge):
        decode(png(20, 10), PNG, Settings(max_pixels=200, max_side=19))


def test_what_may_stand_before_a_jpeg_s_frame_is_passed_over():
    plain = encoded("JPEG", (24, 16))
    filled = plain[:2] + b"\xff\xff\xfe\0\6\xff\xc0\0\0" * 9 + plain[2:]  # in comments: no frames
    for data in (plain, filled, encoded("JPEG", (24, 16), progressive=True)):
        assert decode(data, JPEG, LIMITS).size == (24, 16)


@pytest.mark.parametrize(
    ("data", "small"),
    [
        (png(), True),
        (png(64, 64), True),
        (png(100, 100), False),
        (png() + bytes(20_000), False),
        (encoded("JPEG"), True),
        (encoded("JPEG", progressive=True), False),  # several scans
        (encoded("JPEG", comment=b"x" * 1000), False),
        (encoded("WEBP"), False),
        (png(before=chunk(b"IDAT", b"") * 5), True),
        (png(before=chunk(b"IDAT", b"") * 6), False),  # a thousand take a millisecond
        (png(before=chunk(b"tEXt", TEXT)), False),
        (png(before=chunk(b"zTXt", TEXT)), False),
        (png()[:-12] + chunk(b"tEXt", TEXT) + png()[-12:], False),
        (png()[:-1], False),
        (png(colour=6, rows=[bytes(16)] * 4), True),
    ],
    ids=[str(n) for n in range(15)],
)
def test_a_small_image_has_few_bytes_and_pixels_and_little_else(data, small):
    assert are_small([read_header(data, None, LIMITS)]) is small


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("side", [1, 7, 28, 300])
@pytest.mark.parametrize("noise", [False, True])
def test_a_plain_png_is_decoded_as_pillow_would(mode, side, noise):
    shape = (side, side + 3, 3)[: 2 if mode == "L" else 3]
    noisy = np.random.default_rng(side).integers(0, 256, shape, np.uint8)
    smooth = np.indices(shape).sum(0).astype(np.uint8)
    pixels = noisy if noise else smooth
    image = decode(encode(pixels), "image/png", Settings(max_pixels=10**6, max_side=10**4))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), pixels)
