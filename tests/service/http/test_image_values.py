"""Pictures that are read, and the pixels that they come to."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from dropserve.models.preprocessing import Preprocessing
from dropserve.service.settings import Settings
from tests.helpers import chunk, decode, encode, png

LIMITS = Settings(max_pixels=16 * 10**6, max_side=16_384)
WIDTH, HEIGHT = 4, 2


def pixels(data, channels, size, content_type=None):
    """Decode and prepare at its own size, as a service would: uint8 [C, H, W] as lists."""
    image = decode(data, content_type, LIMITS)
    mean = (0.5,) * channels
    return Preprocessing(size, channels, mean, mean).prepare(image).tolist()


GREY = [[10, 20, 30, 40], [50, 60, 70, 80]]


PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0])) + chunk(b"tRNS", bytes([255, 0]))
READ = {  # a file, and its pixels [C, H, W]
    "grey": (png(4, 2, rows=GREY), [GREY]),
    "a pixel": (png(1, 1, rows=[[9]]), [[[9]], [[9]], [[9]]]),
    "a pixel, enlarged": (png(1, 1, rows=[[9]]), [[[9, 9], [9, 9]]]),
    "one bit": (
        png(4, 2, bits=1, rows=[[0b10100000], [0b01100000]]),
        [[[255, 0, 255, 0], [0, 255, 255, 0]]],
    ),
    "two bits": (png(4, 1, bits=2, rows=[[0b00011011]]), [[[0, 85, 170, 255]]]),
    "four bits": (png(4, 1, bits=4, rows=[[0x01, 0x23]]), [[[0, 17, 34, 51]]]),
    "colour": (png(2, 1, colour=2, rows=[[1, 2, 3, 4, 5, 6]]), [[[1, 4]], [[2, 5]], [[3, 6]]]),
    "transparent colour, over white": (
        png(3, 1, colour=6, rows=[[0, 0, 0, 255, 0, 0, 0, 0, 200, 100, 0, 51]]),
        [[[0, 255, 244]], [[0, 255, 224]], [[0, 255, 204]]],
    ),
    "transparent grey": (png(3, 1, colour=4, rows=[[0, 255, 0, 0, 100, 51]]), [[[0, 255, 224]]]),
    "a transparent colour of a palette": (
        png(2, 1, colour=3, rows=[[0, 1]], before=PALETTE),
        [[[255, 255]], [[0, 255]], [[0, 255]]],
    ),
    "a grey that is named transparent": (
        png(3, 1, rows=[[7, 8, 9]], before=chunk(b"tRNS", struct.pack(">H", 8))),
        [[[7, 255, 9]]],
    ),
    "lossless WebP with alpha": (
        encode(np.uint8([[[0, 0, 0, 255], [200, 100, 0, 51]]]), "WEBP", lossless=True, exact=True),
        [[[0, 244]], [[0, 224]], [[0, 204]]],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_picture_is_read_to_the_pixel_with_white_behind_it(case):
    data, expected = READ[case]
    channels, *size = np.shape(expected)
    assert pixels(data, channels, tuple(size)) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind, orientation):
    upright = Image.fromarray(np.kron(np.uint8([[0, 90], [255, 180]]), np.ones((16, 16), np.uint8)))
    undo = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (upright if undo is None else upright.transpose(undo)).convert("RGB")
    data = encode(stored, kind, exif=exif, **({} if kind == "PNG" else {"quality": 100}))
    (got,) = pixels(data, 1, (32, 32))
    assert np.abs(np.int16(got) - np.int16(upright)).max() <= (0 if kind == "PNG" else 6)


def test_cmyk_is_converted_to_colour():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    red, green, blue = pixels(encode(ink, "JPEG", quality=100), 3, (8, 8), "image/jpeg")
    assert np.abs(np.int16([red, green, blue]).mean((1, 2)) - [255, 0, 0]).max() <= 3


def test_a_colour_profile_is_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = Image.new("RGB", (2, 2), (200, 100, 50))
    for data in (encode(plain, "PNG", icc_profile=profile), encode(plain, "PNG")):
        assert pixels(data, 3, (1, 1)) == [[[200]], [[100]], [[50]]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_trailing_bytes_change_nothing(kind):
    data = encode(Image.new("RGB", (8, 8), (200, 100, 50)), kind)
    assert pixels(data + b"\0MARKER" * 99, 3, (8, 8)) == pixels(data, 3, (8, 8))


def test_the_first_picture_of_a_jpeg_with_previews_is_taken():
    first, second = Image.new("RGB", (8, 8), (9, 9, 9)), Image.new("RGB", (8, 8), (200, 0, 0))
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert pixels(data, 3, (1, 1), "image/jpeg") == [[[9]], [[9]], [[9]]]


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "image/png"])
def test_a_part_need_not_say_what_it_is(content_type):
    assert pixels(png(4, 2, rows=GREY), 1, (2, 4), content_type) == [GREY]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("1", (5, 5), 1),
        Image.new("P", (5, 5), 3),
        Image.new("LA", (5, 5), (9, 9)),
        Image.new("RGBA", (5, 5), (9, 9, 9, 9)),
        Image.new("L", (16_384, 1), 9),
        Image.new("L", (1, 16_384), 9),
    ],
    ids=lambda image: f"{image.mode} {image.size}",
)
def test_unusual_pictures_are_answered_by_the_server(image, http):
    response = http.post(
        "/predict", content=encode(image, "PNG"), headers={"Content-Type": "image/png"}
    )
    assert response.status_code == 200, response.text
