"""A server whose models lie in object storage, over HTTP; and more models than it may load."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.bucket import Bucket
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from tests.helpers import dropserve, encode, eventually, noise
from tests.storage import URL

PREPROCESSING = Preprocessing((8, 8), 1, (0.3,), (0.4,))
NETWORK = NetworkConfig("mlp", PREPROCESSING.shape, 3, (8,), (0.5,))
PIXELS = noise(8, 8)
POST = {"content": encode(PIXELS), "headers": {"Content-Type": "image/png"}}


def about(name):
    return checkpoint.Metadata(name, NETWORK, PREPROCESSING, ("a", "b", "c"))


def module(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORK.build().eval()


def answer(seed):
    """What the module of a seed says of the picture."""
    x = PREPROCESSING.normalize(torch.from_numpy(PIXELS)[None, None])
    with torch.inference_mode():
        return pytest.approx(module(seed)(x)[0].softmax(-1).tolist(), abs=1e-5)


@pytest.fixture
def published(storage, monkeypatch, tmp_path):
    """A bucket with a version of `net`."""
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    made = Bucket(URL, tmp_path / "publisher", 2**30)
    made.save(module(1), about("net"))
    return made


def test_a_server_follows_a_bucket_and_outlives_its_failures(
    published, storage, make_server, tmp_path
):
    options = {"cache": tmp_path / "cache", "poll_seconds": 0.2, "default_model": "net"}
    server = make_server(URL, **options).start()
    with httpx.Client(base_url=server.url) as client:

        def says():
            found = client.post("/predict", **POST).json()
            return found["version"], found["predictions"][0]["probabilities"]

        def ready():
            found = client.get("/readyz")
            assert found.status_code == 200
            return found.json()

        def follows(version):
            assert eventually(lambda: says()[0] == version, 20, 0.05)
            assert says()[1] == answer(version)

        assert says() == (1, answer(1))
        assert published.save(module(2), about("net")) == 2
        follows(2)

        storage.fault = lambda *_: "InvalidAccessKeyId"
        text = "cannot be listed: InvalidAccessKeyId: check the credentials"
        assert eventually(lambda: text in (ready()["problem"] or ""), 20, 0.05)
        assert says() == (2, answer(2))
        assert "dropserve_checkpoints_problem 1.0" in client.get("/metrics").text
        storage.fault = lambda *_: None
        assert eventually(lambda: ready()["problem"] is None, 20, 0.05)
        assert "dropserve_checkpoints_problem 0.0" in client.get("/metrics").text

        def damaged(method, path):
            return "corrupt" if method == "GET" and "/3/model.safetensors" in path else None

        storage.fault = damaged
        assert published.save(module(3), about("net")) == 3
        refused = eventually(lambda: ready()["models"]["net"]["refused"], 20, 0.05)
        assert refused[0]["version"] == 3
        assert refused[0]["reason"].startswith("net/3/model.safetensors: damaged or replaced")
        assert says() == (2, answer(2))
        storage.fault = lambda *_: None
        follows(3)

        files = checkpoint.dump(module(4), about("net"))
        for name in ("model.json", "model.safetensors"):
            published._store.put(f"net/4/{name}", files[name])
        refused = eventually(lambda: ready()["models"]["net"]["refused"], 20, 0.05)
        assert "incomplete: no manifest.json" in refused[0]["reason"]
        gauge = 'dropserve_model_refused_versions{model="net"} 0.0'
        assert gauge in client.get("/metrics").text  # it is being uploaded
        assert says()[0] == 3
        published._store.put("net/4/manifest.json", files["manifest.json"])
        follows(4)

        dropserve("pin", "net", "2", "--checkpoints", URL)
        follows(2)
    ready_lines = [line["version"] for line in server.lines() if line["message"] == "version ready"]
    assert ready_lines.count(3) == 1  # though it was refused before
    messages = [line["message"] for line in server.lines()]
    assert messages.count("the checkpoints can be listed again") == 1
    assert sum("check the credentials" in message for message in messages) == 1
    assert server.stop() == 0


def test_a_start_without_storage(published, storage, make_server, tmp_path):
    options = {"cache": tmp_path / "cache", "default_model": "net", "poll_seconds": 0.2}
    make_server(URL, **options).start().stop()
    storage.fault = lambda *_: "AccessDenied"
    refused = make_server(URL, **options)
    assert refused.process.wait(60) == 1
    text = "s3://models/prod: cannot be listed: AccessDenied: check what the credentials allow"
    assert text in refused.errors.read_text()
    server = make_server(URL, start_from_cache=True, workers=2, **options).start()
    with httpx.Client(base_url=server.url) as client:
        found = client.post("/predict", **POST).json()["predictions"][0]
        assert found["probabilities"] == answer(1)
        assert "started from the cache" in client.get("/readyz").json()["problem"]
        assert any("started from the cache" in line["message"] for line in server.lines())
        storage.fault = lambda *_: None
        published.save(module(2), about("net"))
        assert eventually(lambda: client.post("/predict", **POST).json()["version"] == 2, 20, 0.05)


def test_a_cached_model_does_not_wait_for_a_listing(published, storage, make_server, tmp_path):
    """While the storage stalls, what is on this machine is loaded all the same."""
    published.save(module(2), about("other"))
    reached, done = threading.Event(), threading.Event()

    def stall(method, path):
        if method == "GET" and "list-type" in path:
            reached.set()
            done.wait(20)

    options = {"cache": tmp_path / "cache", "default_model": "net", "poll_seconds": 0.2}
    server = make_server(URL, max_loaded_models=1, **options).start()
    with httpx.Client(base_url=server.url) as client:

        def says(name):
            found = client.post(f"/v1/models/{name}/predict", **POST)
            return found.json()["predictions"][0]["probabilities"]

        assert says("other") == answer(2)  # which unloads net
        storage.fault = stall
        assert reached.wait(20)
        try:
            assert says("net") == answer(1)
            assert says("other") == answer(2)
        finally:
            storage.fault = lambda *_: None
            done.set()


NAMES = [f"net-{k}" for k in range(5)]


def test_models_are_loaded_when_they_are_asked_for(make_server, tmp_path):
    for seed, name in enumerate(NAMES):
        checkpoint.save(tmp_path, module(seed), about(name))
    server = make_server(
        tmp_path,
        max_loaded_models=2,
        default_model="net-0",
        poll_seconds=0.2,
        admin_token="x" * 16,
    ).start()
    with httpx.Client(base_url=server.url, timeout=30) as client:

        def loaded():
            models = client.get("/readyz").json()["models"]
            return [name for name, state in models.items() if state["versions"]]

        assert loaded() == ["net-0"]
        listed = client.get("/v1/models").json()["models"]
        assert [(m["name"], m["version"], m["on_request"]) for m in listed] == [
            ("net-0", 1, []),
            *((name, None, [1]) for name in NAMES[1:]),
        ]
        for seed, name in enumerate(NAMES):
            found = client.post(f"/v1/models/{name}/predict", **POST).json()
            assert found["predictions"][0]["probabilities"] == answer(seed)
        assert loaded() == ["net-3", "net-4"]
        client.post("/v1/models/net-3/predict", **POST)
        assert client.get("/v2/models/net-1/ready").status_code == 200  # loads nothing
        assert client.get("/v1/models/net-1/versions/7").status_code == 404  # likewise
        assert loaded() == ["net-3", "net-4"]
        assert client.get("/v1/models/net-1").json()["version"] == 1
        assert loaded() == ["net-1", "net-3"]
        checkpoint.save(tmp_path, module(9), about("net-1"))
        path = "/v1/models/net-1/predict"
        assert eventually(lambda: client.post(path, **POST).json()["version"] == 2, 20, 0.05)
        assert client.post("/v1/models/net-9/predict", **POST).status_code == 404
        said = dropserve("models", "--url", server.url)
        assert "net-0 is loaded when it is asked for: versions 1" in said

        start = threading.Barrier(len(NAMES))
        answers = [answer(seed) for seed in range(len(NAMES))]

        def ask(seed):
            start.wait()
            with httpx.Client(base_url=server.url, timeout=30) as own:
                for _ in range(10):
                    found = own.post(f"/v1/models/net-{seed}/versions/1/predict", **POST)
                    if found.status_code == 200:
                        probabilities = found.json()["predictions"][0]["probabilities"]
                        assert probabilities == answers[seed]
                    else:
                        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
            return True

        with ThreadPoolExecutor(len(NAMES)) as pool:
            assert all(pool.map(ask, range(len(NAMES))))
        assert len(loaded()) <= 2

        (tmp_path / "net-2" / "1" / "model.json").write_text("{")
        client.post("/v1/models/net-0/predict", **POST)
        client.post("/v1/models/net-1/predict", **POST)
        before = loaded()
        found = client.post("/v1/models/net-2/predict", **POST)
        assert loaded() == before  # none is unloaded for one that cannot be loaded
        assert (found.status_code, "readyz says why" in found.text) == (503, True)
        assert client.post("/v1/models/net-2/predict", **POST).status_code == 503
        assert client.get("/readyz").json()["models"]["net-2"]["refused"]
        token = {"Authorization": f"Bearer {'x' * 16}"}
        url = "/v2/repository/models/net-4"
        assert client.post(f"{url}/load", headers=token).status_code == 200
        assert "net-4" in loaded()
        assert client.post(f"{url}/unload", headers=token).status_code == 200
        assert client.post("/v1/models/net-4/predict", **POST).status_code == 404
