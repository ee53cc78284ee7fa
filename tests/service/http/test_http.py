"""The edges of HTTP, over a socket: ids, methods, slow and broken connections, large bodies."""

import re
import socket
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import PNG, encode

PNG_TYPE = {"Content-Type": "image/png"}


def head(length, *lines, path="/predict"):
    """The head of a POST of a PNG, as bytes."""
    fixed = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: image/png"]
    if length is not None:
        fixed.append(f"Content-Length: {length}")
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def read_until(connection, end):
    received = b""
    while end not in received and (got := connection.recv(65_536)):
        received += got
    return received


def test_a_request_id_is_echoed_and_one_is_made_where_there_is_none(http):
    assert http.get("/livez", headers={"X-Request-ID": "a-B.9:_"}).headers["x-request-id"] == (
        "a-B.9:_"
    )
    made = {http.get("/livez").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert all(len(one) == 32 for one in made)


@pytest.mark.parametrize("hostile", ["a b", "a" * 129, '"', "<x>", "\u00e9", "a\tb", "%0a", "{}"])
def test_a_hostile_request_id_is_replaced(hostile, http):
    response = http.get("/nowhere", headers={"X-Request-ID": hostile.encode("latin-1")})
    assert response.status_code == 404
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", "POST"),
        ("HEAD", "/v1/models/digits-mlp/uncertainty", "POST"),
        ("PUT", "/v1/models/digits-mlp/versions/1/compare", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("TRACE", "/livez", "GET, HEAD"),
        ("POST", "/readyz", "GET, HEAD"),
    ],
)
def test_another_method_is_405_and_says_which_is_allowed(method, path, allowed, http, problem):
    response = http.request(method, path)
    assert response.headers["allow"] == allowed
    if method != "HEAD":
        assert problem(response, 405) == f"this path takes another method: {allowed}"


@pytest.mark.parametrize(
    "path",
    [
        *("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready", "/v2", "/v2/"),
        *("/v2/models/digits-mlp/ready", "/v1/models", "/metrics", "/docs", "/openapi.json"),
        *("/", "/playground/main.js"),
    ],
)
def test_head_is_answered_as_get_without_its_body(path, server):
    with httpx.Client(base_url=server.url) as http:
        got, head = http.get(path), http.head(path)
        assert (got.status_code, head.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":  # which counts these requests
            assert head.headers["content-length"] == got.headers["content-length"]
        assert http.get("/livez").json() == {"status": "ok"}  # on the same connection
    line = server.line(head.headers["x-request-id"])
    assert (line["method"], line["status"]) == ("HEAD", 200)
    assert line["route"] == server.line(got.headers["x-request-id"])["route"]


def test_the_server_metadata_has_two_addresses(http):
    assert http.get("/v2/").json() == http.get("/v2").json()


def test_an_unknown_model_names_those_there_are_and_the_closest(http, problem, protocol_error):
    expected = "no such model; served are colour-cnn, digits-mlp; did you mean digits-mlp?"
    wrong = http.post("/v1/models/digit-mlp/predict", content=PNG, headers=PNG_TYPE)
    assert problem(wrong, 404) == expected
    assert protocol_error(http.get("/v2/models/digit-mlp"), 404) == expected
    assert problem(http.get("/v1/models/digits-mlp/versions/7"), 404) == (
        "no such version of the model; served are 1, 2"
    )


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.from_regex(r"[a-zA-Z_]{1,34}", fullmatch=True) | st.text(min_size=1, max_size=8),
    value=st.sampled_from(["MARKER", "", "7"]),
)
def test_an_unknown_parameter_is_named_if_it_looks_like_one_and_no_value_is(
    name, value, http, problem, protocol_error
):
    name = name.encode("utf-8", "replace").decode()
    options = {"scale", "samples", "seed", "masks", "level"}
    if name in options | {"mode", "timeout", "priority"} or name.startswith("sequence_"):
        return
    wrong = http.post("/uncertainty/stream", params={name: value}, content=PNG, headers=PNG_TYPE)
    native = problem(wrong, 422)
    body = {"inputs": [], "parameters": {name: value}}
    protocol = protocol_error(http.post("/v2/models/digits-mlp/infer", json=body), 422)
    named = f" {name}" if re.fullmatch("[a-zA-Z_]{1,32}", name) else ""
    assert native == (f"unknown parameter{named}; allowed: scale, samples, seed, masks, level")
    assert f"parameters: unknown parameter{named}; allowed: scale, samples, " in protocol


@pytest.mark.parametrize(
    "path",
    [
        *("/MARKER", "/v1/models/", "/predict/", "/v3", "//predict", "/livez/../MARKER"),
        *("/predict%0A", "/predict%0A?scale=MARKER", "/v1/models/digits-mlp/uncertainty%0A"),
    ],
)
def test_an_unknown_route_is_404(path, http, problem):
    problem(http.request("POST", httpx.URL(http.base_url, raw_path=path.encode())), 404)


def test_an_expected_body_is_asked_for_and_an_oversize_one_refused_unread(server):
    with server.connect(10) as connection:
        connection.sendall(head(len(PNG), "Expect: 100-continue"))
        assert read_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(PNG)
        assert read_until(connection, b"}]}").startswith(b"HTTP/1.1 200")
    answer = server.exchange(head(2**40, "Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("size", [2**20 + 1, 2 * 2**20, 3 * 2**20])
def test_a_body_over_the_limit_is_413_to_a_client_that_sends_all_of_it(size, server, problem):
    response = httpx.post(
        server.url + "/predict", content=bytes(size), headers={"Content-Type": "image/png"}
    )
    problem(response, 413)
    assert response.headers["connection"] == "close"


def test_a_body_without_end_is_cut_and_takes_no_memory(server):
    before = server.resident()
    chunks = (b"10000\r\n" + bytes(0x10000) + b"\r\n") * 1000
    with server.connect(10) as connection:
        connection.sendall(head(None, "Transfer-Encoding: chunked"))
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            connection.sendall(chunks)
    assert server.resident() - before < 30_000_000


def test_a_body_that_drips_in_is_408_within_the_time_allowed(tight_server):
    with tight_server.connect(10) as connection:
        connection.sendall(head(len(PNG)) + PNG[:10])
        started = time.monotonic()
        answer = tight_server.read_all(connection)
    assert time.monotonic() - started < 5
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer.lower()


def test_a_client_that_leaves_while_it_sends_is_no_error(server):
    with server.connect(10) as connection:
        connection.sendall(head(500_000, "X-Request-ID: leaver") + bytes(1000))
    line = server.line("leaver")
    assert (line["status"], line["level"]) == (400, "info")  # it ended its body, and left


def test_a_body_shorter_than_announced_is_refused(server):
    with server.connect(10) as connection:
        connection.sendall(head(len(PNG) + 1, "X-Request-ID: short") + PNG)
        connection.shutdown(socket.SHUT_WR)
        answer = server.read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"shorter" in answer
    assert server.line("short")["status"] == 400


@pytest.mark.parametrize(
    "raw",
    [
        head(5, "Content-Length: 6") + b"aaaaaa",
        head(5, "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head(None, "Transfer-Encoding: chunked") + b"5\r\naaaaaXX",
        head(None, "Transfer-Encoding: chunked") + b"zz\r\n",
        head(0, "X-A: a\0b"),
        head("-1"),
        head("9" * 30),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=[
        *("two lengths", "a length and chunks", "a bad chunk end", "a bad chunk size"),
        *("NUL in a header", "negative length", "huge length", "TLS"),
        *("unknown version", "bytes in the path"),
    ],
)
def test_broken_http_is_refused_and_the_connection_closed(raw, server):
    answer = server.exchange(raw)
    assert answer.startswith(b"HTTP/1.1 400")


def test_pipelined_requests_are_answered_in_order(server):
    ids = [f"X-Request-ID: pipelined-{n}" for n in range(20)]
    raw = b"".join(head(len(PNG), line) + PNG for line in ids[:-1])
    answer = server.exchange(raw + head(len(PNG), ids[-1], "Connection: close") + PNG)
    found = [line for line in answer.decode().split("\r\n") if line.startswith("x-request-id")]
    assert found == [line.lower() for line in ids]
    assert answer.count(b"HTTP/1.1 200") == 20


def test_a_client_that_leaves_its_pipelined_requests_leaves_no_traceback(server):
    path = "/v1/models/colour-cnn/uncertainty?samples=300&seed={}"
    with server.connect(10) as connection:
        for n in range(5):
            line = f"X-Request-ID: abandoned-{n}"
            connection.sendall(head(len(PNG), line, path=path.format(n)) + PNG)
    assert "exception" not in server.line("abandoned-0")
    assert httpx.post(server.url + "/predict", content=PNG, headers=PNG_TYPE).status_code == 200
    assert [line for line in server.lines() if "exception" in line] == []


def test_what_pillow_warns_of_stays_out_of_the_log(server):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0"  # nine entries, and none follows
    file = encode(Image.new("L", (8, 8), 77), "JPEG", exif=exif)
    headers = {"Content-Type": "image/jpeg"}
    response = httpx.post(server.url + "/predict", content=file, headers=headers)
    assert response.status_code == 200
    assert server.errors.read_text() == ""


def test_http_1_0_is_answered_and_closed(server):
    raw = head(len(PNG)).replace(b"HTTP/1.1", b"HTTP/1.0") + PNG
    assert server.exchange(raw).startswith(b"HTTP/1.1 200")


def test_a_range_is_ignored(http):
    response = http.get("/v1/models", headers={"Range": "bytes=0-1"})
    assert response.status_code == 200
    assert len(response.content) > 2


def test_bodies_are_held_within_a_limit_and_give_their_room_back(make_server, problem):
    server = make_server(max_body_bytes=65_536, max_held_bytes=100_000).start()
    body = PNG + bytes(60_000 - len(PNG))  # what follows a picture is ignored
    answers = []
    with server.connect(10) as slow:
        slow.sendall(head(65_000) + body)
        end = time.monotonic() + 10
        while 503 not in answers and time.monotonic() < end:
            answer = httpx.post(server.url + "/predict", content=body, headers=PNG_TYPE)
            answers.append(answer.status_code)
    assert answers[-1] == 503
    assert "bodies" in problem(answer, 503)
    assert answer.headers["retry-after"] == "1"
    while answer.status_code == 503 and time.monotonic() < end:
        answer = httpx.post(server.url + "/predict", content=body, headers=PNG_TYPE)
    assert answer.status_code == 200


def test_a_connection_outlives_what_clients_keep_idle(servers):
    """httpx closes its idle connections after 5 s: asking and closing must not cross."""
    with servers(True).connect(10) as fast, servers(False).connect(10) as asgi:
        for pause in (5.5, 0):
            for connection in (fast, asgi):
                connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                assert read_until(connection, b"}").startswith(b"HTTP/1.1 200")
            time.sleep(pause)
