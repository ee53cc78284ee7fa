"""Examples: they come back as the test set's pixels, and forged ones are refused."""

import base64
import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dropserve.models.checkpoint import MANIFEST, METADATA, Metadata, load, save
from dropserve.models.data import Split
from dropserve.models.errors import CheckpointRefused
from dropserve.models.examples import COUNT, choose
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from tests.helpers import chunk, encode, noise

GREY = Preprocessing((8, 6), 1, (0.5,), (0.25,))
COLOUR = Preprocessing((6, 8), 3, (0.5,) * 3, (0.25,) * 3)
CLASSES = ("a", "b", "c")


def split(preprocessing, labels):
    pixels = torch.from_numpy(noise(len(labels), *preprocessing.shape))
    return Split(pixels, torch.tensor(labels))


def opened(example):
    return Image.open(io.BytesIO(example.file))


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("preprocessing", [GREY, COLOUR], ids=["grey", "colour"])
def test_an_image_becomes_the_pixels_that_it_was_made_from(preprocessing, invert):
    preprocessing = replace(preprocessing, invert=invert)
    test = split(preprocessing, [0, 1, 2] * 10)
    chosen = choose(test, 3, preprocessing)
    assert len(chosen) == 24
    for row, example in enumerate(chosen):
        assert example.index == row % 3
        pixels = preprocessing.prepare(opened(example))
        np.testing.assert_array_equal(pixels, test.images[row].numpy())


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([0] * 50 + [1] * 50, 2, [0, 1] * 12),
        ([0, 0, 0, 1], 2, [0, 1, 0, 0]),
        (list(range(10)) * 9, 10, list(range(10)) * 2),
        (list(range(40)), 40, list(range(24))),
        ([2], 5, [2]),
    ],
)
def test_classes_take_turns_and_have_as_many_each(labels, classes, expected):
    assert [e.index for e in choose(split(GREY, labels), classes, GREY)] == expected


def test_large_images_are_fewer_and_the_description_stays_short(tmp_path):
    large = Preprocessing((224, 224), 3, (0.5,) * 3, (0.25,) * 3)
    few = choose(split(large, [0, 1, 2] * 8), 3, large)
    assert [e.index for e in few] == [0, 1]
    assert choose(split(replace(large, size=(512, 512)), [0]), 1, large) == ()
    network = NetworkConfig("cnn", large.shape, 3, (4,), (0.5,), (4,))
    path = save(tmp_path, network.build(), Metadata("net", network, large, CLASSES, examples=few))
    assert (path / METADATA).stat().st_size < 700_000
    assert load(path)[1].examples == few


@pytest.fixture
def path(tmp_path):
    network = NetworkConfig("mlp", GREY.shape, 3, (6,), (0.5,))
    examples = choose(split(GREY, [0, 1, 2]), 3, GREY)
    return save(
        tmp_path, network.build(), Metadata("net", network, GREY, CLASSES, examples=examples)
    )


def change(path, edit):
    values = json.loads((path / METADATA).read_text())
    edit(values)
    (path / METADATA).write_text(json.dumps(values))
    (path / MANIFEST).unlink()  # as in an older checkpoint


def test_an_older_checkpoint_has_none(path):
    change(path, lambda values: values.pop("examples"))
    assert load(path)[1].examples == ()


def png(*size, mode="L", **options):
    return encode(Image.new(mode, size or (6, 8)), options.pop("format", "PNG"), **options)


def with_text(data):
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    return data[:33] + bomb + data[33:]


TRANSPARENT = png(transparency=3)
BAD_PNGS = {
    "another size": png(8, 6),
    "an endless size": png()[:16] + b"\xff" * 8 + png()[24:],
    "colour": png(mode="RGB"),
    "one bit": png(mode="1"),
    "a palette": png(mode="P"),
    "16 bits": png(mode="I;16"),
    "transparency": TRANSPARENT,
    "JPEG": png(format="JPEG"),
    "cut short": png()[:45],
    "a text bomb": with_text(png()),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BAD_PNGS)
def test_a_file_that_is_no_such_image_is_refused(name, path):
    def edit(values):
        values["examples"][1]["png"] = base64.b64encode(BAD_PNGS[name]).decode()

    change(path, edit)
    with pytest.raises(CheckpointRefused, match=r"examples\[1\]\.png: "):
        load(path)


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        (None, "examples: a list"),
        ({}, "examples: a list"),
        ([{"index": 0, "png": ""}] * (COUNT + 1), "at most 24"),
        (["x"], r"examples\[0\]: `index` and `png`"),
        ([{"index": 0}], r"examples\[0\]: `index` and `png`"),
        ([{"index": 0, "png": "", "x": 1}], r"examples\[0\]: `index` and `png`"),
        ([{"index": 3, "png": ""}], r"examples\[0\]\.index"),
        ([{"index": -1, "png": ""}], r"examples\[0\]\.index"),
        ([{"index": True, "png": ""}], r"examples\[0\]\.index"),
        ([{"index": "0", "png": ""}], r"examples\[0\]\.index"),
        ([{"index": 0, "png": "?"}], r"examples\[0\]\.png"),
        ([{"index": 0, "png": 5}], r"examples\[0\]\.png"),
        ([{"index": 0, "png": None}], r"examples\[0\]\.png"),
    ],
    ids=str,
)
def test_examples_that_make_no_sense_are_refused(examples, reason, path):
    change(path, lambda values: values.update(examples=examples))
    with pytest.raises(CheckpointRefused, match=reason):
        load(path)
