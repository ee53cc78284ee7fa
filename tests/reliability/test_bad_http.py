"""Broken HTTP, and what is unusual but right, over a socket: the same on both paths.

Every error is a problem with a request id, has a line in the log, and comes within two seconds.
"""

import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from dropserve.service.errors import MalformedRequest
from dropserve.service.http.heads import read_head
from tests.helpers import PNG, eventually
from tests.reliability.messages import answers, get, head, head_of_image, request

CLOSE = "Connection: close"
PNG_TYPE = "Content-Type: image/png"
CHUNKED = "Transfer-Encoding: chunked"
LIVEZ = get("/livez")
LAST = get("/livez", CLOSE)
TLS = bytes.fromhex("1603010200010001fc0303") + bytes(range(256)) * 2
SHORT = head_of_image()
STREAMED = head("POST", "/predict", PNG_TYPE, CHUNKED)
END = b"0\r\n\r\n"
LENGTH = str(len(PNG)).encode()
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
    "another protocol": (400, request().replace(b"HTTP/1.1", b"RTSP/1.1")),
    "two spaces": (400, request().replace(b" HTTP/1.1", b"  HTTP/1.1")),
    "a tab behind the length": (400, request().replace(LENGTH, LENGTH + b"\t")),
    "a length of 20 digits": (400, request().replace(LENGTH, LENGTH.zfill(20))),
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


EARLY = {
    path: SHORT.replace(b"/predict", path.encode()) + PNG[:-1]
    for path in ("/predict", "/uncertainty", "/uncertainty/stream", "/compare")
} | {"a head": SHORT[:40], "no chunk": STREAMED}


@pytest.mark.parametrize("case", EARLY)
def test_a_request_that_ends_early_is_400(case, server, refusal):
    (answer,) = exchange(server, EARLY[case], half_close=True)
    refusal(server, answer, 400)


WHOLE = {
    "a GET": get("/readyz"),
    "a small PNG": request(),
    "samples": request("/uncertainty?samples=50"),
    "JSON": request("/predict", b'{"instances": [[[0, 1], [2, 3]]]}', "application/json"),
    "chunks": STREAMED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG),
    "several": LIVEZ + request() + request("/uncertainty?samples=200&seed=1") + LIVEZ,
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_client_that_closes_its_side_gets_its_answer(case, server):
    found = exchange(server, WHOLE[case], half_close=True)
    statuses = [answer.status for answer in found if answer.status != 100]  # asks if it is there
    assert statuses == [200] * WHOLE[case].count(b" HTTP/1.1\r\n")


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


def chunked(data=PNG, trailer=b""):
    return STREAMED + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(data), data, trailer)


def test_a_trailer_is_no_header(server):
    found = exchange(server, chunked(trailer=b"X-Request-ID: trailer\r\n") + LAST)
    assert [answer.status for answer in found] == [200, 200]
    assert "trailer" not in str(found)


@pytest.mark.parametrize("cut", range(-6, 0))
def test_a_chunked_body_ends_where_it_ends(cut, server):
    end = len(chunked()) + cut + 3
    raw = chunked() + get("/livez", "Host: y") + LAST
    pieces = raw[:end], raw[end : end + 1], raw[end + 1 :]
    assert statuses_in_pieces(server, *pieces) == [200, 400]


def test_a_head_in_pieces_leaves_nothing_behind(server):
    pieces = [part for raw in (request(), request(), LIVEZ) for part in (raw[:40], raw[40:], LIVEZ)]
    assert statuses_in_pieces(server, *pieces, LAST) == [200] * 7


def statuses_in_pieces(server, *pieces):
    with server.connect(10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)  # what is whole is answered before the next comes
        return [answer.status for answer in answers(server.read_all(connection))]


SLOW_TO_READ = {
    "spaces before an id": (400, b"GET / HTTP/1.1\r\nX-Request-ID:" + b" " * 60_000),
    "spaces in an id": (400, WITHOUT_HOST[:-2] + b"X-Request-ID: a" + b" " * 50_000 + b"b\r\n\r\n"),
    "empty lines in a chunk": (415, chunked(b"\r\n\r\n" * 100_000)),
}


@pytest.mark.parametrize("case", SLOW_TO_READ)
def test_nothing_takes_long_to_read(case, server, refusal):
    status, raw = SLOW_TO_READ[case]
    (answer,) = exchange(server, raw, half_close=True)
    refusal(server, answer, status)


@pytest.mark.parametrize(
    "field",
    [
        b"X: a\nContent-Length: 3",
        b"Content-Length : 3",
        b"Content-Length:",
        b"Content-Length: 3, 3",
        b"Content-Length: +3",
        b"Transfer-Encoding\t: chunked",
        b"Transfer-Encoding: chunked\t",
        b"Transfer-Encoding: gzip, chunked",
        b" X: a",
        b"X: a\0",
        b"X: a\rb",
        b"X",
    ],
)
def test_what_two_parsers_could_read_differently_is_refused_before_any_parser(field):
    with pytest.raises(MalformedRequest):
        read_head(b"POST /predict HTTP/1.1\r\nHost: x\r\n" + field + b"\r\n\r\n")


FLOODS = [
    (LIVEZ[:-2] + b"X: ", b"a" * 65_536),  # a header without an end
    (LIVEZ[:-2], b"A: b\r\n" * 10_000),
    (b"GET /", b"a" * 65_536),
    (head("POST", "/predict", CHUNKED) + b"0\r\n", b"A: b\r\n" * 10_000),  # trailers
    (b"", LIVEZ * 1_000),  # nobody reads the answers
]


def test_floods_take_bounded_memory(server):
    before = server.resident()
    with ThreadPoolExecutor(len(FLOODS)) as threads:
        floods = [threads.submit(flood, server, *flood_of) for flood_of in FLOODS]
        while not all(each.done() for each in floods):
            assert httpx.get(server.url + "/livez").elapsed.total_seconds() < 0.5
            assert server.resident() - before < 60 * 2**20
            time.sleep(0.1)
    assert max(each.result() for each in floods) < 50 * 2**20  # it was not all read


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


def exchange(server, raw, *, half_close=False):
    """Send bytes; return the answers that come until the server closes, within two seconds."""
    started = time.monotonic()
    found = answers(server.exchange(raw, end=half_close))
    assert time.monotonic() - started < 2
    return found


def flood(server, start, more):
    """Send bytes until they are not taken for two seconds, or there are 100 MiB; count them."""
    with server.connect(2) as connection:
        connection.sendall(start)
        sent = 0
        try:
            while sent < 100 * 2**20:
                sent += connection.send(more)
        except OSError:
            pass  # no room, or closed
        return sent


def reset_on_close(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
