"""Uploads that stall at their last byte, against a server with default limits, over sockets."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse

import httpx
import pytest

from dropserve.service.http.body import WINDOW
from tests.helpers import PNG, encode, noise
from tests.reliability.messages import head_of_image

SIZE = 8 * 2**20
UPLOADS = 33
PNG_TYPE = {"Content-Type": "image/png"}
JPEG = encode(noise(290, 290, 3), "JPEG", quality=95)  # 100 kB
LARGE = PNG + bytes(6_000_000)  # what follows a picture is ignored


def read(connection):
    response = HTTPResponse(connection)
    response.begin()
    return response, response.read()


def stall(server):
    """Send all of a body but its last byte; return the answer, and the seconds that it took."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(head_of_image(SIZE) + PNG + bytes(SIZE - len(PNG) - 1))
        started = time.monotonic()
        response, body = read(connection)
        waited = time.monotonic() - started
        assert response.status == 503 or connection.recv(1) == b""  # it is closed
    return response, body, waited


def drip(server):
    """Send a body at more than the least rate, in more seconds than the window has."""
    body = PNG + bytes(16_000 - len(PNG))
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(head_of_image(len(body)))
        for start in range(0, len(body), 2000):
            connection.sendall(body[start : start + 2000])
            time.sleep(0.9)
        return read(connection)[0].status


@pytest.fixture(scope="module")
def server(make_server):
    return make_server().start()


def test_stalled_uploads_end_in_time_and_leave_room_for_others(server):
    over, statuses = threading.Event(), []

    def small_requests():
        with httpx.Client(base_url=server.url, timeout=30) as http:
            while not over.is_set():
                for body, kind in ((PNG, "image/png"), (JPEG, "image/jpeg")):
                    answer = http.post("/predict", content=body, headers={"Content-Type": kind})
                    statuses.append(answer.status_code)
                time.sleep(0.02)

    with ThreadPoolExecutor(UPLOADS + 2) as threads:
        small = threads.submit(small_requests)
        slow = threads.submit(drip, server)
        stalled = [threads.submit(stall, server) for _ in range(UPLOADS)]
        answers = [upload.result() for upload in stalled]
        after = httpx.post(server.url + "/predict", content=LARGE, headers=PNG_TYPE, timeout=30)
        assert slow.result() == 200
        over.set()
        small.result()
    assert set(statuses) == {200}
    assert len(statuses) > 50
    late = [body for response, body, _ in answers if response.status == 408]
    refused = [response for response, _, _ in answers if response.status == 503]
    assert len(late) == 4  # half of 64 MiB has room for four
    assert len(refused) == UPLOADS - 4
    assert all(b"fewer than 5120 bytes of the body arrived in 5 seconds" in body for body in late)
    assert all(response.getheader("Retry-After") == "1" for response in refused)
    assert max(waited for _, _, waited in answers) < WINDOW + 1
    assert after.status_code == 200  # their memory is free
