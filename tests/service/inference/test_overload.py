"""More than the server can do: refused with 503, and it stays awake."""

import asyncio
import json
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.helpers import encode, noise

PNG = encode(noise(16, 16, 3))
SLOW = "/v1/models/colour-cnn/uncertainty?samples=1000&seed={}"  # no two seeds share a batch
HEADERS = {"Content-Type": "image/png"}


def storm(url, count):
    """Send slow requests all at once, and probe the while; return responses and probe seconds."""

    async def probe(client, seconds):
        while True:
            started = time.perf_counter()
            assert (await client.get("/livez")).status_code == 200
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(0.02)

    async def main():
        limits = httpx.Limits(max_connections=count + 1)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            seconds = []
            probing = asyncio.create_task(probe(client, seconds))
            posts = (
                client.post(SLOW.format(n), content=PNG, headers=HEADERS) for n in range(count)
            )
            responses = await asyncio.gather(*posts)
            probing.cancel()
            return responses, seconds

    return asyncio.run(main())


def test_a_full_queue_is_503_with_when_to_try_again_and_passes(tight_server, problem):
    responses, _ = storm(tight_server.url, 40)
    refused = [response for response in responses if response.status_code == 503]
    served = [response for response in responses if response.status_code == 200]
    assert len(refused) + len(served) == 40
    assert len(served) >= 4  # as many as may wait to be decoded
    assert refused
    for response in refused:
        problem(response, 503)
        assert int(response.headers["retry-after"]) >= 1
    again = httpx.post(tight_server.url + "/predict", content=PNG, headers=HEADERS)
    assert again.status_code == 200


def test_the_event_loop_answers_while_the_network_runs(server):
    responses, seconds = storm(server.url, 12)
    assert {response.status_code for response in responses} == {200}
    assert len(seconds) > 3
    assert statistics.median(seconds) < 0.25


def raw(n, request_id):
    body = json.dumps({"instances": [[[7] * 16] * 16] * 64}).encode()  # a second's work or so
    head = f"POST {SLOW.format(n)} HTTP/1.1\r\nHost: x\r\nX-Request-ID: {request_id}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_a_client_that_leaves_frees_its_place_in_the_queue(server):
    ids = [f"left-{n}" for n in range(5)]
    sockets = []
    for n, request_id in enumerate(ids):
        sockets.append(socket.create_connection(("127.0.0.1", server.port)))
        sockets[-1].sendall(raw(100 + n, request_id))
    for connection in sockets:
        connection.close()
    lines = [server.line(request_id) for request_id in ids]
    assert {line["status"] for line in lines} <= {499, 200}
    assert lines[-1]["status"] == 499  # it waited behind the others
    started = time.perf_counter()
    answer = httpx.post(server.url + "/predict", content=PNG, headers=HEADERS)
    assert answer.status_code == 200
    assert time.perf_counter() - started < 2
    assert not server.errors.read_text()


def test_what_is_not_done_when_the_drain_is_over_gets_503_and_not_silence(make_server, problem):
    server = make_server(drain_seconds=1, max_queue=100_000, max_wait=60).start()
    body = json.dumps({"instances": [[[7] * 16] * 16] * 64})
    headers = {"Content-Type": "application/json"}

    def post(n):
        return client.post(SLOW.format(n), content=body, headers=headers)

    with (
        httpx.Client(base_url=server.url, timeout=60) as client,  # one: to make them takes long
        ThreadPoolExecutor(32) as clients,
    ):
        answers = [clients.submit(post, n) for n in range(32)]
        time.sleep(1.5)
        assert server.stop() == 0
        responses = [answer.result() for answer in answers]
    refused = [response for response in responses if response.status_code != 200]
    assert refused, "the work was done within the drain: ask for more"
    for response in refused:
        assert "stopping" in problem(response, 503)
        assert response.headers["retry-after"] == "1"
