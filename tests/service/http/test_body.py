"""Bodies alone: how they are read into pictures."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from dropserve.service.errors import InvalidRequest, MalformedRequest, TooLarge
from dropserve.service.http.body import parse_images
from dropserve.service.inference.decoder import finish
from dropserve.service.settings import Settings
from tests.helpers import encode

LIMITS = Settings(max_images=3, max_pixels=100, max_side=20)


def png(shade, size=(2, 2)):
    return encode(Image.new("L", size, shade))


def base64_body(*pictures):
    return json.dumps({"images": [base64.b64encode(data).decode() for data in pictures]}).encode()


def form_body(*pictures):
    head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    return b"".join(head + data + b"\r\n" for data in pictures) + b"--cut--\r\n"


KINDS = [("application/json", base64_body), ("multipart/form-data; boundary=cut", form_body)]


def parse(body, content_type):
    return finish(parse_images(body, content_type, LIMITS))


def shades(found):
    return [picture.decode(None).getpixel((0, 0)) for picture in found]


@pytest.mark.parametrize(("content_type", "body"), KINDS)
def test_pictures_come_in_the_order_of_the_body(content_type, body):
    assert shades(parse(body(png(3), png(1), png(2)), content_type)) == [3, 1, 2]


@pytest.mark.parametrize(("content_type", "body"), KINDS)
def test_a_picture_is_decoded_only_when_it_is_asked_for(content_type, body):
    first, second, _ = parse(body(png(3), png(9)[:40], png(2)), content_type)
    assert shades([first]) == [3]
    with pytest.raises(InvalidRequest):
        second.decode(None)


@pytest.mark.parametrize(("content_type", "body"), KINDS)
def test_their_number_is_limited_before_one_is_decoded(content_type, body):
    with pytest.raises(TooLarge, match=r"more than 3 images \(DROPSERVE_MAX_IMAGES\)"):
        parse(body(*[b"x"] * 4), content_type)
    with pytest.raises(MalformedRequest):
        parse(body(), content_type)


@pytest.mark.parametrize(("content_type", "body"), KINDS)
def test_each_has_the_limits_of_one_and_an_error_says_which_it_is_about(content_type, body):
    fits = body(png(3, (10, 10)), png(1, (5, 20)))
    assert shades(parse(fits, content_type)) == [3, 1]
    with pytest.raises(TooLarge, match=r"^image 1: .* 100 in all \(DROPSERVE_MAX_PIXELS\)"):
        parse(body(png(3), png(1, (11, 10))), content_type)
    with pytest.raises(TooLarge, match=r"^the image has too many pixels"):
        parse(body(png(1, (11, 10))), content_type)


def test_the_media_type_is_read_without_regard_to_case_and_parameters():
    assert shades(parse(png(3), " IMAGE/PNG ; a=b")) == [3]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([[0, 255]], [[0, 255]]),
        ([[0.4, 0.6, 254.6]], [[0, 1, 255]]),
        ([[0, 1, 1.0]], [[0, 1, 1]]),
        ([[0.5, 1.1]], [[0, 1]]),
        ([[0.0]], [[0]]),
        ([[[7], [8]]], [[7, 8]]),
        ([[[1, 2, 3]]], [[[1, 2, 3]]]),
    ],
)
def test_numbers_become_the_pixels_they_are(numbers, expected):
    body = json.dumps({"instances": [numbers]}).encode()
    (picture,) = parse(body, "application/json")
    assert np.asarray(picture.decode(None)).tolist() == expected


@pytest.mark.parametrize("shape", [(1, 21), (21, 1), (11, 10), (11, 10, 3)])
def test_numbers_have_the_limits_of_pictures(shape):
    body = json.dumps({"instances": [np.zeros(shape).tolist()]}).encode()
    with pytest.raises(TooLarge):
        parse(body, "application/json")
