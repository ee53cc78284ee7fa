"""New versions under load, over a socket, with two workers: no request fails, none is mistaken."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from bisect import bisect
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from tests.helpers import dropserve, encode, eventually, noise, workers

POLL = 0.3
CONNECTIONS = 32
PREPROCESSING = Preprocessing((8, 8), 1, (0.3,), (0.4,))
NETWORK = NetworkConfig("mlp", PREPROCESSING.shape, 10, (32, 32), (0.2, 0.5))
CLASSES = tuple(f"class {k}" for k in range(10))
PIXELS = noise(8, 8)
PICTURE = encode(PIXELS)


def rewritten(change):
    """Change the bytes of the weights."""

    def harm(folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(change(weights.read_bytes()))

    return harm


def edited(change):
    """Change the description."""

    def harm(folder):
        about = json.loads((folder / "model.json").read_text())
        change(about)
        (folder / "model.json").write_text(json.dumps(about))

    return harm


def leave_no_manifest(folder):
    (folder / "manifest.json").unlink()  # as in a version of an earlier release


def ask_for_a_factory(folder):
    edited(lambda about: about["network"].update(kind="os:system"))(folder)
    leave_no_manifest(folder)


def link_the_weights(folder):
    weights = folder / "model.safetensors"
    weights.symlink_to(weights.rename(folder / "elsewhere").name)


cut_the_weights = rewritten(lambda raw: raw[:-100])
reverse_the_classes = edited(lambda about: about["classes"].reverse())
BAD = {
    4: rewritten(lambda raw: raw[:-1] + b"\1"),
    7: lambda folder: (folder / "model.safetensors").unlink(),
    11: cut_the_weights,
    15: lambda folder: (folder / "model.json").write_text("{"),
    18: ask_for_a_factory,
}
TAMPERED = [
    reverse_the_classes,
    edited(lambda about: about["preprocessing"].update(mean=[0.9])),
    edited(lambda about: about["network"].update(dropout=[0.01, 0.01])),
    edited(lambda about: about.update(evaluation={"accuracy": 0.999})),
]


class Publisher:
    """Writes versions of one model, each of its own weights, and knows what they answer."""

    def __init__(self, root, staging):
        self.root, self.staging = root, staging
        self.answers = {}

    def publish(self, version, harm=None):
        """Publish the next version; `harm` is done to its files before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(version)
            module = NETWORK.build().eval()
        x = PREPROCESSING.normalize(torch.from_numpy(PIXELS)[None, None])
        with torch.inference_mode():
            self.answers[version] = module(x)[0].softmax(-1).numpy()
        metadata = checkpoint.Metadata("m", NETWORK, PREPROCESSING, CLASSES)
        made = checkpoint.save(self.staging, module, metadata)
        if harm:
            harm(made)
            del self.answers[version]
        (self.root / "m").mkdir(exist_ok=True)
        made.rename(self.root / "m" / str(version))
        (self.staging / "m" / str(version)).mkdir()  # so that the next number is the next


def publish_in(folder):
    made = Publisher(folder / "checkpoints", folder / "staging")
    made.root.mkdir()
    made.publish(1)
    return made


@pytest.fixture
def publisher(tmp_path):
    return publish_in(tmp_path)


@pytest.fixture(scope="module")
def running(tmp_path_factory, make_server):
    """A publisher, and a server of two workers that end well."""
    made = publish_in(tmp_path_factory.mktemp("running"))
    options = {"poll_seconds": POLL, "keep_versions": 2, "default_model": "m"}
    server = make_server(made.root, workers=2, **options).start()
    yield made, server
    assert server.stop() == 0
    assert server.errors.read_text() == ""


@contextmanager
def load(url, seen, connections=CONNECTIONS):
    """Ask from all connections at once until the block ends; some answers are `seen` before it."""
    stop = threading.Event()
    body, headers = PICTURE, {"Content-Type": "image/png"}

    async def ask(client, path):
        while not stop.is_set():
            begun = time.monotonic()
            answer = await client.post(path, content=body, headers=headers)
            ended = time.monotonic()
            seen.append((begun, ended, path, answer.status_code, answer.content))

    async def ask_all():
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            paths = ["/predict", "/predict", "/predict", "/uncertainty?samples=20"]
            asking = [ask(client, paths[k % 4]) for k in range(connections)]
            await asyncio.gather(*asking)

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(asyncio.run, ask_all())
        try:
            while len(seen) < connections:
                assert not asking.done(), asking.exception()
                time.sleep(0.01)
            yield
        finally:
            stop.set()
            asking.result(60)


def wait_for(lines, message, version, count):
    """Return the log's lines of that message about a version, once there are as many."""

    def found():
        told = [e for e in lines() if (e["message"], e.get("version")) == (message, version)]
        return told if len(told) >= count else None

    return eventually(found, 60)


@pytest.mark.slow
def test_twenty_versions_under_load_and_five_of_them_bad(running):
    publisher, server = running
    seen, switched = [], {1: 0.0}
    with load(server.url, seen):
        for version in range(2, 22):
            published = time.monotonic()
            publisher.publish(version, BAD.get(version))
            if version in BAD:
                wait_for(server.lines, "version refused", version, 2)
                continue
            ready = wait_for(server.lines, "version ready", version, 2)
            switched[version] = time.monotonic()
            slowest = max(line["milliseconds"] for line in ready) / 1000
            assert switched[version] - published < POLL + slowest + 2
            good = sorted(publisher.answers)
            for number, status in [*((v, 200) for v in good[-3:]), *((v, 404) for v in good[:-3])]:
                path = f"{server.url}/v1/models/m/versions/{number}/predict"
                files = {"file": ("x", PICTURE)}
                assert httpx.post(path, files=files, timeout=60).status_code == status
        refused = httpx.get(server.url + "/v1/models/m").json()["refused"]
        assert httpx.get(server.url + "/readyz").json()["models"]["m"]["refused"] == refused
    assert [r["version"] for r in refused] == list(BAD)
    assert "DROPSERVE_FACTORIES" in refused[-1]["reason"]
    assert str(publisher.root) not in json.dumps(refused)
    assert len(seen) > 20 * CONNECTIONS
    versions = Counter()
    for begun, _, path, status, content in seen:
        assert status == 200, content
        answer = json.loads(content)
        versions[answer["version"]] += 1
        latest = max(v for v, at in switched.items() if at < begun)
        assert answer["version"] >= latest
        if path == "/predict":
            expected = publisher.answers[answer["version"]]
            found = answer["predictions"][0]["probabilities"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert set(versions) == set(publisher.answers)


def ask(server, path):
    return httpx.get(server.url + path, timeout=60).json()


def gauge(server, name):
    text = httpx.get(server.url + "/metrics", timeout=60).text
    return [int(float(line.split()[1])) for line in text.splitlines() if line.startswith(name)]


def wait_for_gauge(server, name, value):
    """Wait, because another worker's figures are half a second old."""
    eventually(lambda: gauge(server, name) == [value])


def test_versions_that_are_bad_at_the_start_are_refused_and_the_others_served(
    publisher, make_server
):
    """What was edited, what is a link, what has no manifest, and what is edited while it serves."""
    publisher.publish(2, leave_no_manifest)
    for version, harm in enumerate([*TAMPERED, link_the_weights], 3):
        publisher.publish(version, harm)
    manifests = {v: publisher.root / "m" / str(v) / "manifest.json" for v in (1, 2)}
    server = make_server(publisher.root, poll_seconds=POLL, default_model="m").start()

    state = ask(server, "/readyz")["models"]["m"]
    assert (state["version"], state["versions"], state["changed"]) == (2, [1, 2], [])
    reasons = {refused["version"]: refused["reason"] for refused in state["refused"]}
    assert list(reasons) == [3, 4, 5, 6, 7]
    for version in (3, 4, 5, 6):
        assert reasons[version].startswith(f"m/{version}/model.json: damaged, edited or exchanged")
    assert "m/7/model.safetensors: cannot be opened: a symbolic link" in reasons[7]
    assert gauge(server, "dropserve_model_refused_versions{") == [5]
    refused = [line for line in server.lines() if line["message"] == "version refused"]
    assert sorted(line["version"] for line in refused) == [3, 4, 5, 6, 7]
    for line in refused:
        assert line["level"] == "error"
        assert line["reason"].endswith(reasons[line["version"]])
        assert "exception" not in line
    (warned,) = [line for line in server.lines() if line["level"] == "warning"]
    assert (warned["model"], warned["version"]) == ("m", 2)
    assert "dropserve manifest m --version 2" in warned["message"]

    sha256 = hashlib.sha256(manifests[1].read_bytes()).hexdigest()
    assert ask(server, "/v1/models/m/versions/1")["manifest_sha256"] == sha256
    assert ask(server, "/v1/models/m")["manifest_sha256"] is None
    dropserve("manifest", "m", "--version", 2, "--checkpoints", publisher.root)
    wait_for(server.lines, "version ready", 2, 2)
    sha256 = hashlib.sha256(manifests[2].read_bytes()).hexdigest()
    assert ask(server, "/v1/models/m")["manifest_sha256"] == sha256
    listed = dropserve("models", "--url", server.url, "--json")
    assert json.loads(listed)["models"][0]["manifest_sha256"] == sha256

    reverse_the_classes(manifests[2].parent)
    wait_for(server.lines, "version changed, served from memory", 2, 1)
    state = ask(server, "/readyz")["models"]["m"]
    assert (state["version"], state["versions"]) == (2, [1, 2])
    assert [changed["version"] for changed in state["changed"]] == [2]
    assert "m/2/model.json: damaged, edited" in state["changed"][0]["reason"]
    assert 2 not in [refused["version"] for refused in state["refused"]]
    assert gauge(server, "dropserve_model_changed_versions{") == [1]
    assert gauge(server, "dropserve_model_refused_versions{") == [5]
    (found,) = httpx.post(server.url + "/predict", files={"file": ("x", PICTURE)}).json()[
        "predictions"
    ]
    assert found["label"] == f"class {found['index']}"  # not by the reversed names
    assert server.stop() == 0
    assert server.errors.read_text() == ""


def test_pins_rollbacks_and_prunes_reach_all_workers_and_fail_no_request(running):
    publisher, server = running
    root, before = publisher.root, max(publisher.answers)
    first, *_, last, newest = (before + k for k in range(1, 7))
    for version in range(first, newest):
        publisher.publish(version)
    wait_for(server.lines, "version answers", last, 2)
    started = len(server.lines())
    moments = [(time.monotonic(), last)]  # when both workers had changed, and what answers

    def answers(version):
        wait_for(lambda: server.lines()[started:], "version answers", version, 2)
        moments.append((time.monotonic(), version))

    seen = []
    with load(server.url, seen, 8):
        dropserve("pin", "m", first, "--checkpoints", root)
        answers(first)
        publisher.publish(newest)
        wait_for(server.lines, "version ready", newest, 2)
        state = ask(server, "/v1/models/m")
        assert (state["version"], state["pinned"], state["pin_problem"]) == (first, first, None)
        assert state["versions"] == [first, last - 1, last, newest]
        path = f"{server.url}/v1/models/m/versions/{newest}/predict"
        answer = httpx.post(path, files={"file": ("x", PICTURE)}, timeout=60)
        assert answer.json()["version"] == newest
        dropserve("rollback", "m", "--checkpoints", root)
        answers(before)
        dropserve("pin", "m", "latest", "--checkpoints", root)
        answers(newest)
        dropserve("rollback", "m", "--checkpoints", root)
        answers(last)
        dropserve("prune", "m", "--keep", 1, "--checkpoints", root)
        assert checkpoint.versions(root, "m") == [last, newest]
        time.sleep(2 * POLL)
        checkpoint.pin(root, "m", first)  # which is there no more
        wait_for(server.lines, "pin not followed", newest, 2)
        moments.append((time.monotonic(), newest))
        state = ask(server, "/readyz")["models"]["m"]
        assert (state["version"], state["pinned"]) == (newest, first)
        assert state["pin_problem"] == f"version {first} is not there"
        wait_for_gauge(server, "dropserve_model_pin_failed{", 1)
        wait_for_gauge(server, "dropserve_model_version{", newest)
    assert len(seen) > 100
    changes = [moment for moment, _ in moments]
    for begun, ended, path, status, content in seen:
        assert status == 200, content
        answer = json.loads(content)
        if path == "/predict":
            expected = publisher.answers[answer["version"]]
            found = answer["predictions"][0]["probabilities"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        first_possible = max(bisect(changes, begun) - 1, 0)
        possible = moments[first_possible : bisect(changes, ended) + 1]  # and the next change
        assert answer["version"] in {version for _, version in possible}
    answered = {json.loads(content)["version"] for *_, content in seen}
    assert answered == {before, first, last, newest}
    errors = [line for line in server.lines()[started:] if line["level"] == "error"]
    assert {line["message"] for line in errors} == {"pin not followed"}


def kill_a_worker(server):
    """Kill one; wait until another has taken its place."""
    before = workers(server)
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: len(workers(server)) == len(before) and before[0] not in workers(server), 60)


@pytest.mark.slow
def test_a_worker_that_takes_a_dead_ones_place_serves_what_is_good(publisher, make_server):
    token = "a-token-of-an-operator"  # noqa: S105  of this test
    publisher.publish(2)
    checkpoint.pin(publisher.root, "m", 1)
    server = make_server(
        publisher.root, workers=2, poll_seconds=POLL, default_model=None, admin_token=token
    ).start()
    publisher.publish(3, cut_the_weights)
    wait_for(server.lines, "version refused", 3, 2)
    shutil.copytree(publisher.root / "m", publisher.root / "other")  # no default any more, if asked
    wait_for(server.lines, "version refused", 3, 4)
    kill_a_worker(server)
    wait_for(server.lines, "version refused", 3, 6)
    headers = {"Authorization": f"Bearer {token}"}
    for act, status in (("unload", 404), ("load", 200)):
        for name in ("m", "other"):
            url = f"{server.url}/v2/repository/models/{name}/{act}"
            assert httpx.post(url, headers=headers, timeout=60).status_code == 200
        if act == "unload":
            kill_a_worker(server)
            time.sleep(3)
        body = {"content": PICTURE, "headers": {"Content-Type": "image/png"}, "timeout": 60}
        for _ in range(20):
            answer = httpx.post(server.url + "/predict", **body)
            assert answer.status_code == status
            assert status == 404 or answer.json()["version"] == 1  # which is pinned
            ready = httpx.get(server.url + "/readyz").status_code
            assert ready == (200 if status == 200 else 503)
