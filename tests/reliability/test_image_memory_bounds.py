"""Memory of a server that is sent large and damaged images, and what small requests notice."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles

import httpx
import numpy as np
import pytest
from PIL import Image

from dropserve.service.http.images import memory_of
from tests.helpers import encode, eventually, noise

MB = 1_000_000
LARGE = encode(Image.new("RGBA", (4000, 3990)))  # 62 kB
AT_ONCE, DECODED_AT_ONCE = 10, 2
GOOD = {
    "JPEG of 100 kB": encode(noise(290, 290, 3), "JPEG", quality=95),
    "photo": encode(Image.fromarray(noise(60, 80, 3)).resize((1600, 1200)), "JPEG"),
}

pytestmark = pytest.mark.slow


def peak(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)


def ask(http, body, kind):
    started = time.monotonic()
    url = "/v1/models/colour-cnn/predict"
    answer = http.post(url, content=body, headers={"Content-Type": f"image/{kind}"})
    return answer.status_code, time.monotonic() - started


@pytest.fixture(scope="module")
def server(make_server):
    server = make_server(max_wait=60).start()  # a large image that waits is not refused
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for body in (*GOOD.values(), encode(Image.new("L", (8, 8)))) * 20:
            ask(http, body, "jpeg" if body in GOOD.values() else "png")
    return server


@pytest.fixture(scope="module")
def before(server):
    """Memory of the server after its first requests."""
    return server.resident()


def given_back(server, before):
    return eventually(lambda: server.resident() - before < 50 * MB, 10)


def test_a_burst_of_large_images_is_bounded_and_holds_up_no_small_ones(server, before):
    over = threading.Event()

    def small_requests(body):
        answers = []
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not over.is_set():
                answers.append(ask(http, body, "jpeg"))
                time.sleep(0.02)
        return answers

    def large_requests(_client):
        with httpx.Client(base_url=server.url, timeout=60) as http:
            return [ask(http, LARGE, "png") for _ in range(2)]

    with ThreadPoolExecutor(AT_ONCE + len(GOOD)) as threads:
        small = [threads.submit(small_requests, body) for body in GOOD.values()]
        large = [each for two in threads.map(large_requests, range(AT_ONCE)) for each in two]
        over.set()
    assert {status for status, _ in large} == {200}
    assert peak(server) - before < DECODED_AT_ONCE * memory_of((4000, 3990))
    for answers in (each.result() for each in small):
        assert {status for status, _ in answers} == {200}
        most = quantiles([seconds for _, seconds in answers], n=10)[-1]
        assert most < median(seconds for _, seconds in large) / 3
    assert given_back(server, before)


def test_mutated_images_leave_no_memory_behind(server, before):
    """Damaged ones free what they take in other places, and in another order."""
    whole = [
        (encode(Image.fromarray(noise(side // 8, side // 8, 3)).resize((side, side)), kind), kind)
        for side in (300, 1000, 2000)
        for kind in ("PNG", "JPEG", "WEBP")
    ]

    def send(number):
        rng = np.random.default_rng(number)
        body, kind = whole[rng.integers(len(whole))]
        damaged = bytearray(body)
        for _ in range(rng.choice((0, 1, 8))):
            among = rng.choice((64, 512, len(body)))  # headers more often
            damaged[rng.integers(min(among, len(body)))] = rng.integers(256)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            return ask(http, bytes(damaged), kind.lower())[0]

    with ThreadPoolExecutor(4) as threads:
        statuses = set(threads.map(send, range(150)))
    assert statuses <= {200, 413, 415, 422}
    assert {200, 422} <= statuses
    assert given_back(server, before)
