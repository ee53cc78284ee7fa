"""Connections: deadlines, their number, what is read ahead, and clients that send no more."""

import json
import resource
import socket
import time
from contextlib import ExitStack, suppress

import httpx
import psutil
import pytest

from dropserve.service.errors import MalformedRequest
from dropserve.service.http.heads import read_head
from tests.conftest import SERVE
from tests.helpers import PNG, eventually
from tests.reliability import messages

HEAD_TIMEOUT, KEEP_ALIVE, CAP = 0.6, 1.5, 40
GET = messages.get("/livez")
SLOW = b"/uncertainty?samples=1000&seed=%d"


def post(path=b"/predict", *fields, body=PNG):
    return messages.request(path.decode(), body, "image/png", *map(bytes.decode, fields))


@pytest.fixture(scope="module", params=[True, False], ids=["fast path", "ASGI path"])
def hasty(make_server, request):
    """A server with little patience."""
    server = make_server(
        fast_path=request.param,
        head_timeout=HEAD_TIMEOUT,
        keep_alive=KEEP_ALIVE,
        body_timeout=1.0,
        max_connections=CAP,
    )
    yield server.start()
    assert "Traceback" not in server.errors.read_text()
    assert not [line for line in server.lines() if line["level"] == "error"]


def answers(server, raw, *, end=False):
    """Send bytes, and perhaps no more after them; return the (status, body) of each answer."""
    return parse(server.exchange(raw, 20, end=end))


def parse(received):
    """Read answers, without the interim ones, which ask if the client is there."""
    return [(each.status, each.body) for each in messages.answers(received) if each.status != 100]


def problem(server, raw_or_answers, status):
    """Check that the only answer is a logged problem of a status."""
    ((found, body),) = raw_or_answers
    assert found == status
    described = json.loads(body)
    assert described["status"] == status
    assert server.line(described["request_id"])["status"] == status
    return described["detail"]


def closed_after(connection):
    """Seconds until the server closes a connection, and what it sent."""
    started = time.monotonic()
    received = b""
    while chunk := connection.recv(65_536):
        received += chunk
    return time.monotonic() - started, received


def test_a_silent_connection_is_closed(hasty):
    with hasty.connect() as connection:
        seconds, received = closed_after(connection)
    assert received == b""
    assert HEAD_TIMEOUT - 0.1 < seconds < HEAD_TIMEOUT + 1


def test_an_idle_connection_is_closed(hasty):
    with hasty.connect() as connection:
        connection.sendall(post())
        seconds, received = closed_after(connection)
    assert [status for status, _ in parse(received)] == [200]
    assert KEEP_ALIVE - 0.1 < seconds < KEEP_ALIVE + 1.5


@pytest.mark.parametrize("sent", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", post()[:60]])
def test_an_unfinished_head_gets_408(hasty, sent):
    with hasty.connect() as connection:
        for k in range(0, len(sent), 8):  # drops do not prolong it
            connection.sendall(sent[k : k + 8])
            time.sleep(0.05)
        seconds, received = closed_after(connection)
    assert seconds < HEAD_TIMEOUT + 1
    assert "head" in problem(hasty, parse(received), 408)


def test_a_head_after_an_answer_has_the_same_deadline(hasty):
    with hasty.connect() as connection:
        connection.sendall(post() + post()[:50])
        seconds, received = closed_after(connection)
    assert [status for status, _ in parse(received)] == [200, 408]
    assert seconds < HEAD_TIMEOUT + 1.5


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200_000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 100_000, 431),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /" + b"a" * 100_000, 414),
        (b"GET /" + b"a" * 8_150 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 90 + b"\r\n", 200),
    ],
)
def test_heads_are_bounded(hasty, raw, status):
    with hasty.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it is refused before its end
            connection.sendall(raw)
        received = hasty.read_all(connection)
    assert parse(received)[0][0] == status


def send_many(connection, data, times):
    for _ in range(times):
        connection.sendall(data)


def test_100_mb_of_header_fields_cost_no_memory(hasty):
    before = hasty.resident()
    with hasty.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        with suppress(BrokenPipeError, ConnectionResetError):
            send_many(connection, b"A: b\r\n" * 17_000, 1000)
        assert parse(hasty.read_all(connection))[0][0] == 431
    assert hasty.resident() < before + 20 * 2**20


def test_unread_answers_of_pipelined_requests_cost_no_memory(hasty):
    before = hasty.resident()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        connection.connect(("127.0.0.1", hasty.port))
        with pytest.raises(TimeoutError):
            send_many(connection, GET.replace(b"/livez", b"/openapi.json") * 1000, 1000)
        assert hasty.resident() < before + 20 * 2**20
        lost = psutil.Process(hasty.process.pid)
        port = connection.getsockname()[1]
        eventually(lambda: port not in {c.raddr.port for c in lost.net_connections() if c.raddr})


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02", b"GARBAGE\r\n\r\n", b"GET /\r\n"])
def test_every_request_before_garbage_is_answered(hasty, garbage):
    many = [post(), GET, post(b"/nowhere"), post(b"/uncertainty?samples=3&seed=4"), GET]
    found = answers(hasty, b"".join(many) + garbage)
    assert [status for status, _ in found] == [200, 200, 404, 200, 200, 400]


@pytest.mark.parametrize("raw", [post(), post(SLOW % 1), GET, GET + post() + GET])
def test_a_client_that_sends_no_more_gets_its_answers(hasty, raw):
    found = [status for status, _ in answers(hasty, raw, end=True)]
    assert found == [200] * raw.count(b" HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "raw",
    [
        post(body=PNG + b"x")[:-1],
        post(b"/nowhere", body=PNG * 9)[:-1][: -len(PNG)],
        post()[:40],
        post().replace(b"Content-Length: %d" % len(PNG), b"Transfer-Encoding: chunked"),
    ],
)
def test_a_request_that_ends_early_gets_400(hasty, raw):
    statuses = [status for status, _ in answers(hasty, raw, end=True)]
    assert statuses in ([400], [404])


def test_a_client_that_left_while_it_waited_is_found_out(hasty):
    images = json.dumps({"instances": [[[[k] * 3] * 16] * 16 for k in range(64)]}).encode()

    def long(seed):
        path = b"/v1/models/colour-cnn" + SLOW % seed
        raw = post(path, b"X-Request-ID: left%d" % seed, body=images)
        return raw.replace(b"image/png", b"application/json")

    with ExitStack() as stack:
        for seed in range(1, 9):  # they take turns with it
            stack.enter_context(hasty.connect()).sendall(long(seed))
        with hasty.connect() as leaving:
            leaving.sendall(long(9))
        line = hasty.line("left9")
        assert line["status"] == 499
        assert line["milliseconds"] < 1500


@pytest.mark.parametrize("kind", [b"h2c", b"websocket"])
def test_an_upgrade_is_ignored(hasty, kind):
    upgrade = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + kind]
    raw = post(b"/predict", *upgrade) + GET.replace(
        b"Host: x", b"\r\n".join([b"Host: x", *upgrade])
    )
    found = answers(hasty, raw + GET, end=True)
    assert [status for status, _ in found] == [200, 200, 200]


def chunked(*fields, data=PNG, trailer=b""):
    head = post(b"/predict", *fields).split(b"\r\n\r\n")[0]
    head = head.replace(b"Content-Length: %d" % len(PNG), b"Transfer-Encoding: chunked")
    return b"%b\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n" % (head, len(data), data, trailer)


def test_spaces_in_a_request_id_take_no_time(hasty):
    started = time.monotonic()
    for raw in (
        b"X-Request-ID:" + b" " * 60_000,
        b"X-Request-ID: a" + b" " * 50_000 + b"b\r\n\r\n",
    ):
        ((status, _),) = answers(hasty, b"GET / HTTP/1.1\r\n" + raw, end=True)
        assert status == 400
    assert time.monotonic() - started < 2


def test_empty_lines_between_requests_are_ignored(hasty):
    found = answers(hasty, b"\r\n" + post() + b"\r\n" + GET + b"\r\n\r\n", end=True)
    assert [status for status, _ in found] == [200, 200]


def test_a_trailer_is_no_header(hasty):
    sent = chunked(trailer=b"X-Request-ID: trailer\r\n")
    with hasty.connect() as connection:
        connection.sendall(sent + GET)
        connection.shutdown(socket.SHUT_WR)
        received = hasty.read_all(connection)
    assert [status for status, _ in parse(received)] == [200, 200]
    assert b"trailer" not in received


@pytest.mark.parametrize("cut", range(-6, 0))
def test_a_chunked_body_ends_where_it_ends(hasty, cut):
    raw = chunked() + post() + chunked() + GET
    end = len(chunked()) + cut + 3
    with hasty.connect() as connection:
        for piece in (raw[:end], raw[end:]):
            connection.sendall(piece)
            time.sleep(0.05)
        connection.shutdown(socket.SHUT_WR)
        assert [status for status, _ in parse(hasty.read_all(connection))] == [200] * 4


def test_empty_lines_in_a_chunk_take_little_time(hasty):
    started = time.monotonic()
    ((status, _), _) = answers(hasty, chunked(data=b"\r\n\r\n" * 100_000) + GET, end=True)
    assert status == 415
    assert time.monotonic() - started < 2


def test_a_head_in_pieces_leaves_nothing_behind(hasty):
    with hasty.connect() as connection:
        for raw in (post(), post(), GET):
            for piece in (raw[:40], raw[40:], GET):
                connection.sendall(piece)
                time.sleep(0.05)  # it is answered before the next comes
        connection.shutdown(socket.SHUT_WR)
        assert [status for status, _ in parse(hasty.read_all(connection))] == [200] * 6


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


def test_more_connections_than_the_cap_get_503_and_probes_an_answer(hasty):
    with ExitStack() as stack:
        for _ in range(CAP):
            stack.enter_context(hasty.connect()).sendall(b"GET")
        with hasty.connect() as over:
            over.sendall(post())
            _, received = closed_after(over)
        assert b"retry-after: 1" in received.lower()
        assert "connections" in problem(hasty, parse(received), 503)
        assert (
            hasty.line(json.loads(parse(received)[0][1])["request_id"])["reason"] == "connections"
        )
        for path in ("/livez", "/readyz"):
            assert httpx.get(hasty.url + path).status_code == 200
    eventually(lambda: answers(hasty, post(), end=True)[0][0] == 200, 5)


def test_silent_connections_beyond_all_descriptors_leave_room_for_probes(make_server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    limited = SERVE.replace(
        "serve(Settings())",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024));"
        "serve(Settings())",
    )
    try:
        server = make_server(command=limited, head_timeout=5)
        server.start()
        with ExitStack() as stack:
            for _ in range(1010):
                stack.enter_context(server.connect())
            for _ in range(5):
                assert httpx.get(server.url + "/livez", timeout=2).status_code == 200
                refused = httpx.get(server.url + "/v1/models", timeout=2)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            eventually(
                lambda: httpx.get(server.url + "/v1/models", timeout=2).status_code == 200, 10
            )
        assert not [line for line in server.lines() if line["level"] == "error"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
