"""Clients that leave: what they asked for leaves the queue at once, and is not computed."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

from tests.helpers import encode, eventually, noise
from tests.reliability import controlled_network as controlled
from tests.reliability.controlled_network import ask, figure
from tests.reliability.messages import request

CLIENTS = 500
JPEG = encode(noise(130, 130, 3), "JPEG")  # too large to be decoded with its batch
LONG = 50
"""A value whose step takes five seconds."""


def test_hundreds_of_cancelled_requests_leave_the_queue_at_once(make_server, tmp_path):
    controlled.publish(tmp_path)
    limits = {"max_queue": 2 * CLIENTS, "max_wait": 60, "factories": controlled.FACTORY}
    server = make_server(tmp_path, default_model=controlled.NAME, **limits).start()
    with ThreadPoolExecutor(1) as thread:
        long = thread.submit(ask, server, LONG)
        eventually(lambda: figure(server, "dropserve_batch_images_sum") == 1)
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CLIENTS)]
        for client in clients:
            client.sendall(request(body=JPEG, content_type="image/jpeg"))
        eventually(lambda: figure(server, "dropserve_queue_images") == CLIENTS)
        started = time.perf_counter()
        for client in clients:
            client.close()
        eventually(lambda: figure(server, "dropserve_queue_images") == 0, pause=0.02)
        assert time.perf_counter() - started < 1
        assert not long.done()
        assert long.result().status_code == 200
    assert ask(server, 0).status_code == 200
    assert figure(server, "dropserve_batch_images_sum") == 2  # the long one's, and the last
    assert figure(server, "dropserve_cancelled_total") == CLIENTS
