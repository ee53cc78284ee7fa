"""New versions under load, over a socket, with two workers: no request fails, none is mistaken."""

import asyncio
import io
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from models import checkpoint
from models.networks import NetworkConfig
from models.preprocessing import Preprocessing

POLL = 0.3
CONNECTIONS = 32
PREPROCESSING = Preprocessing((8, 8), 1, (0.3,), (0.4,))
NETWORK = NetworkConfig("mlp", PREPROCESSING.shape, 10, (32, 32), (0.2, 0.5))
CLASSES = tuple(f"class {k}" for k in range(10))
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)


def damage_a_byte(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")


def leave_no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_the_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def break_the_json(folder):
    (folder / "model.json").write_text("{")


def ask_for_a_factory(folder):
    about = json.loads((folder / "model.json").read_text())
    about["network"]["kind"] = "os:system"
    (folder / "model.json").write_text(json.dumps(about))


BAD = {
    4: damage_a_byte,
    7: leave_no_weights,
    11: cut_the_weights,
    15: break_the_json,
    18: ask_for_a_factory,
}


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


@pytest.fixture
def publisher(tmp_path):
    made = Publisher(tmp_path / "checkpoints", tmp_path / "staging")
    made.root.mkdir()
    made.publish(1)
    return made


def picture():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def load(url, seen):
    """Ask from all connections at once until the block ends; some answers are `seen` before it."""
    stop = threading.Event()
    body, headers = picture(), {"Content-Type": "image/png"}

    async def ask(client, path):
        while not stop.is_set():
            answer = await client.post(path, content=body, headers=headers)
            seen.append((time.monotonic(), path, answer.status_code, answer.content))

    async def ask_all():
        limits = httpx.Limits(max_connections=CONNECTIONS)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            paths = ["/predict", "/predict", "/predict", "/uncertainty?samples=20"]
            asking = [ask(client, paths[k % 4]) for k in range(CONNECTIONS)]
            await asyncio.gather(*asking)

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(asyncio.run, ask_all())
        try:
            while len(seen) < CONNECTIONS:
                assert not asking.done(), asking.exception()
                time.sleep(0.01)
            yield
        finally:
            stop.set()
            asking.result(60)


def wait_for(lines, message, version, count):
    """Return the log's lines of that message about a version, once there are as many."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [e for e in lines() if (e["message"], e.get("version")) == (message, version)]
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{message!r} of version {version} is not in the log of all workers")


def test_twenty_versions_under_load_and_five_of_them_bad(publisher, make_server):
    server = make_server(
        publisher.root, workers=2, poll_seconds=POLL, keep_versions=2, default_model="m"
    ).start()
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
                files = {"file": ("x", picture())}
                assert httpx.post(path, files=files, timeout=60).status_code == status
        refused = httpx.get(server.url + "/v1/models/m").json()["refused"]
        assert httpx.get(server.url + "/readyz").json()["models"]["m"]["refused"] == refused
    assert [r["version"] for r in refused] == list(BAD)
    assert "DROPSERVE_FACTORIES" in refused[-1]["reason"]
    assert str(publisher.root) not in json.dumps(refused)
    assert len(seen) > 20 * CONNECTIONS
    versions = Counter()
    for moment, path, status, content in seen:
        assert status == 200, content
        answer = json.loads(content)
        versions[answer["version"]] += 1
        latest = max(v for v, at in switched.items() if at < moment - 1)
        assert answer["version"] >= latest
        if path == "/predict":
            expected = publisher.answers[answer["version"]]
            found = answer["predictions"][0]["probabilities"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert set(versions) == set(publisher.answers)
    assert server.stop() == 0
    assert server.errors.read_text() == ""


def test_a_version_that_is_bad_at_the_start_stops_it_and_later_does_not(publisher, make_server):
    publisher.publish(2, cut_the_weights)
    server = make_server(publisher.root, default_model="m")
    assert server.process.wait(60) != 0
    shutil.rmtree(publisher.root / "m" / "2")
    server = make_server(publisher.root, poll_seconds=POLL, default_model="m").start()
    publisher.publish(3, cut_the_weights)
    wait_for(server.lines, "version refused", 3, 1)
    assert httpx.get(server.url + "/readyz").status_code == 200
    assert httpx.get(server.url + "/v1/models/m").json()["version"] == 1


def workers(server):
    """Process ids of the workers: children that are no tracker of resources."""
    root = Path("/proc", str(server.process.pid), "task", str(server.process.pid), "children")
    commands = {
        int(pid): Path("/proc", pid, "cmdline").read_bytes() for pid in root.read_text().split()
    }
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


def kill_a_worker(server):
    """Kill one; wait until another has taken its place."""
    before = workers(server)
    os.kill(before[0], signal.SIGKILL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        now = workers(server)
        if len(now) == len(before) and before[0] not in now:
            return
        time.sleep(0.1)
    raise AssertionError("no worker has come up")


def test_a_worker_that_takes_a_dead_ones_place_serves_what_is_good(publisher, make_server):
    token = "a-token-of-an-operator"  # noqa: S105  of this test
    server = make_server(
        publisher.root, workers=2, poll_seconds=POLL, default_model=None, admin_token=token
    ).start()
    publisher.publish(2, cut_the_weights)
    wait_for(server.lines, "version refused", 2, 2)
    shutil.copytree(publisher.root / "m", publisher.root / "other")  # no default any more, if asked
    wait_for(server.lines, "version refused", 2, 4)
    kill_a_worker(server)
    wait_for(server.lines, "version refused", 2, 6)
    headers = {"Authorization": f"Bearer {token}"}
    for act, status in (("unload", 404), ("load", 200)):
        for name in ("m", "other"):
            url = f"{server.url}/v2/repository/models/{name}/{act}"
            assert httpx.post(url, headers=headers, timeout=60).status_code == 200
        if act == "unload":
            kill_a_worker(server)
            time.sleep(3)
        body = {"content": picture(), "headers": {"Content-Type": "image/png"}, "timeout": 60}
        for _ in range(20):
            assert httpx.post(server.url + "/predict", **body).status_code == status
            ready = httpx.get(server.url + "/readyz").status_code
            assert ready == (200 if status == 200 else 503)
