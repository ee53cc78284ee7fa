"""Dropserve under Ray Serve: the contract, killed replicas, a new version, rolling replacements.

Ten minutes on a quiet machine: `make test-scale SCALE_TEST=ray`; with SCALE=0.1 a tenth of the
kills and replacements.
"""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.conftest import DIGITS, _save
from tests.helpers import PNG, eventually, free_port
from tests.reliability.figures import SCALE

ROOT = Path(__file__).parents[2]
MANIFEST = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
TIMES = max(2, round(20 * SCALE))
"""How often a replica is killed, and all are replaced."""
CLIENTS = 8
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    """The checkpoints, in a folder that versions are added to."""
    return shutil.copytree(checkpoints, tmp_path_factory.mktemp("served") / "checkpoints")


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray keeps its sockets, whose paths must be short; no other cluster is found there."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="module")
def url(folder, ray_folder, tmp_path_factory):
    """What `serve run` serves by the manifest's configuration: two replicas, on a local cluster."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    environment = os.environ | {
        "DROPSERVE_CHECKPOINTS": str(folder), "DROPSERVE_DEFAULT_MODEL": "digits-mlp",
        "DROPSERVE_POLL_SECONDS": "0.5", "DROPSERVE_PRECISION": "float32",
        "DROPSERVE_MAX_BODY_BYTES": str(2**20), "DROPSERVE_MAX_WAIT": "60",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    config = log.with_name("serve.yaml")
    values = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])
    values["http_options"] = {"host": "127.0.0.1", "port": port}
    config.write_text(yaml.safe_dump(values))
    command = [Path(sys.executable).with_name("serve"), "run", config]
    with log.open("w") as file:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    tree = psutil.Process(run.pid)
    address = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: run.poll() is not None or is_ready(address), 180, 0.5)
        assert run.poll() is None, log.read_text()
        yield address
    finally:
        started = tree.children(recursive=True)
        run.send_signal(signal.SIGINT)
        run.wait(60)
        for process in psutil.wait_procs(started, timeout=30)[1]:
            process.kill()


def is_ready(url):
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def driver(ray_folder):
    """This process, as another driver of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_TMPDIR", ray_folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.syspath_prepend(str(ROOT))
        import ray

        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.mark.parametrize("module", ["test_contract", "test_oip", "test_bad_inputs"])
def test_every_route_answers_as_the_contract_says(url, folder, module):
    environment = os.environ | {"CONTRACT_URL": url, "CONTRACT_CHECKPOINTS": str(folder)}
    file = f"tests/service/http/{module}.py"
    command = [sys.executable, "-m", "pytest", "-q", file, "-k", "not logged"]  # Ray has the log
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def replicas():
    """Process ids of the replicas on this machine."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "".join(process.info["cmdline"] or ()).startswith("ray::ServeReplica:default:Dropserve")
    ]


@asynccontextmanager
async def load(url):
    """Predictions by clients, each one after another; yields (start, end, status) of them all."""
    sent = []
    going = True

    async def ask(client):
        while going:
            started = time.monotonic()
            try:
                answer = await client.post("/predict", content=PNG)
                status = answer.status_code
            except httpx.TransportError as error:
                status = type(error).__name__
            sent.append((started, time.monotonic(), status))
            await asyncio.sleep(0.01)

    headers = {"content-type": "image/png"}
    limits = httpx.Limits(keepalive_expiry=1)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=60, limits=limits
    ) as client, asyncio.TaskGroup() as group:  # fmt: skip
        for _ in range(CLIENTS):
            group.create_task(ask(client))
        try:
            yield sent
        finally:
            going = False


def test_a_killed_replica_takes_only_what_was_in_flight(url):
    async def run():
        kills = []
        async with load(url) as sent:
            for _ in range(TIMES):
                await asyncio.sleep(random.uniform(0.5, 1))
                victim = random.choice(replicas())
                killed = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                while psutil.pid_exists(victim):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                kills.append((killed, time.monotonic()))
                end = time.monotonic() + 60
                while len(set(replicas()) - {victim}) < 2:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.2)
            await asyncio.sleep(3)
        return kills, sent

    kills, sent = asyncio.run(run())
    lost = [(start, end, status) for start, end, status in sent if status != 200]
    print(Counter(status for _, _, status in sent))
    assert len(sent) > 20 * TIMES
    for killed, died in kills:  # what was in flight when a replica died
        there = [each for each in lost if each[0] <= died and each[1] >= killed]
        assert len(there) <= CLIENTS
        lost = [each for each in lost if each not in there]
    assert lost == []


def test_a_new_version_answers_from_every_replica(url, folder):
    def versions():
        asked = (httpx.post(f"{url}/predict", content=PNG, headers=headers) for _ in range(20))
        return {answer.json()["version"] for answer in asked}

    headers = {"content-type": "image/png"}
    assert versions() == {2}
    network = {"name": "digits-mlp", "preprocessing": DIGITS, "seed": 5}
    from dropserve.models.networks import NetworkConfig

    mlp = NetworkConfig("mlp", DIGITS.shape, 10, (32, 32), (0.2, 0.5))
    _save(folder, network["name"], mlp, DIGITS, seed=5)
    eventually(lambda: versions() == {3}, 30, 0.2)


@pytest.mark.filterwarnings("default")  # Ray's own
@pytest.mark.usefixtures("driver")
def test_rolling_replacements_lose_no_request(url):
    from ray import serve

    from deploy.ray.serve_app import Dropserve

    async def run():
        async with load(url) as sent:
            for number in range(TIMES):
                before = set(replicas())
                app = Dropserve.bind(f"revision {number}")
                await asyncio.to_thread(serve.run, app, route_prefix="/")
                end = time.monotonic() + 120
                while before & set(replicas()):  # they drain
                    assert time.monotonic() < end
                    await asyncio.sleep(0.2)
        return sent

    sent = asyncio.run(run())
    print(Counter(status for _, _, status in sent))
    assert len(sent) > 20 * TIMES
    assert {status for _, _, status in sent} == {200}
