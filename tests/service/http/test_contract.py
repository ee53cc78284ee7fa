"""What the routes answer, over a socket, against figures computed here by other means."""

import base64
import json

import numpy as np
import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.montecarlo import Sampler
from dropserve.service import schemas
from tests.helpers import encode, noise

MLP, CNN = "digits-mlp", "colour-cnn"
SHAPES = {MLP: (8, 8), CNN: (16, 16, 3)}
SCALES = {MLP: ([0.3], [0.4]), CNN: ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])}
TARGETS = {
    "/{}": (MLP, 2),
    "/v1/models/digits-mlp/{}": (MLP, 2),
    "/v1/models/digits-mlp/versions/1/{}": (MLP, 1),
    "/v1/models/digits-mlp/versions/2/{}": (MLP, 2),
    "/v1/models/colour-cnn/{}": (CNN, 1),
    "/v1/models/colour-cnn/versions/1/{}": (CNN, 1),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def pictures(model, count, seed=0):
    return list(noise(count, *SHAPES[model], seed=seed))


def send_raw(http, path, images):
    assert len(images) == 1
    return http.post(path, content=encode(images[0]), headers={"Content-Type": "image/png"})


def send_form(http, path, images):
    return http.post(path, files=[("file", ("a.png", encode(image))) for image in images])


def send_base64(http, path, images):
    return http.post(path, json={"images": [base64.b64encode(encode(i)).decode() for i in images]})


def send_numbers(http, path, images):
    return http.post(path, json={"instances": [image.tolist() for image in images]})


SENDERS = [send_raw, send_form, send_base64, send_numbers]


def no_constant(name):
    raise AssertionError(f"{name} in JSON")


def answer(schema, response):
    """Read an answer as strictly as it was promised."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    json.loads(response.content, parse_constant=no_constant)
    found = schema.model_validate_json(response.content, strict=True)
    assert found.model_dump(mode="json", exclude_unset=True) == response.json()  # nothing else
    return found


@pytest.fixture(scope="session")
def load(checkpoints):
    """Load a version by itself: its module and the pictures' way into it."""

    def load(model, version, images):
        module, _ = checkpoint.load(checkpoints / model / str(version))
        pixels = np.stack(images).reshape(len(images), *SHAPES[model][:2], -1).transpose(0, 3, 1, 2)
        mean, std = (np.float64(v)[:, None, None] for v in SCALES[model])
        scaled = (255 - pixels if model == MLP else pixels) / 255.0
        return module, torch.from_numpy((scaled - mean) / std).float()

    return load


def softmax(logits):
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


@torch.no_grad()
def forward(module, x):
    return softmax(module(x).double().numpy())


def entropy(p):
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("send", SENDERS)
def test_predict_is_softmax_of_the_eval_forward(target, send, http, load):
    model, version = TARGETS[target]
    images = pictures(model, 1 if send is send_raw else 3)
    got = answer(schemas.PredictResponse, send(http, target.format("predict"), images))
    assert (got.model, got.version, len(got.predictions)) == (model, version, len(images))
    expected = forward(*load(model, version, images))
    for prediction, row in zip(got.predictions, expected, strict=True):
        np.testing.assert_allclose(prediction.probabilities, row, **CLOSE)
        assert prediction.index == row.argmax()
        assert prediction.label == f"class {prediction.index}"
        assert prediction.probability == max(prediction.probabilities)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("masks", ["stratified", "independent"])
def test_uncertainty_is_the_statistics_of_the_samples(target, masks, http, load):
    model, version = TARGETS[target]
    images = pictures(model, 3)
    path = target.format(f"uncertainty?samples=40&seed=7&masks={masks}&level=0.8")
    got = answer(schemas.UncertaintyResponse, send_form(http, path, images))
    assert (got.model, got.version, got.samples, got.seed) == (model, version, 40, 7)
    assert (got.masks, got.method, got.log_base) == (masks, "dropout", "e")
    module, x = load(model, version, images)
    samples = np.float64(Sampler(module, x).sample(x, 40, 7, masks))  # [T, B, C]
    blocks = samples.reshape(4, 10, *samples.shape[1:]).mean(1)
    error = {
        "independent": samples.std(0, ddof=1) / 40**0.5,
        "stratified": blocks.std(0, ddof=1) / 2,
    }
    for i, found in enumerate(got.predictions):
        p = samples[:, i]
        mean = p.mean(0)
        aleatoric = entropy(p).mean()
        votes = np.bincount(p.argmax(1))
        near = {
            "mean": mean,
            "variance": p.var(0, ddof=1),
            "standard_error": error[masks][i],
            "predictive_entropy": entropy(mean),
            "expected_entropy": aleatoric,
            "mutual_information": entropy(mean) - aleatoric,
            "variation_ratio": 1 - votes.max() / 40,
        }
        assert found.degrees_of_freedom == {"independent": 39, "stratified": 3}[masks]
        for name, value in near.items():
            np.testing.assert_allclose(getattr(found, name), value, **CLOSE, err_msg=name)
        np.testing.assert_allclose(found.interval.lower, np.quantile(p, 0.1, 0), **CLOSE)
        np.testing.assert_allclose(found.interval.upper, np.quantile(p, 0.9, 0), **CLOSE)
        assert (found.interval.level, found.sample_probabilities) == (0.8, None)
        assert (found.index, found.label) == (mean.argmax(), f"class {mean.argmax()}")


@pytest.mark.parametrize("model", [MLP, CNN])
def test_an_image_has_the_same_figures_alone_and_among_others(model, http):
    images = pictures(model, 32)
    for path in ("predict", "uncertainty?samples=20&seed=3&include_samples=true"):
        path = f"/v1/models/{model}/{path}"
        batch = send_form(http, path, images).json()["predictions"]
        for i in (0, 31):
            (alone,) = send_raw(http, path, images[i : i + 1]).json()["predictions"]
            assert alone.keys() == batch[i].keys()
            for name, value in alone.items():
                if name in ("label", "interval"):
                    assert name != "label" or value == batch[i][name]
                else:
                    np.testing.assert_allclose(value, batch[i][name], **CLOSE, err_msg=name)


def test_the_seed_alone_decides_the_masks(http):
    images = pictures(CNN, 1)
    path = "/v1/models/colour-cnn/{}"
    for task in ("uncertainty?samples=10", "compare?passes=2", "predict?"):
        first = send_raw(http, path.format(f"{task}"), images)
        assert first.content == send_raw(http, path.format(f"{task}"), images).content
        assert first.status_code == 200
        if "predict" not in task:
            other = send_raw(http, path.format(f"{task}&seed=1"), images)
            assert first.json()["predictions"] != other.json()["predictions"]


def test_one_sample_has_no_spread_and_no_nan(http):
    response = send_raw(http, "/uncertainty?samples=1&include_samples=true", pictures(MLP, 1))
    (found,) = answer(schemas.UncertaintyResponse, response).predictions
    assert (found.variance, found.standard_error, found.degrees_of_freedom) == (None,) * 3
    assert found.mutual_information == pytest.approx(0, abs=1e-7)
    assert found.sample_probabilities == [found.mean]
    assert found.interval.lower == found.interval.upper == found.mean


def test_included_samples_are_those_that_were_averaged(http):
    response = send_form(http, "/uncertainty?samples=30&include_samples=true", pictures(MLP, 2))
    for found in answer(schemas.UncertaintyResponse, response).predictions:
        samples = np.float64(found.sample_probabilities)
        assert samples.shape == (30, 10)
        np.testing.assert_allclose(samples.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(samples.mean(0), found.mean, **CLOSE)


@pytest.mark.parametrize("target", TARGETS)
def test_compare_shows_both_modes(target, http, load):
    model, version = TARGETS[target]
    images = pictures(model, 2)
    got = answer(
        schemas.CompareResponse, send_form(http, target.format("compare?passes=3&seed=5"), images)
    )
    assert (got.model, got.version, got.passes, got.seed) == (model, version, 3, 5)
    expected = forward(*load(model, version, images))
    served = send_form(http, target.format("predict"), images).json()["predictions"]
    for found, row, predicted in zip(got.predictions, expected, served, strict=True):
        first, second = found.eval
        assert first == second
        np.testing.assert_allclose(first, row, **CLOSE)
        np.testing.assert_allclose(first, predicted["probabilities"], **CLOSE)
        assert len({tuple(one) for one in found.train}) == 3
        np.testing.assert_allclose(np.mean(found.train, 0), found.train_mean, **CLOSE)
        gap = np.abs(np.subtract(found.train_mean, first)).sum() / 2
        assert found.distance == pytest.approx(gap, abs=1e-5)


@pytest.mark.parametrize("model", [MLP, CNN])
def test_compare_lists_every_layer_with_its_moments_and_rates(model, http, load):
    images = pictures(model, 2)
    response = send_form(http, f"/v1/models/{model}/compare", images)
    layers = answer(schemas.CompareResponse, response).layers
    module, x = load(model, 2 if model == MLP else 1, images)
    with torch.no_grad():
        for layer, (name, leaf) in zip(layers, module.named_children(), strict=True):
            x = leaf(x)
            assert (layer.name, layer.kind) == (name, type(leaf).__name__)
            assert layer.p == getattr(leaf, "p", None)
            assert layer.eval.mean == pytest.approx(float(x.mean()), abs=1e-4)
            assert layer.eval.variance == pytest.approx(float(x.var(correction=0)), rel=1e-3)
    dropped = [layer for layer in layers if layer.p]
    assert [layer.p for layer in dropped] == ([0.2, 0.5] if model == MLP else [0.1, 0.5])
    assert all(layer.train.variance > layer.eval.variance for layer in dropped)


def test_models_are_listed_and_described(http, load):
    listed = answer(schemas.ModelList, http.get("/v1/models")).models
    assert [(m.name, m.version, m.versions, m.default) for m in listed] == [
        (CNN, 1, [1], False),
        (MLP, 2, [1, 2], True),
    ]
    for path, version in ((f"/v1/models/{MLP}", 2), (f"/v1/models/{MLP}/versions/1", 1)):
        found = answer(schemas.ModelDetails, http.get(path))
        assert (found.name, found.version, found.training) == (MLP, version, False)
        assert [(site.name, site.p, site.shape) for site in found.sites] == [
            ("dropout1", 0.2, [32]),
            ("dropout2", 0.5, [32]),
        ]
        module, _ = load(MLP, version, pictures(MLP, 1))
        assert found.parameters == sum(p.numel() for p in module.parameters())
        assert len(found.sha256) == 64


def test_the_process_says_that_it_lives(http):
    assert answer(schemas.Health, http.get("/livez")).status == "ok"


@pytest.mark.parametrize("path", ["/readyz", "/healthz"])
def test_readiness_says_which_versions_are_there(path, http):
    found = answer(schemas.Readiness, http.get(path))
    assert {name: (m.versions, m.refused) for name, m in found.models.items()} == {
        CNN: ([1], []),
        MLP: ([1, 2], []),
    }
