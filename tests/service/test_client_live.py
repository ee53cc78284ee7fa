"""Both clients against a real server: every route, and the same answers."""

import inspect
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from dropserve.service import errors, schemas
from dropserve.service.client import AsyncDropserveClient, DropserveClient
from dropserve.service.schemas import StreamEnd, StreamStart
from tests.helpers import Caller, encode, noise

PNG, OTHER = encode(noise(8, 8, seed=1)), encode(noise(8, 8, seed=2))


@pytest.fixture(params=["sync", "async"])
def call(request, server):
    return Caller(request.param, server.url)


def test_the_two_clients_have_the_same_methods_and_arguments():
    def public(client):
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(client).items()
            if not name.startswith("_")
        }

    assert public(DropserveClient) == public(AsyncDropserveClient)


def test_several_images_are_answered_in_their_order(call):
    together = call("predict", [PNG, OTHER]).predictions
    alone = [call("predict", image).predictions[0] for image in (PNG, OTHER)]
    assert [p.index for p in together] == [p.index for p in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def as_arrays(shape):
    """Pixels of a colour image as each kind of image that the client takes."""
    pixels = noise(*shape, seed=4)
    return pixels, encode(pixels)


@pytest.mark.parametrize("shape", [(16, 16, 3), (9, 21, 3), (16, 16, 4), (16, 16), (3, 5, 1)])
def test_arrays_and_pil_images_are_answered_as_the_same_pixels_in_a_file(call, shape):
    pixels, file = as_arrays(shape[:2] if shape[-1] == 1 else shape)
    same = [file, pixels.reshape(shape), Image.open(io.BytesIO(file)), pixels[::-1][::-1]]
    said = call("predict", same, model="colour-cnn").predictions
    assert len(said) == 4
    for one in said:
        assert one.probabilities == pytest.approx(said[0].probabilities, abs=1e-6)
    alone = call("uncertainty", pixels, model="colour-cnn", samples=10).predictions
    assert alone[0].mean == pytest.approx(
        call("uncertainty", file, model="colour-cnn", samples=10).predictions[0].mean, abs=1e-5
    )
    assert call("uncertainty_stream", pixels, samples=1)[-1].predictions


@pytest.mark.parametrize("mode", ["1", "P", "LA", "CMYK", "YCbCr", "turned"])
def test_a_pil_image_of_any_mode_is_seen_as_pillow_shows_it(call, mode):
    pixels, _ = as_arrays((9, 21, 3))
    image = Image.fromarray(pixels)
    if mode == "turned":
        exif = image.getexif()
        exif[0x0112], exif[0x010E] = 6, "a description, which is nobody's business"
        image = Image.open(io.BytesIO(encode(image, "JPEG", exif=exif)))
        shown = ImageOps.exif_transpose(image)
    else:
        image = image.convert(mode)
        shown = image
    expected = call("predict", np.asarray(shown.convert("RGB")), model="colour-cnn")
    said = call("predict", image, model="colour-cnn")
    assert said.predictions[0].probabilities == pytest.approx(
        expected.predictions[0].probabilities, abs=1e-6
    )


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8)),
        np.zeros((8, 8), np.uint16),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8), np.uint8),
        Image.new("F", (8, 8)),
        Image.new("I;16", (8, 8)),
    ],
    ids=["float", "uint16", "channels first", "a batch", "empty", "F", "I;16"],
)
def test_pixels_of_another_type_or_shape_are_refused_before_they_are_sent(call, image):
    with pytest.raises(ValueError, match=r"uint8 from 0 to 255, H x W|no 8 bits a channel"):
        call("predict", image)


def test_a_stream_ends_with_what_uncertainty_answers(call):
    how = {"samples": 30, "seed": 5, "masks": "independent", "level": 0.8}
    start, *samples, end = call("uncertainty_stream", PNG, **how)
    assert isinstance(start, StreamStart)
    assert (start.samples, start.seed, start.level) == (30, 5, 0.8)
    assert [sample.t for sample in samples] == list(range(1, 31))
    assert isinstance(end, StreamEnd)
    whole = call("uncertainty", PNG, **how)
    assert end.predictions[0].mean == pytest.approx(whole.predictions[0].mean, abs=1e-5)
    assert samples[-1].mean == pytest.approx(whole.predictions[0].mean, abs=1e-5)


def test_a_stream_that_is_left_leaves_the_service_well(server):
    with DropserveClient(server.url) as client:
        for event in client.uncertainty_stream(PNG, samples=1000):
            assert isinstance(event, StreamStart)
            break
        assert client.predict(PNG).predictions


def test_compare_takes_another_rate_for_train_mode(call):
    usual, none = call("compare", PNG, passes=2), call("compare", PNG, passes=2, p=0.0)
    assert usual.predictions[0].train[0] != usual.predictions[0].train[1]
    assert none.p == 0.0
    assert none.predictions[0].train[0] == pytest.approx(none.predictions[0].eval[0], abs=1e-5)


def test_what_is_served_and_whether_it_is_ready(call):
    assert [m.name for m in call("models").models] == ["colour-cnn", "digits-mlp"]
    assert call("model", "digits-mlp").classes[3] == "class 3"
    assert call("model", "digits-mlp", 1).version == 1
    assert call("live") is True
    assert call("ready") is True
    assert sorted(call("readiness").models["digits-mlp"].versions) == [1, 2]


def test_examples_of_a_model_saved_without(call):
    assert call("examples", "digits-mlp") == schemas.ExampleList(
        model="digits-mlp", version=2, examples=[]
    )
    with pytest.raises(errors.NotFound):
        call("example", "digits-mlp", 2, 0)
