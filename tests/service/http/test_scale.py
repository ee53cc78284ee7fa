"""Pixels that are scaled to 0..1: refused with the remedy, or read by `scale=1`, on every route."""

import base64
import json
import re

import numpy as np
import pytest

from tests.helpers import encode, noise

MLP = "digits-mlp"
INFER = f"/v2/models/{MLP}/infer"
PIXELS = noise(2, 8, 8)
SCALED = np.float32(PIXELS) / np.float32(255)
TASKS = ["predict", "uncertainty?samples=20", "uncertainty/stream?samples=5", "compare?passes=2"]
REMEDY = "no pixel is above 1 and some are not whole: .*Send 0 to 255, or scale=1 if 1 is white"


def with_scale(path):
    return f"{path}{'&' if '?' in path else '?'}scale=1"


def images(path, values):
    """As many as the route takes."""
    return values[:1] if "stream" in path else values


def tensor(values, *, binary=False, **parameters):
    """An FP32 input, in JSON or as binary data: what httpx is to post."""
    found = {"name": "image", "shape": list(values.shape), "datatype": "FP32"}
    data = np.float32(values).tobytes() if binary else b""
    found |= (
        {"parameters": {"binary_data_size": len(data)}} if binary else {"data": values.tolist()}
    )
    head = json.dumps({"parameters": parameters, "inputs": [found]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
    return {"content": head + data, "headers": headers}


@pytest.mark.parametrize("path", TASKS)
def test_a_scale_of_one_reads_the_same_pixels(path, http):
    expected = http.post(f"/{path}", json={"instances": images(path, PIXELS).tolist()})
    assert expected.status_code == 200
    scaled = {"instances": images(path, SCALED).tolist()}
    assert http.post(f"/{with_scale(path)}", json=scaled).content == expected.content
    assert http.post(f"/{path}", json=scaled | {"scale": 1}).content == expected.content


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_a_scale_of_one_reads_the_same_tensor(binary, http):
    expected = http.post(INFER, **tensor(PIXELS, binary=binary)).raise_for_status().content
    assert http.post(INFER, **tensor(SCALED, binary=binary, scale=1)).content == expected


def test_pixels_of_a_mask_may_be_zero_and_one_by_either_scale(http):
    mask = (PIXELS > 127).astype(np.uint8)
    dark, light = (
        http.post(f"/predict?scale={s}", json={"instances": mask.tolist()}) for s in (255, 1)
    )
    white = http.post("/predict", json={"instances": (mask * 255).tolist()})
    assert dark.status_code == light.status_code == 200
    assert light.content == white.content != dark.content
    named = {
        "name": "image",
        "shape": [2, 8, 8],
        "datatype": "UINT8",
        "data": mask.ravel().tolist(),
    }
    body = {"inputs": [named], "parameters": {"scale": 1}}
    found = http.post(INFER, json=body).raise_for_status().json()["outputs"][0]["data"]
    rows = [p["probabilities"] for p in white.json()["predictions"]]
    np.testing.assert_allclose(found, np.ravel(rows), atol=1e-6)


@pytest.mark.parametrize("path", TASKS)
def test_scaled_pixels_are_refused_with_what_to_do(path, http, problem):
    scaled = {"instances": images(path, SCALED).tolist()}
    assert re.fullmatch(f"(image 0: )?{REMEDY}", problem(http.post(f"/{path}", json=scaled), 422))


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_each_picture_of_a_batch_is_looked_at_alone(binary, http, problem, protocol_error):
    mixed = np.stack([PIXELS[0], PIXELS[1] * 0, SCALED[1]])  # one without light is no mistake
    assert re.fullmatch(
        f"image 2: {REMEDY}", protocol_error(http.post(INFER, **tensor(mixed, binary=binary)), 422)
    )
    refused = http.post("/predict", json={"instances": mixed.tolist()})
    assert re.fullmatch(f"image 2: {REMEDY}", problem(refused, 422))


@pytest.mark.parametrize(
    ("values", "scale", "most"),
    [(-1 / 255, 1, 1), (1.01, 1, 1), (-0.5, 255, 255), (255.5, 255, 255)],
)
@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_numbers_out_of_the_scale_are_refused(
    values, scale, most, binary, http, problem, protocol_error
):
    wrong = np.array([[[values, 1]]], np.float32)
    expected = f"pixels must be numbers from 0 to {most}"
    found = protocol_error(http.post(INFER, **tensor(wrong, binary=binary, scale=scale)), 422)
    assert found == expected
    body = {"instances": wrong.tolist(), "scale": scale}
    assert problem(http.post("/predict", json=body), 422) == expected


def test_encoded_pictures_take_no_other_scale(http, problem):
    png, kind = encode(PIXELS[0]), {"Content-Type": "image/png"}
    text = {"images": [base64.b64encode(png).decode()]}
    for sent in (
        {"content": png, "headers": kind},
        {"files": [("file", ("a.png", png))]},
        {"json": text},
    ):
        assert "encoded images" in problem(http.post("/predict?scale=1", **sent), 422)
        assert http.post("/predict?scale=255", **sent).status_code == 200
    assert "leave one out" in problem(http.post("/predict?scale=1", json=text | {"scale": 1}), 422)
