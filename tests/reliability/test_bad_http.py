"""Broken HTTP, and what is unusual but right, over a socket: the same on both paths.

Every error is a problem with a request id, has a line in the log, and comes within two seconds of
the last byte or of its deadline.
"""

import json
import socket
import struct
import threading
import time
from contextlib import ExitStack

import httpx
import pytest

from tests.helpers import PNG, eventually
from tests.reliability.messages import answers, get, head, request

CLOSE = "Connection: close"
PNG_TYPE = "Content-Type: image/png"
CHUNKED = "Transfer-Encoding: chunked"
LIVEZ = get("/livez")
LAST = get("/livez", CLOSE)
TLS = bytes.fromhex("1603010200010001fc0303") + bytes(range(256)) * 2
SHORT = head("POST", "/predict", PNG_TYPE, f"Content-Length: {len(PNG)}")
STREAMED = head("POST", "/predict", PNG_TYPE, CHUNKED)
END = b"0\r\n\r\n"
WITHOUT_HOST = LIVEZ.replace(b"Host: x\r\n", b"")
BAD = {
    "two lengths": (400, request("/predict", PNG, "image/png", "Content-Length: 1")),
    "a length twice": (400, request("/predict", PNG, "image/png", f"Content-Length: {len(PNG)}")),
    "a length that is no number": (400, head("POST", "/predict", "Content-Length: MARKER")),
    "a negative length": (400, head("POST", "/predict", "Content-Length: -1")),
    "length and chunks": (400, head("POST", "/predict", CHUNKED, "Content-Length: 3") + END),
    "chunks and length": (400, head("POST", "/predict", "Content-Length: 3", CHUNKED) + END),
    "another coding": (400, head("POST", "/predict", "Transfer-Encoding: gzip, chunked") + END),
    "only another coding": (400, head("POST", "/predict", "Transfer-Encoding: gzip") + b"MARKER"),
    "a bad end of a chunk": (400, STREAMED + b"1\r\naMARKER\r\n" + END),
    "a bad length of a chunk": (400, STREAMED + b"MARKER\r\n"),
    "NUL in a header": (400, get("/livez", "X: MARKER\0")),
    "NUL in the path": (400, get("/livez\0MARKER")),
    "a header without a name": (400, get("/livez", ": MARKER")),
    "a space before the colon": (400, get("/livez", "MARKER : 1")),
    "a folded header": (400, get("/livez", "X: 1", " MARKER")),
    "TLS": (400, TLS),
    "no HTTP": (400, b"MARKER\r\n\r\n"),
    "no host": (400, WITHOUT_HOST),
    "two hosts": (400, get("/livez", "Host: MARKER")),
    "HTTP/2.0": (400, LIVEZ.replace(b"HTTP/1.1", b"HTTP/2.0")),
    "HTTP/2 with prior knowledge": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9": (400, LIVEZ.replace(b"HTTP/1.1", b"HTTP/0.9")),
    "no version": (400, b"GET /livez\r\n\r\n"),
    "an unknown method": (405, head("MARKER", "/predict", CLOSE)),
    "a long target": (414, get("/" + "a" * 8192)),
    "a target of 100 kB": (414, get("/" + "a" * 100_000)),
    "a long query": (414, get("/livez?" + "a" * 9_000)),
    "a large head": (431, get("/livez", *(f"X-{n}: {'a' * 1000}" for n in range(70)))),
    "a large header": (431, get("/livez", "X: " + "a" * 70_000)),
    "a large head without an end": (431, get("/livez", "X: " + "a" * 70_000)[:-4]),
    "101 headers": (431, get("/livez", *["A: b"] * 100)),
    "many headers without an end": (431, get("/livez", *["A: b"] * 5_000)[:-4]),
    "large trailers": (431, STREAMED + b"0\r\nX: " + b"a" * 70_000),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case, server, refusal):
    status, raw = BAD[case]
    (answer,) = exchange(server, raw)
    refusal(server, answer, status)
    assert answer.headers["connection"] == "close"
    if status == 405:
        assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/predict", "/uncertainty", "/uncertainty/stream", "/compare"])
def test_a_body_that_ends_early_is_400(path, server, refusal):
    early = SHORT.replace(b"/predict", path.encode()) + PNG[:-1]
    (answer,) = exchange(server, early, half_close=True)
    refusal(server, answer, 400)


WHOLE = {
    "a GET": get("/readyz"),
    "a small PNG": request(),
    "samples": request("/uncertainty?samples=50"),
    "JSON": request("/predict", b'{"instances": [[[0, 1], [2, 3]]]}', "application/json"),
    "chunks": STREAMED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_client_that_closes_its_side_gets_its_answer(case, server):
    (answer,) = exchange(server, WHOLE[case], half_close=True)
    assert answer.status == 200


@pytest.mark.parametrize(
    "garbage",
    [TLS, b"MARKER\r\n\r\n", WITHOUT_HOST, b"\0" * 100],
    ids=["TLS", "no HTTP", "no host", "NUL"],
)
@pytest.mark.parametrize(
    ("before", "statuses"),
    [
        ([LIVEZ], [200]),
        ([request()], [200]),
        ([get("/nowhere")], [404]),
        ([request(body=b"MARKER")], [415]),
        ([request(), LIVEZ, request("/nowhere"), request("/uncertainty")], [200, 200, 404, 200]),
    ],
    ids=["a GET", "a small PNG", "no such route", "no image", "several"],
)
def test_complete_requests_before_garbage_are_answered_in_order(
    before, statuses, garbage, server, refusal
):
    *found, last = exchange(server, b"".join(before) + garbage)
    assert [answer.status for answer in found] == statuses
    refusal(server, last, 400)


def test_pipelined_requests_are_answered_in_order(server):
    targets = ["/livez", "/uncertainty?samples=20", "/readyz", "/predict", "/nowhere"] * 8
    raw = b""
    for number, target in enumerate(targets):
        name = f"X-Request-ID: {number}"
        posts = target.startswith(("/uncertainty", "/predict"))
        raw += request(target, PNG, "image/png", name) if posts else get(target, name)
    found = exchange(server, raw + LAST)
    assert [answer.status for answer in found] == [200, 200, 200, 200, 404] * 8 + [200]
    ids = [answer.headers["x-request-id"] for answer in found[:-1]]
    assert ids == [str(number) for number in range(len(targets))]


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "MARKER"])
@pytest.mark.parametrize("cut", [None, 30, -10])
def test_an_upgrade_is_ignored(protocol, cut, server):
    upgrade = f"Upgrade: {protocol}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMA"
    raw = request("/predict", PNG, "image/png", *upgrade)
    with server.connect(10) as connection:
        connection.sendall(raw[:cut])
        if cut is not None:
            time.sleep(0.05)
            connection.sendall(raw[cut:])
        connection.sendall(get("/readyz", *upgrade) + LAST)
        found = answers(server.read_all(connection))
    assert [answer.status for answer in found] == [200] * 3
    assert json.loads(found[0].body)["predictions"]
    assert [json.loads(answer.body).get("status") for answer in found[1:]] == ["ready", "ok"]


@pytest.mark.parametrize(
    "raw",
    [
        WITHOUT_HOST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        request("/predict", PNG, "image/png", CLOSE).replace(b"HTTP/1.1", b"HTTP/1.0"),
        get("/livez", "Range: bytes=0-1", CLOSE),
        get("http://x/livez", CLOSE),
        b"\r\n\r\n" + LAST,
        get("/livez", "X: " + "a" * 60_000, CLOSE),
        get("/livez", *["A: b"] * 98, CLOSE),
    ],
    ids=["1.0", "a 1.0 POST", "a range", "an absolute target", "empty lines", "60 kB", "100 lines"],
)
def test_what_is_right_is_answered(raw, server):
    (answer,) = exchange(server, raw)
    assert answer.status == 200


def test_a_target_of_8_kib_is_read(server, refusal):
    (answer,) = exchange(server, get("/" + "a" * 8191, CLOSE))
    refusal(server, answer, 404)


FLOODS = {
    "a header without an end": (LIVEZ[:-2] + b"X: ", b"a" * 65_536),
    "headers without an end": (LIVEZ[:-2], b"A: b\r\n" * 10_000),
    "a target without an end": (b"GET /", b"a" * 65_536),
    "trailers without an end": (head("POST", "/predict", CHUNKED) + b"0\r\n", b"A: b\r\n" * 10_000),
    "requests whose answers nobody reads": (b"", LIVEZ * 1_000),
}


@pytest.mark.parametrize("case", FLOODS)
def test_floods_take_bounded_memory(case, server):
    start, more = FLOODS[case]
    before = server.resident()
    with server.connect(2) as connection:
        connection.sendall(start)
        sent = send_until_refused(connection, more, most=100 * 2**20)
        assert httpx.get(server.url + "/livez").elapsed.total_seconds() < 0.5
        assert server.resident() - before < 30 * 2**20
    assert sent < 50 * 2**20  # it was not all read


def test_clients_that_leave_pipelined_requests_log_no_error(server):
    before = len(server.lines())
    for _ in range(20):
        with server.connect(10) as connection:
            reset_on_close(connection)
            connection.sendall(request("/uncertainty?samples=100") * 3 + LIVEZ * 20)
            time.sleep(0.01)
    eventually(lambda: httpx.get(server.url + "/livez").status_code == 200)
    time.sleep(0.5)
    assert [line for line in server.lines()[before:] if line["level"] in ("error", "warning")] == []


# Deadlines of one second.


@pytest.fixture(scope="module", params=[True, False], ids=["fast path", "ASGI path"])
def impatient(request, make_server):
    limits = {"head_timeout": 1, "body_timeout": 1, "keep_alive": 1}
    return make_server(fast_path=request.param, **limits).start()


DRIPS = {
    "a head": LIVEZ[:-2] + b"X: " + b"a" * 100,
    "a target": b"GET /" + b"a" * 100,
    "a small PNG": SHORT + PNG[:-1],
    "a body": SHORT.replace(b"/predict", b"/uncertainty/stream") + PNG[:-1],
    "chunks": STREAMED + b"1\r\na\r\n" * 30,
    "a body that nobody wants": SHORT.replace(b"/predict", b"/nowhere") + PNG[:-1],
    "a second head": LIVEZ + LIVEZ[:-2] + b"X: " + b"a" * 50,
}


@pytest.mark.parametrize("case", DRIPS)
def test_drips_are_ended_at_their_deadline(case, impatient, refusal):
    raw = DRIPS[case]
    whole = raw.rfind(b"\r\n\r\n") + 4 if raw.startswith(b"POST") or case == "a second head" else 0
    started = time.monotonic()
    with impatient.connect(10) as connection:
        drip = threading.Thread(target=drip_into, args=(connection, raw, whole))
        drip.start()
        *before, last = answers(impatient.read_all(connection))
        seconds = time.monotonic() - started
        drip.join()
    assert seconds < 3
    if case == "a body that nobody wants":
        assert (last.status, before) == (404, [])  # the answer needs no body
    else:
        assert seconds > 0.8
        refusal(impatient, last, 408)
        assert [answer.status for answer in before] == [200] * (case == "a second head")


def test_a_silent_connection_is_closed(impatient, refusal):
    started = time.monotonic()
    for answer in exchange(impatient, b""):
        refusal(impatient, answer, 408)
    assert 0.8 < time.monotonic() - started < 3


@pytest.mark.parametrize("raw", [LIVEZ, request()], ids=["a GET", "a small PNG"])
def test_an_idle_connection_is_closed(raw, impatient):
    started = time.monotonic()
    (answer,) = exchange(impatient, raw)
    assert answer.status == 200
    assert 0.8 < time.monotonic() - started < 3


CAP = 8


@pytest.fixture(scope="module", params=[True, False], ids=["fast path", "ASGI path"])
def crowded(request, make_server):
    """A server all of whose connections are taken, and those connections: uploads that wait."""
    server = make_server(fast_path=request.param, max_connections=CAP).start()
    with ExitStack() as stack:
        uploads = [stack.enter_context(server.connect(10)) for _ in range(CAP)]
        for upload in uploads:
            upload.sendall(SHORT + PNG[:-1])
        time.sleep(0.2)
        yield server, uploads


@pytest.mark.parametrize(
    "raw",
    [request("/predict", PNG, "image/png", CLOSE), get("/v1/models", CLOSE)],
    ids=["a small PNG", "a GET"],
)
def test_a_connection_over_the_cap_is_refused(raw, crowded, refusal):
    server, _ = crowded
    (answer,) = exchange(server, raw)
    refusal(server, answer, 503)
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("probe", ["/livez", "/readyz", "/healthz", "/v2/health/live"])
def test_probes_are_answered_over_the_cap(probe, crowded):
    server, _ = crowded
    (answer,) = exchange(server, get(probe, CLOSE))
    assert answer.status == 200


def test_connections_within_the_cap_are_served_and_those_that_close_make_room(crowded):
    server, (first, *others) = crowded
    first.sendall(PNG[-1:] + LAST)
    assert [answer.status for answer in answers(server.read_all(first))] == [200, 200]
    assert exchange(server, get("/v1/models", CLOSE))[0].status == 200
    for upload in others:
        upload.sendall(PNG[-1:] + LAST)
        assert [answer.status for answer in answers(server.read_all(upload))] == [200, 200]


@pytest.fixture
def refusal():
    """Check an error: a problem with the request's id, which the log has, and no echo."""

    def check(server, answer, status):
        assert answer.status == status, answer
        assert answer.headers["content-type"] == "application/problem+json"
        problem = json.loads(answer.body)
        assert set(problem) == {"type", "title", "status", "detail", "request_id"}
        assert (problem["status"], bool(problem["detail"])) == (status, True)
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert b"MARKER" not in answer.body
        assert server.line(problem["request_id"])["status"] == status

    return check


def exchange(server, raw, *, half_close=False):
    """Send bytes; return the answers that come until the server closes, within two seconds."""
    started = time.monotonic()
    found = answers(server.exchange(raw, end=half_close))
    # of its last byte, or of a deadline of one second
    assert time.monotonic() - started < (2 if found else 3)
    return found


def drip_into(connection, raw, whole):
    """Send the first bytes at once and the rest slowly, until the server refuses them."""
    try:
        connection.sendall(raw[:whole])
        for byte in raw[whole:]:
            time.sleep(0.1)
            connection.sendall(bytes([byte]))
    except OSError:
        pass  # it was closed: that is asked for


def send_until_refused(connection, piece, most):
    """Send a piece again and again, until it is not taken for two seconds; return the bytes."""
    sent = 0
    try:
        while sent < most:
            sent += connection.send(piece)
    except OSError:
        pass  # no room, or closed
    return sent


def reset_on_close(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
