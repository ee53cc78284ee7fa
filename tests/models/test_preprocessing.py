"""Preprocessing, pixel by pixel, against NumPy."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dropserve.models.errors import ConfigError
from dropserve.models.preprocessing import Preprocessing
from tests.helpers import encode, noise

GREY = Preprocessing((2, 3), 1, (0.5,), (0.25,))
COLOUR = Preprocessing((2, 3), 3, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
PIXELS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14  # [H, W, C]


@pytest.mark.parametrize("turned", [1, 3])
@pytest.mark.parametrize(("preprocessing", "pixels"), [(GREY, PIXELS[..., 0]), (COLOUR, PIXELS)])
def test_a_file_that_is_open_but_not_read_yet_is_prepared(preprocessing, pixels, turned):
    exif = Image.Exif()
    exif[0x0112] = turned
    opened = Image.open(io.BytesIO(encode(pixels, **({"exif": exif} if turned > 1 else {}))))
    assert bool(opened.info) == (turned > 1)
    found = preprocessing.prepare(opened)
    pixels = np.rot90(pixels, turned - 1)
    np.testing.assert_array_equal(found, pixels.reshape(2, 3, -1).transpose(2, 0, 1))
    found += 1  # it may be written to


@pytest.mark.parametrize("alpha", [0, 1, 100, 254, 255])
def test_transparency_is_laid_over_white(alpha):
    image = Image.fromarray(np.dstack([PIXELS, np.full((2, 3), alpha, np.uint8)]), "RGBA")
    expected = PIXELS * (alpha / 255) + 255 * (1 - alpha / 255)
    got = COLOUR.prepare(image).transpose(1, 2, 0)
    np.testing.assert_allclose(got, expected, atol=1)


def test_colour_becomes_grey_by_luma():
    got = GREY.prepare(Image.fromarray(PIXELS))
    np.testing.assert_allclose(got[0], PIXELS @ [0.299, 0.587, 0.114], atol=1)


def test_invert_turns_dark_into_light():
    plain = COLOUR.prepare(Image.fromarray(PIXELS))
    inverted = replace(COLOUR, invert=True).prepare(Image.fromarray(PIXELS))
    np.testing.assert_array_equal(inverted, 255 - plain)


def test_resizing_averages_when_it_shrinks():
    checks = np.kron([[0, 200, 40], [90, 10, 250]], np.ones((8, 8))).astype(np.uint8)
    got = replace(GREY, size=(1, 1)).prepare(Image.fromarray(checks))
    assert abs(int(got[0, 0, 0]) - checks.mean()) < 30
    assert GREY.prepare(Image.new("L", (50, 7), 77)).tolist() == [[[77] * 3] * 2]


ORACLES = {  # Pillow's own, as long as it shrinks to no less than a half
    "stretch": lambda image, size, _: image.resize(size, Image.Resampling.BILINEAR),
    "crop": lambda image, size, _: ImageOps.fit(image, size, Image.Resampling.BILINEAR),
    "pad": lambda image, size, colour: ImageOps.pad(
        image, size, Image.Resampling.BILINEAR, color=colour
    ),
}


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("fit", ORACLES)
@pytest.mark.parametrize("shape", [(30, 48), (48, 30), (33, 32), (20, 24), (7, 9), (8, 64)])
def test_an_image_of_other_proportions_is_fitted(fit, shape, invert):
    pixels = noise(*shape, 3)
    preprocessing = replace(COLOUR, size=(24, 32), fit=fit, invert=invert)
    got = preprocessing.prepare(Image.fromarray(pixels)).transpose(1, 2, 0)
    paper = "white" if invert else "black"  # 0 to the network
    expected = np.asarray(ORACLES[fit](Image.fromarray(pixels), (32, 24), paper))
    np.testing.assert_allclose(got, 255 - expected if invert else expected, atol=1)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_an_image_of_one_colour_stays_so_however_it_is_fitted(width, height, w, h):
    image = Image.new("L", (width, height), 77)
    for fit in ("stretch", "crop"):
        got = replace(GREY, size=(h, w), fit=fit).prepare(image)
        assert (got.shape, got.min(), got.max()) == ((1, h, w), 77, 77)
    padded = replace(GREY, size=(h, w), fit="pad").prepare(image)[0]
    inside = np.argwhere(padded == 77)
    (top, left), (bottom, right) = inside.min(0), inside.max(0)
    assert (padded[top : bottom + 1, left : right + 1] == 77).all()
    assert (padded == 77).sum() + (padded == 0).sum() == w * h
    assert abs(top - (h - 1 - bottom)) <= 1
    assert abs(left - (w - 1 - right)) <= 1
    assert right - left + 1 == w or bottom - top + 1 == h


def jpeg(width, height, orientation=1):
    """A JPEG of noise, width x height as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return io.BytesIO(encode(noise(height, width, 3), "JPEG", exif=exif))


@given(*[st.integers(1, 400)] * 2, *[st.integers(1, 40)] * 2, st.integers(1, 8))
def test_a_jpeg_is_decoded_at_the_smallest_scale_of_twice_the_size(w, h, width, height, turned):
    image = Image.open(jpeg(*((h, w) if turned >= 5 else (w, h)), turned))  # upright, w x h
    replace(COLOUR, size=(height, width), draft=True).set_scale(image)
    image.load()
    found = image.size[::-1] if turned >= 5 else image.size
    scales = [s for s in (8, 4, 2) if w >= 2 * width * s and h >= 2 * height * s]
    assert found == tuple(-(-side // max([1, *scales])) for side in (w, h))


def test_metadata_of_earlier_releases_stretch_and_decode_in_full():
    values = replace(GREY, fit="crop", draft=True).to_json()
    del values["fit"], values["draft"]
    old = Preprocessing.from_json(values)
    assert (old.fit, old.draft) == ("stretch", False)
    image = Image.open(jpeg(64, 48))
    old.set_scale(image)
    np.testing.assert_array_equal(old.prepare(image), GREY.prepare(Image.open(jpeg(64, 48))))
    assert image.size == (64, 48)


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
def test_normalising_equals_numpy(preprocessing):
    c = preprocessing.channels
    pixels = torch.randint(256, (5, c, 2, 3), dtype=torch.uint8)
    mean, std = (np.reshape(v, (c, 1, 1)) for v in (preprocessing.mean, preprocessing.std))
    got = preprocessing.normalize(pixels)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), (pixels.numpy() / 255 - mean) / std, atol=2e-6)


def test_mean_and_std_are_measured_from_the_images():
    pixels = torch.randint(256, (30, 3, 4, 5), dtype=torch.uint8)
    got = Preprocessing.measured(pixels.split(7))
    by_channel = pixels.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert got.size == (4, 5)
    assert got.shape == (3, 4, 5)
    np.testing.assert_allclose(got.mean, by_channel.mean(1), atol=5.1e-5)
    np.testing.assert_allclose(got.std, by_channel.std(1, ddof=1), atol=5.1e-5)


def test_constant_images_get_a_usable_std():
    assert Preprocessing.measured([torch.zeros(3, 1, 2, 2, dtype=torch.uint8)]).std == (1e-3,)


floats = st.floats(-10, 10)
preprocessings = st.integers(1, 4096).flatmap(
    lambda side: st.builds(
        Preprocessing,
        size=st.tuples(st.just(side), st.integers(1, 4096)),
        channels=st.just(3),
        mean=st.tuples(floats, floats, floats),
        std=st.tuples(*[st.floats(1e-3, 10)] * 3),
        invert=st.booleans(),
        fit=st.sampled_from(["stretch", "crop", "pad"]),
        draft=st.booleans(),
    )
)


@given(preprocessings)
def test_preprocessing_survives_json(preprocessing):
    values = json.loads(json.dumps(preprocessing.to_json()))
    assert Preprocessing.from_json(values) == preprocessing


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"channels": 2}, "1 or 3"),
        ({"size": (0, 8)}, "1 to 4096"),
        ({"size": (8, 4097)}, "1 to 4096"),
        ({"mean": (0.5, 0.5)}, "one value a channel"),
        ({"std": (0.0,)}, "above 0"),
        ({"std": (float("nan"),)}, "finite"),
        ({"mean": (float("inf"),)}, "finite"),
        ({"fit": "squeeze"}, "stretch, crop or pad"),
    ],
)
def test_values_that_make_no_sense_are_refused(change, reason):
    with pytest.raises(ConfigError, match=reason):
        replace(GREY, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"size": [8]}, {"size": 8}, {"channels": None}, {"mean": "x"}, {"std": [[1]]},
        {"channels": float("inf")}, {"invert": "false"}, {"invert": 1}, {"draft": None},
        {"fit": ["crop"]},
    ],
    ids=repr,
)  # fmt: skip
def test_json_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match="preprocessing"):
        Preprocessing.from_json({**GREY.to_json(), **change})
