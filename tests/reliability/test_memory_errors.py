"""A process whose memory is limited: who asks for too much gets 503, and the others an answer."""

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.helpers import encode, eventually
from tests.reliability import controlled_network as controlled
from tests.reliability.controlled_network import ALLOCATE, ask, figure

SPARE = 256 * 2**20
"""Bytes that the process may still take."""


@pytest.fixture(scope="module", params=[True, False], ids=["fast path", "ASGI path"])
def server(make_server, tmp_path_factory, request):
    root = tmp_path_factory.mktemp("controlled")
    controlled.publish(root)
    limits = {"max_wait": 60, "factories": controlled.FACTORY, "fast_path": request.param}
    server = make_server(root, default_model=controlled.NAME, **limits).start()
    size = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[0])
    most = size * resource.getpagesize() + SPARE
    resource.prlimit(server.process.pid, resource.RLIMIT_AS, (most, most))
    return server


def refused(server, problem, response):
    """Check that a response is the 503 of a request that found no memory."""
    assert "memory" in problem(response, 503)
    assert int(response.headers["retry-after"]) >= 1
    name = response.headers["x-request-id"]

    def answered():
        lines = [line for line in server.lines() if line.get("request_id") == name]
        return [line for line in lines if line.get("status") == 503]

    return [line["reason"] for line in eventually(answered)] == ["memory"]


def test_of_a_batch_only_the_request_that_takes_too_much_fails(server, problem):
    batches = figure(server, "dropserve_batch_images_count")
    with ThreadPoolExecutor(16) as clients:
        first = clients.submit(ask, server, 20)  # two seconds, in which the others queue up
        eventually(lambda: figure(server, "dropserve_batch_images_count") == batches + 1)
        good = [clients.submit(ask, server, 1) for _ in range(14)]
        bad = clients.submit(ask, server, ALLOCATE)
        assert refused(server, problem, bad.result())
        assert [each.result().status_code for each in (first, *good)] == [200] * 15
    assert figure(server, "dropserve_batch_images_count") <= batches + 3
    # the others ran together; the fast path leaves the failed one to the ASGI path
    assert ask(server, 1).status_code == 200


def test_an_image_that_does_not_fit_into_memory_fails_alone(server, problem):
    large = encode(Image.fromarray(np.zeros((8000, 8000, 3), np.uint8)))
    headers = {"Content-Type": "image/png"}
    response = httpx.post(server.url + "/predict", content=large, headers=headers, timeout=60)
    assert refused(server, problem, response)
    assert ask(server, 1).status_code == 200
    assert "Traceback" not in server.errors.read_text()
