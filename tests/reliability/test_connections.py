"""Connections: deadlines, their number, what is read ahead, and clients that leave."""

import json
import socket
import threading
import time
from contextlib import ExitStack

import httpx
import psutil
import pytest

from tests.conftest import LIMITED
from tests.helpers import PNG, eventually
from tests.reliability.load import descriptors
from tests.reliability.messages import answers, get, head, head_of_image, request

HEAD_TIMEOUT, KEEP_ALIVE, BODY_TIMEOUT, CAP = 1.0, 1.5, 2.0, 40
LIVEZ = get("/livez")
SHORT = head_of_image()
STREAMED = head("POST", "/predict", "Content-Type: image/png", "Transfer-Encoding: chunked")


@pytest.fixture(scope="module", params=[True, False], ids=["fast path", "ASGI path"])
def hasty(make_server, request):
    """A server with little patience."""
    server = make_server(
        fast_path=request.param,
        head_timeout=HEAD_TIMEOUT,
        keep_alive=KEEP_ALIVE,
        body_timeout=BODY_TIMEOUT,
        max_connections=CAP,
    )
    yield server.start()
    assert "Traceback" not in server.errors.read_text()
    assert not [line for line in server.lines() if line["level"] == "error"]


SILENT = {
    "from the start": (b"", [], HEAD_TIMEOUT),
    "after a GET": (LIVEZ, [200], KEEP_ALIVE),
    "after a small PNG": (request(), [200], KEEP_ALIVE),
}
DRIPS = {
    "a head": (b"", LIVEZ[:-2] + b"X: " + b"a" * 100, [408], HEAD_TIMEOUT),
    "a target": (b"", b"GET /" + b"a" * 100, [408], HEAD_TIMEOUT),
    "a second head": (request(), LIVEZ[:-2] + b"X: " + b"a" * 50, [200, 408], HEAD_TIMEOUT),
    "a small PNG": (SHORT, PNG[:-1], [408], BODY_TIMEOUT),
    "a body": (SHORT.replace(b"predict", b"compare"), PNG[:-1], [408], BODY_TIMEOUT),
    "chunks": (STREAMED, b"1\r\na\r\n" * 30, [408], BODY_TIMEOUT),
    "a body that nobody wants": (
        SHORT.replace(b"predict", b"nowhere"),
        PNG[:-1],
        [404],
        BODY_TIMEOUT,
    ),
}


def test_silent_and_slow_connections_are_ended_at_their_deadline(hasty, refusal):
    """All at the same time: none waits for another."""
    ended = {}

    def converse(case, start, drops):
        started = time.monotonic()
        with hasty.connect() as connection:
            connection.sendall(start)
            drip = threading.Thread(target=drip_into, args=(connection, drops))
            drip.start()
            found = answers(hasty.read_all(connection))
            ended[case] = found, time.monotonic() - started
            drip.join()

    cases = {case: (start, b"", *rest) for case, (start, *rest) in SILENT.items()} | DRIPS
    threads = [threading.Thread(target=converse, args=(c, *cases[c][:2])) for c in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, (_, _, statuses, deadline) in cases.items():
        found, seconds = ended[case]
        assert [answer.status for answer in found] == statuses, case
        assert deadline - 0.1 < seconds < deadline + 1.5, case
        if statuses[-1:] == [408]:
            what = "head" if deadline == HEAD_TIMEOUT else "body"
            assert what in refusal(hasty, found[-1], 408), case


def drip_into(connection, drops):
    """Send bytes slowly, until the server refuses them."""
    try:
        for drop in drops:
            time.sleep(0.1)
            connection.sendall(bytes([drop]))
    except OSError:
        pass  # it was closed: that is asked for


def test_unread_answers_of_pipelined_requests_cost_no_memory(hasty):
    before = hasty.resident()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        connection.connect(("127.0.0.1", hasty.port))
        many = get("/openapi.json") * 1000
        with pytest.raises(TimeoutError):
            connection.sendall(many * 1000)
        assert hasty.resident() < before + 20 * 2**20
        lost = psutil.Process(hasty.process.pid)
        port = connection.getsockname()[1]
        eventually(lambda: port not in {c.raddr.port for c in lost.net_connections() if c.raddr})


def test_more_connections_than_the_cap_get_503_and_probes_an_answer(hasty, refusal):
    with ExitStack() as stack:
        uploads = [stack.enter_context(hasty.connect()) for _ in range(CAP)]
        for upload in uploads:
            upload.sendall(SHORT + PNG[:-1])
        for refused, route in ((request(), "/predict"), (get("/v1/models"), None)):
            (answer,) = answers(hasty.exchange(refused))
            assert "connections" in refusal(hasty, answer, 503)
            assert answer.headers["retry-after"] == "1"
            line = hasty.line(answer.headers["x-request-id"])
            assert (line["reason"], line["route"]) == ("connections", route)
        for path in ("/livez", "/readyz", "/healthz", "/v2/health/live"):
            assert httpx.get(hasty.url + path).status_code == 200
        for upload in uploads:
            upload.sendall(PNG[-1:])
            assert upload.recv(99).startswith(b"HTTP/1.1 200")
        uploads[0].close()
        eventually(lambda: httpx.get(hasty.url + "/v1/models").status_code == 200, 5)


def test_a_client_that_left_while_it_waited_is_found_out(hasty):
    images = json.dumps({"instances": [[[[k] * 3] * 16] * 16 for k in range(64)]}).encode()

    def long(seed):
        path = f"/v1/models/colour-cnn/uncertainty?samples=1000&seed={seed}"
        return request(path, images, "application/json", f"X-Request-ID: left{seed}")

    with ExitStack() as stack:
        for seed in range(1, 9):  # they take turns with it
            stack.enter_context(hasty.connect()).sendall(long(seed))
        with hasty.connect() as leaving:
            leaving.sendall(long(9))
        line = hasty.line("left9")
        assert line["status"] == 499
        assert line["milliseconds"] < 1500


def test_silent_connections_beyond_all_descriptors_leave_room_for_probes(make_server):
    server = make_server(command=LIMITED, head_timeout=3).start()
    with ExitStack() as stack:
        stack.enter_context(descriptors(2048))
        for _ in range(1010):
            stack.enter_context(server.connect())
        assert httpx.get(server.url + "/livez", timeout=2).status_code == 200
        refused = httpx.get(server.url + "/v1/models", timeout=2)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        eventually(lambda: httpx.get(server.url + "/v1/models", timeout=2).status_code == 200, 10)
    warned = [line["message"] for line in server.lines() if line["level"] == "warning"]
    assert [w.partition(":")[0] for w in warned] == ["at most 832 connections, not 8192"]
    assert not [line for line in server.lines() if line["level"] == "error"]
