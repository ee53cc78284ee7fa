"""Every method from training to answers over a socket, and what one more method takes."""

import json
import socket
import threading
from base64 import b64decode
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
import uvicorn

from dropserve.models import checkpoint, recipes
from dropserve.models.montecarlo import Sampler
from dropserve.models.processes import launch
from dropserve.models.regularizers import METHODS, Elementwise, Gaussian, Method
from dropserve.models.training import fit
from dropserve.service.app import create_app
from dropserve.service.server import uvicorn_options
from dropserve.service.settings import Settings
from tests.helpers import encode, eventually, noise

NETWORKS = {
    "dropout": "mlp", "vanilla": "cnn", "spatial": "wrn", "gaussian": "gru", "noise": "vit",
    "dropconnect": "mlp", "variational": "gru", "zoneout": "gru",
}  # fmt: skip
SMALL = {
    "mlp": {"hidden": (16, 8)},
    "cnn": {"hidden": (16,), "channels": (4,)},
    "gru": {"hidden": (12,)},
    "wrn": {"channels": (4, 6)},
    "vit": {"hidden": (8,), "blocks": 1, "stochastic_depth": 0.0},
}
RATE = 0.4
QUERY = {"samples": 30, "seed": 7}
PICTURE = noise(8, 8, seed=3)
PNG = {"content": encode(PICTURE), "headers": {"Content-Type": "image/png"}}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
FIGURES = ("mean", "variance", "standard_error", "predictive_entropy", "mutual_information")


def train(root, name, network, regularizer, rate):
    """Train a few steps on digits, and save what has come of it."""
    recipe = {"epochs": 1, "batch_size": 256, "learning_rate": 0.02, "threads": 1}
    asked = SMALL[network] | {"regularizer": regularizer, "dropout": (rate,)}
    plan = recipes.plan("digits", network, root, recipe=recipe, asked=asked)
    (epoch,) = fit(
        plan.module,
        plan.data.train,
        plan.data.preprocessing.normalize,
        plan.recipe,
        fabric=launch("cpu"),
        description=plan.description(),
    )
    assert np.isfinite(epoch.loss)
    checkpoint.save(root, plan.module, plan.metadata(name, plan.recipe))


def loaded(root, name):
    """Return a saved model's sampler, and the picture as its network gets it."""
    module, metadata = checkpoint.load(root / name / "1")
    x = metadata.preprocessing.normalize(torch.from_numpy(PICTURE)[None, None])
    return module, Sampler(module, x), x


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a model of every method, and one whose rates are all 0."""
    folder = tmp_path_factory.mktemp("methods")
    for name in METHODS:
        train(folder, name, NETWORKS[name], name, RATE)
    train(folder, "none", "mlp", "dropout", 0.0)
    return folder


@pytest.fixture(scope="module")
def http(make_server, root):
    server = make_server(root, default_model="dropout").start()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
    assert "Traceback" not in server.errors.read_text()


def ask(http, path, **query):
    return http.post(f"/v1/models/{path}", params=query, **PNG).raise_for_status().json()


def events(text):
    """Read server-sent events: pairs of name and data."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(e.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for e, d in blocks]


def assert_answers(http, name, root):
    """Hold every route against the checkpoint, sampled here; return the uncertainty."""
    module, sampler, x = loaded(root, name)
    with torch.no_grad():
        plain = module(x).softmax(-1)[0].numpy()
    (predicted,) = ask(http, f"{name}/predict")["predictions"]
    np.testing.assert_allclose(predicted["probabilities"], plain, **CLOSE)

    (found,) = ask(http, f"{name}/uncertainty", **QUERY)["predictions"]
    assert ask(http, f"{name}/uncertainty", **QUERY)["predictions"] == [found]
    summary = sampler.summarize(x, **QUERY)
    assert max(found["variance"]) > 1e-6
    for figure in FIGURES:
        assert np.isfinite(found[figure]).all()
        np.testing.assert_allclose(found[figure], getattr(summary, figure)[0], **CLOSE)

    stream = http.post(f"/v1/models/{name}/uncertainty/stream", params=QUERY, **PNG)
    (_, start), *samples, (_, end) = events(stream.raise_for_status().text)
    assert [event for event, _ in samples] == ["sample"] * 30
    for figure in set(FIGURES) - {"variance"}:
        np.testing.assert_allclose(samples[-1][1][figure], found[figure], **CLOSE)
    np.testing.assert_allclose(end["predictions"][0]["variance"], found["variance"], **CLOSE)
    for site, kept in zip(start["sites"], samples[0][1]["kept"], strict=True):
        bits = 1 if site["distribution"] == "bernoulli" else 8
        assert len(b64decode(kept)) == -(-site["units"] * bits // 8)

    compared = ask(http, f"{name}/compare", passes=4, seed=7)
    (row,) = compared["predictions"]
    np.testing.assert_allclose(row["eval"], [plain, plain], **CLOSE)
    passes = sampler.sample(x, 4, 7, "independent")[:, 0]
    np.testing.assert_allclose(row["train"], passes, **CLOSE)

    about = http.get(f"/v1/models/{name}").raise_for_status().json()
    laws = [
        (site.name, site.kind, type(site.law).__name__.lower(), site.p, site.law.mean, site.law.std)
        for site in sampler.sites
    ]
    keys = ("name", "kind", "distribution", "p", "mean", "std")
    assert [tuple(site[key] for key in keys) for site in about["sites"]] == laws
    assert about["network"]["regularizer"] == name
    rates = {layer["name"]: layer["p"] for layer in compared["layers"]}
    told = {site.name.partition(":")[0]: site.p for site in sampler.sites}
    assert {n: p for n, p in told.items() if n in rates}.items() <= rates.items()

    image = {"name": "image", "shape": [1, 8, 8], "datatype": "UINT8", "data": [PICTURE.tolist()]}
    body = {"inputs": [image], "parameters": {"mode": "uncertainty", **QUERY}}
    answer = http.post(f"/v2/models/{name}/infer", json=body).raise_for_status().json()
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    np.testing.assert_allclose(outputs["mean"], found["mean"], **CLOSE)
    return about["sites"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_trained_saved_served_and_sampled(name, http, root):
    for site in assert_answers(http, name, root):
        assert site["kind"] == name
        gaussian = name in ("gaussian", "noise")
        assert site["distribution"] == ("gaussian" if gaussian else "bernoulli")
        assert site["p"] == (None if name == "noise" else RATE)


def test_a_network_without_noise_predicts_and_says_that_it_cannot_be_sampled(http, problem):
    assert ask(http, "none/predict")["predictions"][0]["label"] in "0123456789"
    about = http.get("/v1/models/none").raise_for_status().json()
    assert (about["sites"], about["path"]) == ([], None)
    for path in ("uncertainty", "uncertainty/stream", "compare"):
        detail = problem(http.post(f"/v1/models/none/{path}", **PNG), 422)
        assert detail == "this model draws no noise to sample: ask it to predict"


class Flicker(Elementwise):
    """Multiplies all units of an example by one normal number: a method that is not ours."""

    def __init__(self, std, scope="example"):
        super().__init__(Gaussian("flicker", 1.0, std), scope)

    def units(self, x):
        return len(x), *(1 for _ in x.shape[1:])


@contextmanager
def serving(root):
    """Serve from a thread of this process, which knows the method."""
    settings = Settings(checkpoints=root, precision="float32")
    server = uvicorn.Server(uvicorn.Config(create_app(settings), **uvicorn_options(settings)))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            eventually(lambda: server.started)
            with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}") as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def test_a_layer_and_an_entry_in_the_registry_are_all_that_a_method_takes(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "flicker", Method(Flicker, ("mlp", "wrn")))
    train(tmp_path, "flicker", "mlp", "flicker", RATE)
    with serving(tmp_path) as http:
        sites = assert_answers(http, "flicker", tmp_path)
    assert [(s["name"], s["shape"], s["std"]) for s in sites] == [
        ("dropout1", [1], RATE), ("dropout2", [1], RATE),
    ]  # fmt: skip
    _, sampler, x = loaded(tmp_path, "flicker")
    got, sampler.path = sampler.sample(x, 20), "loop"
    torch.testing.assert_close(sampler.sample(x, 20), got, rtol=0, atol=1e-5)
