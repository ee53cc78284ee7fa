"""Rolling updates and kills of three Pods behind HAProxy: ten minutes.

A request counts as lost unless its client has a 200. In a replacement none may be; when a Pod is
killed, only those that were in flight there.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import time
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests import manifests
from tests.helpers import PNG, encode, noise
from tests.reliability.figures import ROOT, SCALE, published
from tests.scale import pods
from tests.scale.pods import LONGEST_START, Cluster, Container, Proxy

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(pods.missing() is not None, reason=str(pods.missing())),
]
COMMAND = "make test-scale SCALE_TEST=kubernetes"
RESULTS = ROOT / "bench/results/scaling"
UPDATES = max(1, round(20 * SCALE))
KILLS = max(1, round(20 * SCALE))
RENDERED = manifests.render()
REPLICAS = RENDERED["HorizontalPodAutoscaler"]["spec"]["minReplicas"]
CLIENTS = 8
PAUSE = 0.03
"""Mean seconds between an answer and the client's next request: the machine is not overloaded."""
PIXELS = {"instances": np.zeros((64, 8, 8), int).tolist()}
KINDS = {
    "small prediction": ("predict", PNG, "image/png"),
    "large prediction": ("predict", encode(noise(400, 400, 3)), "image/png"),
    "64 images": ("predict", json.dumps(PIXELS).encode(), "application/json"),
    "uncertainty": ("uncertainty?samples=100&seed=1", PNG, "image/png"),
}


@dataclass(slots=True)
class Request:
    """A request, and what became of it; times are those of `time.monotonic()`."""

    kind: str
    sent: float
    port: int = 0  # of its client
    ended: float = float("inf")
    status: int = 0
    error: str = ""


class Load:
    """Clients that keep their connections, each with one request at a time."""

    def __init__(self, port):
        self.url, self.requests, self._stops = f"http://127.0.0.1:{port}", [], False

    async def client(self, number):
        draw, port = random.Random(number), 0

        async def note(event, about):
            nonlocal port
            if event == "connection.connect_tcp.complete":
                port = about["return_value"].get_extra_info("client_addr")[1]

        async with httpx.AsyncClient(base_url=self.url, timeout=30) as client:
            while not self._stops:
                request = Request(draw.choice(list(KINDS)), time.monotonic())
                self.requests.append(request)
                await self._send(client, request, note)
                request.port = port
                await asyncio.sleep(draw.expovariate(1 / PAUSE))

    async def _send(self, client, request, note):
        path, body, content_type = KINDS[request.kind]
        options = {"headers": {"Content-Type": content_type}, "extensions": {"trace": note}}
        try:
            url = f"/v1/models/digits-mlp/{path}"
            answer = await client.post(url, content=body, **options)
            request.status, request.error = answer.status_code, answer.text[:200]
        except httpx.TransportError as error:
            request.error = repr(error)
        request.ended = time.monotonic()

    @property
    def lost(self):
        return [each for each in self.requests if each.status != 200 and each.ended < float("inf")]

    @classmethod
    @asynccontextmanager
    async def on(cls, port):
        load = cls(port)
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(load.client(number))
            try:
                yield load
            finally:
                load._stops = True


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """A folder of one model that the container's user may read."""
    folder = tmp_path_factory.mktemp("claim")
    folder.chmod(0o755)
    shutil.copytree(checkpoints / "digits-mlp", folder / "digits-mlp")
    return folder


@asynccontextmanager
async def serving(models, folder, count, change=lambda _pod: None):
    """Run Pods of the Deployment behind HAProxy; `change` may edit the Pod's specification."""
    pod = deepcopy(manifests.pod(RENDERED["Deployment"]))
    change(pod)
    proxy = Proxy(folder)
    cluster = Cluster(Container(pod, models), proxy, folder)
    try:
        await proxy.started()
        await cluster.scale(count)
        yield cluster
        await cluster.end()
    finally:
        for each in [*cluster.pods, *cluster.ended]:
            each.abandon()
        proxy.process.kill()
        proxy.process.wait()


def test_the_container_is_what_the_deployment_says(models, tmp_path):
    """The rest of this file is about the real thing only if this holds."""

    async def run():
        async with serving(models, tmp_path, 1) as cluster:
            return [read_process(cluster.pods[0].main, name) for name in ("status", "mounts")]

    lines, mounted = asyncio.run(run())
    status = dict(line.split(":\t", 1) for line in lines)
    mounts = {line.split()[1]: line.split()[3].split(",")[0] for line in mounted}
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    assert status["NSpid"].split()[-1] == "1"
    assert {status[kind] for kind in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert (mounts["/"], mounts["/checkpoints"], mounts["/tmp"]) == ("ro", "ro", "rw")  # noqa: S108
    written = {place for place, mode in mounts.items() if mode == "rw"}
    assert written <= {"/tmp", "/proc", "/dev"} | {m for m in mounts if m.startswith("/dev/")}  # noqa: S108


def read_process(process, name):
    return Path(f"/proc/{process}/{name}").read_text().splitlines()


def test_without_the_sleep_the_proxy_sends_requests_to_a_closed_port(models, tmp_path):
    """The control: it shows that the load would find a Pod that stops too early."""

    def no_sleep(pod):
        pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] = 0

    async def run():
        async with (
            serving(models, tmp_path, 2, no_sleep) as cluster,
            Load.on(cluster.proxy.port) as load,
        ):
            for _ in range(3):
                await cluster.replace_all()
                await cluster.settled()
            return await cluster.proxy.failures() + len(load.lost)

    assert asyncio.run(run()) > 0


def test_rolling_updates_and_kills(models, tmp_path):
    async def run(figures):
        async with serving(models, tmp_path, REPLICAS) as cluster:
            async with Load.on(cluster.proxy.port) as load:
                await update(cluster, load, figures)
                await kill(cluster, load, figures)
            await cluster.end()
        failed = [pod.exit_status for pod in cluster.ended if pod.exit_status != 0]
        figures["Pods that did not end with 0 within their grace period"] = len(failed)
        figures["failed liveness probes"] = cluster.failed_liveness
        assert failed == []
        assert cluster.failed_liveness == 0

    with published("kubernetes", COMMAND, RESULTS) as figures:
        asyncio.run(run(figures))
    print(f"\n{UPDATES} updates, {KILLS} kills: {json.dumps(figures)}")


async def update(cluster, load, figures):
    started, tried = time.monotonic(), await cluster.proxy.failures()
    for number in range(UPDATES):
        await cluster.replace_all()
        print(f"update {number + 1}: {len(load.requests)} requests, {len(load.lost)} lost")
    await cluster.settled()
    tried = await cluster.proxy.failures() - tried
    replaced = [*cluster.ended[REPLICAS:], *cluster.pods]  # these started one at a time
    figures |= {
        "rolling updates of three Pods": UPDATES,
        "Pods replaced": len(cluster.ended),
        "requests meanwhile": len(load.requests),
        "requests lost": len(load.lost),
        "connections to Pods that failed, and retries": tried,
        "from a Pod's start until it answers, mean, s": round(
            float(np.mean([pod.seconds_to_ready for pod in replaced])), 1
        ),
        "all updates, s": round(time.monotonic() - started),
    }
    assert load.lost == []
    assert tried == 0


async def kill(cluster, load, figures):
    before, in_flight, lost = len(load.requests), 0, 0
    elsewhere = []
    for number in range(KILLS):
        pod, known = cluster.draw.choice(cluster.pods), len(load.lost)
        os.kill(pod.main, signal.SIGSTOP)  # so that something is in flight there
        await asyncio.sleep(0.2)
        clients = await cluster.proxy.clients_of(pod.slot)
        process, killed = pod.main, time.monotonic()
        pod.kill()
        # Its sockets are open until its memory is freed.
        while psutil.pid_exists(process):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        died = time.monotonic()
        async with asyncio.timeout(LONGEST_START):
            while pod.ready.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await pod.ready.wait()
            await pod.told()
        new = load.lost[known:]
        there = [r for r in new if r.sent < died and r.ended >= killed]  # in flight when it died
        elsewhere += [request for request in new if request not in there]
        in_flight += len(clients | {request.port for request in there})
        lost += len(there)
        print(f"kill {number + 1}: {lost} lost of {in_flight} in flight, {len(elsewhere)} others")
    figures |= {
        "Pods killed": KILLS,
        "requests meanwhile, of the kills": len(load.requests) - before,
        "requests in flight at the killed Pods": in_flight,
        "of those lost": lost,
        "requests lost elsewhere": len(elsewhere),
    }
    assert elsewhere == []
    assert lost > 0
