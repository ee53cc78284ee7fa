"""The bound on waiting: what would wait longer is refused, what expires is not computed."""

import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.helpers import encode, eventually, noise
from tests.reliability import controlled_network as controlled
from tests.reliability.controlled_network import SLEEP, ask, figure

MAX_WAIT = 1.0
LONG = 28
SECONDS = LONG * SLEEP
TENSOR = {"name": "image", "shape": [1, 8, 8], "datatype": "UINT8", "data": [0] * 64}
MORE = {"X-Request-Timeout": "99999"}
INFER = f"/v2/models/{controlled.NAME}/infer"


@pytest.fixture(scope="module", params=[True, False], ids=["fast path", "ASGI path"])
def server(make_server, tmp_path_factory, request):
    root = tmp_path_factory.mktemp("controlled")
    controlled.publish(root)
    limits = {"max_wait": MAX_WAIT, "factories": controlled.FACTORY, "fast_path": request.param}
    return make_server(root, default_model=controlled.NAME, **limits).start()


@contextmanager
def busy(server):
    """Have a long step run; it is answered at the end."""
    batches = figure(server, "dropserve_batch_images_count")
    with ThreadPoolExecutor(1) as thread:
        long = thread.submit(ask, server, LONG)
        eventually(lambda: figure(server, "dropserve_batch_images_count") == batches + 1, 5, 0.01)
        yield
        assert long.result().status_code == 200, long.result().text


def reason(server, response):
    return server.line(response.headers["x-request-id"])["reason"]


def test_what_waits_for_too_long_expires_and_is_not_computed(server, problem):
    """It is the first of its kind, so nobody knew how long it would wait."""
    jpeg = {"content": encode(noise(130, 130), "JPEG"), "headers": {"Content-Type": "image/jpeg"}}
    with busy(server), ThreadPoolExecutor(3) as clients:
        images, started = figure(server, "dropserve_batch_images_sum"), time.perf_counter()
        default = clients.submit(ask, server, 0)
        decoded = clients.submit(httpx.post, server.url + "/predict", timeout=9, **jpeg)
        sent = {"inputs": [TENSOR], "parameters": {"timeout": 700_000}}
        tensors = clients.submit(httpx.post, server.url + INFER, json=sent, headers=MORE)
        own = ask(server, 0, **{"X-Request-Timeout": "0.7"})
        assert tensors.result().status_code == 503
        assert 0.7 <= time.perf_counter() - started < MAX_WAIT + 0.2
        responses = own, default.result(), decoded.result()
        assert MAX_WAIT <= time.perf_counter() - started < MAX_WAIT + 0.5
        for response in responses:
            assert "waited for longer" in problem(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            assert reason(server, response) == "timeout"
    assert ask(server, 0).status_code == 200
    assert figure(server, "dropserve_batch_images_sum") == images + 1


def test_what_would_wait_for_too_long_is_refused_before_its_body_is_read(server, problem):
    assert ask(server, LONG).status_code == 200  # an idle server does not refuse what is long
    with busy(server):
        started = time.perf_counter()
        response = ask(server, 0, **MORE)
        assert "would wait for too long" in problem(response, 503)
        assert reason(server, response) == "wait"
        assert MAX_WAIT < int(response.headers["retry-after"]) <= math.ceil(SECONDS)
        for path in ("/predict", "/uncertainty", "/compare", "/uncertainty/stream", INFER):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
                connection.sendall(head.encode())
                assert connection.recv(99).startswith(b"HTTP/1.1 503")
        assert httpx.get(server.url + "/readyz").status_code == 200
        assert time.perf_counter() - started < SECONDS / 2
    assert ask(server, 0).status_code == 200


@pytest.mark.parametrize("value", ["0", "-1", "1e3", "nan", "inf", "", "1,5", "0x1", "1_0", "."])
def test_a_malformed_timeout_is_refused_and_named(server, problem, value):
    response = ask(server, 0, **{"X-Request-Timeout": value})
    assert "X-Request-Timeout" in problem(response, 422)
    sent = {"inputs": [TENSOR]}
    response = httpx.post(server.url + INFER, json=sent, headers={"X-Request-Timeout": value})
    assert response.status_code == 422


def test_what_runs_for_longer_than_it_might_wait_is_answered_while_the_service_stops(server):
    with ThreadPoolExecutor(1) as thread:
        long = thread.submit(ask, server, round(2 * MAX_WAIT / SLEEP))
        time.sleep(1.3 * MAX_WAIT)
        assert server.stop() == 0
        assert long.result().status_code == 200, long.result().text
