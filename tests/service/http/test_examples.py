"""Examples over HTTP: listed, sent as PNG, and the test set's pixels when they are posted back."""

import base64

import httpx
import numpy as np
import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.data import load_dataset
from dropserve.models.networks import default_config
from dropserve.service.schemas import ExampleList
from tests.helpers import dropserve

MODEL = "/v1/models/digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_dataset("digits", tmp_path_factory.mktemp("none"), invert=True)


@pytest.fixture(scope="module")
def http(tmp_path_factory, make_server, digits):
    root = tmp_path_factory.mktemp("examples")
    network = default_config("mlp", digits.preprocessing.shape, 10)
    about = checkpoint.Metadata("digits", network, digits.preprocessing, digits.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checkpoint.save(root, network.build(), about)  # as before there were examples
    train = "train --dataset digits --invert --epochs 1 --samples 0 --name digits --checkpoints"
    dropserve(*train.split(), root)
    server = make_server(root, default_model=None).start()
    with httpx.Client(base_url=server.url) as client:
        yield client


def listed(http, path):
    response = http.get(path)
    assert response.status_code == 200
    found = ExampleList.model_validate_json(response.content, strict=True)
    assert found.model_dump(mode="json") == response.json()
    return found


def test_each_is_the_test_sets_picture_to_the_bit(http, digits):
    found = listed(http, MODEL + "/examples")
    assert (found.model, found.version) == ("digits", 2)
    assert [example.index for example in found.examples] == list(range(10)) * 2
    for example in found.examples:
        picture = http.get(example.url)
        assert picture.headers["content-type"] == "image/png"
        assert picture.headers["x-content-type-options"] == "nosniff"
        assert "max-age=" in picture.headers["cache-control"]
        headers = {"Content-Type": "image/png"}
        path = MODEL + "/uncertainty/stream?samples=1"
        text = http.post(path, content=picture.content, headers=headers).text
        encoded = text.partition('"pixels":"')[2].partition('"')[0]
        pixels = np.frombuffer(base64.b64decode(encoded), np.uint8)
        same = (digits.test.images.flatten(1).numpy() == pixels).all(1)
        assert example.index in digits.test.labels.numpy()[same]
        assert example.label == digits.classes[example.index]


def test_the_list_of_a_version_leads_to_its_own(http):
    found = listed(http, MODEL + "/versions/2/examples")
    assert found == listed(http, MODEL + "/examples")
    assert found.examples[19].url == "/v1/models/digits/versions/2/examples/19"


def test_a_version_that_was_saved_without_has_none(http, problem):
    assert listed(http, MODEL + "/versions/1/examples").examples == []
    problem(http.get(MODEL + "/versions/1/examples/0"), 404)


@pytest.mark.parametrize("number", ["20", "-1", "x", "1.0", "%D9%A1", "9" * 5000, "0x1", "%00"])
def test_another_number_model_or_version_is_404(number, http, problem):
    for path in (f"2/examples/{number}", "3/examples", "3/examples/0"):
        problem(http.get(f"{MODEL}/versions/{path}"), 404)
    problem(http.get("/v1/models/MARKER/examples"), 404)
