"""A thousand clients leave while their requests wait: the queue is empty at once, nothing computed.

The network is so large that a step of a batch takes longer than all clients take to leave.
"""

import socket
import time
from contextlib import ExitStack

import httpx
import pytest
from PIL import Image

from tests.helpers import encode, eventually, noise
from tests.reliability.figures import SCALE, published
from tests.reliability.load import descriptors, metrics
from tests.reliability.messages import request

pytestmark = pytest.mark.timeout(300)

CLIENTS = round(1_000 * SCALE)
PHOTO = Image.fromarray(noise(28, 28, 3)).resize((224, 224))
IMAGES = {
    "JPEG": (encode(PHOTO, "JPEG"), "image/jpeg"),
    "PNG": (encode(noise(8, 8)), "image/png"),
}
QUEUED, COMPUTED = "dropserve_queue_images", "dropserve_batch_images_sum"


def test_cancelled_clients_leave_an_empty_queue(tmp_path, save_version, make_server):
    save_version(tmp_path, hidden=(2048, 2048))
    with published("cancellation", "make soak SOAK=cancellation") as figures:
        with descriptors(4_096):
            server = make_server(tmp_path, max_wait=60, max_queue=2 * CLIENTS).start()
            measured = {kind: measure(server, *IMAGES[kind]) for kind in IMAGES}
        figures["clients"] = CLIENTS
        for kind, (waiting, seconds, computed) in measured.items():
            figures[f"{kind}, images queued when their clients left"] = waiting
            figures[f"{kind}, seconds until the queue was empty"] = seconds
            figures[f"{kind}, of those images computed"] = computed
        for waiting, seconds, computed in measured.values():
            assert waiting > CLIENTS / 2
            assert seconds < 1
            assert computed <= 64  # a batch that began before all had left
        image, content_type = IMAGES["PNG"]
        headers = {"Content-Type": content_type}
        again = httpx.post(server.url + "/predict", content=image, headers=headers)
        assert again.status_code == 200
        assert not server.errors.read_text()


def measure(server, image, content_type):
    """Queue requests and leave.

    Returns:
        Images that waited, seconds until none did, and how many of them were computed.
    """
    earlier = metrics(server.url)[COMPUTED]
    with ExitStack() as connections:
        for _ in range(CLIENTS):
            address = "127.0.0.1", server.port
            connection = connections.enter_context(socket.create_connection(address, 30))
            connection.sendall(request("/uncertainty?samples=1000", image, content_type))
        until_all_are_read(server, earlier)
        before = metrics(server.url)
    left = time.perf_counter()
    eventually(lambda: metrics(server.url)[QUEUED] == 0, pause=0.01)
    seconds = time.perf_counter() - left
    time.sleep(2)  # what has begun ends
    computed = metrics(server.url)[COMPUTED] - before[COMPUTED]
    return int(before[QUEUED]), round(seconds, 3), int(computed)


def until_all_are_read(server, earlier):
    """Wait until every request is decoded: it waits in the queue, or its batch has begun."""

    def are_read():
        now = metrics(server.url)
        return now[QUEUED] + now[COMPUTED] - earlier >= CLIENTS

    eventually(are_read, 20)
