"""The fast path and the ASGI path answer a request the same, whatever becomes of it.

The server runs in a thread, so that a test can see which path a request took. A request in one
piece may take the fast path.
"""

import json
import logging
import socket
import ssl
import threading
import time
import zlib
from contextlib import contextmanager
from itertools import accumulate

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from dropserve.service.app import create_app
from dropserve.service.fastpath.uvicorn_protocol import FastPathProtocol
from dropserve.service.inference.inference import Inference
from dropserve.service.observability.logs import FIELDS
from dropserve.service.server import uvicorn_options
from dropserve.service.settings import Settings
from tests.helpers import certify, encode, eventually, noise

ID = b"X-Request-ID: this\r\n"


def png(mode="L", size=(8, 8), seed=0, **options):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return encode(noise(*shape, seed=seed), **options)


PNG = png()


def post(path=b"/predict", body=PNG, headers=ID, kind=b"image/png"):
    lines = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: %b\r\n" % (path, kind)
    return lines + b"Content-Length: %d\r\n%b\r\n%b" % (len(body), headers, body)


class Service:
    """A server in a thread of this process.

    Attributes:
        taken: for each piece of data that the fast path was offered, whether it took it.
        asgi: whether it is to take none.
    """

    def __init__(self, checkpoints, keep_alive=75, middleware=(), **given):
        values = {"checkpoints": checkpoints, "default_model": "digits-mlp", "port": 0, **given}
        self.settings = Settings(**values)
        self.inference = Inference(self.settings)
        self.app = create_app(self.settings, self.inference)
        self.app.user_middleware += middleware
        self.taken = []
        self.asgi = False
        self.tls = None
        if self.settings.tls_cert is not None:
            self.tls = ssl.create_default_context(cafile=self.settings.tls_cert)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        test = self

        class Watched(FastPathProtocol):
            def take(self):
                self._asgi = self._asgi or test.asgi
                found = super().take()
                test.taken.append(found is not None)
                return found

        options = uvicorn_options(self.settings)
        assert options["http"] is FastPathProtocol
        options |= {"timeout_keep_alive": keep_alive, "http": Watched}
        config = uvicorn.Config(self.app, **options)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        end = time.monotonic() + 30
        while not self.server.started and time.monotonic() < end:
            time.sleep(0.01)

    @property
    def held(self):
        """Bytes of bodies."""
        return self.app.state.reader._held

    def connect(self):
        plain = socket.create_connection(("127.0.0.1", self.port), 20)
        return self.tls.wrap_socket(plain, server_hostname="127.0.0.1") if self.tls else plain

    def ask(self, raw, cuts=(), pause=0.02):
        """Send a request in pieces; return the answer's status, headers and body."""
        with self.connect() as connection:
            for start, end in zip((0, *cuts), (*cuts, len(raw)), strict=True):
                connection.sendall(raw[start:end])
                time.sleep(pause if cuts else 0)
            return read_answer(connection.makefile("rb"))

    def ask_asgi(self, raw):
        self.asgi = True
        try:
            return self.ask(raw)
        finally:
            self.asgi = False

    def both_paths(self, raw):
        """Ask on either path; return the same answer, and if the fast path took it."""
        self.taken.clear()
        at_once = self.ask(raw)
        taken = any(self.taken)
        assert at_once == self.ask_asgi(raw)
        assert self.held == 0
        return at_once, taken

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.socket.close()


def read_answer(file):
    """Read one answer: its status, headers but the date, and body."""
    status = int(file.readline().split()[1])
    headers = {}
    while (line := file.readline().strip()) != b"":
        name, value = line.split(b": ", 1)
        assert name not in headers
        headers[name] = value
    body = file.read(int(headers[b"content-length"]))
    return status, {k: v for k, v in headers.items() if k != b"date"}, body


@contextmanager
def serving(checkpoints, **given):
    service = Service(checkpoints, **given)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def service(checkpoints):
    with serving(checkpoints) as made:
        yield made


@contextmanager
def busy(service):
    """Have the thread that runs models wait, and no batch run on the event loop."""
    gate = threading.Event()
    models = [service.inference.store.find(name, None) for name in ("digits-mlp", "colour-cnn")]
    before = [dict(model.inline) for model in models]
    for model in models:
        model.inline.clear()
    service.inference._worker.submit(gate.wait, 20)
    try:
        yield gate
    finally:
        gate.set()
        for model, inline in zip(models, before, strict=True):
            model.inline.update(inline)


@pytest.mark.parametrize(
    "raw",
    [
        post(),
        post(headers=b""),
        post(b"/predict?"),
        post(b"/v1/models/digits-mlp/predict"),
        post(b"/v1/models/digits-mlp/versions/1/predict"),
        post(b"/v1/models/colour-cnn/predict"),
        post(b"/v1/models/colour-cnn/predict", png("RGB", (16, 16))),
        post(b"/predict", png("RGB", (20, 9))),
        post(b"/predict", png(size=(8, 8), optimize=True)),
        post(b"/predict?scale=255"),
        post(b"/uncertainty"),
        post(b"/uncertainty?samples=7&seed=3&masks=independent&level=0.5"),
        post(b"/v1/models/colour-cnn/uncertainty?samples=20", png("RGB", (16, 16))),
        post(
            headers=ID + b"Connection: keep-alive\r\nAccept: */*\r\nX-Forwarded-For: 10.0.0.1\r\n"
        ),
        post(headers=b"X-Request-ID: a b\r\n"),
        post(headers=ID + b"accept-encoding: gzip\r\n"),
    ],
)
def test_a_small_png_takes_the_fast_path_to_the_same_answer(service, raw):
    service.taken.clear()
    status, headers, body = service.ask(raw)
    assert service.taken == [True]
    again, headers_again, body_again = service.ask_asgi(raw)
    assert not any(service.taken[1:])
    assert status == again == 200
    assert body == body_again
    made = len(headers.pop(b"x-request-id")), len(headers_again.pop(b"x-request-id"))
    assert made in ((4, 4), (32, 32))
    assert headers == headers_again


def test_a_body_that_comes_after_its_headers_is_waited_for_a_moment(service, caplog):
    caplog.set_level(logging.INFO, "dropserve.requests")
    raw = post()
    body = len(raw) - len(PNG)
    expected = service.ask(raw)
    for cuts in ([body], [body + 9], [body, body + 50]):
        service.taken.clear()
        while service.taken != [True] * (len(cuts) + 1):
            service.taken.clear()
            assert service.ask(raw, cuts, pause=0.0005) == expected  # too late if it is busy
    late = [[body], [body, len(raw) - 1], list(range(body, len(raw), 10))]
    for cuts, pause in zip(late, (0.1, 0.1, 0.003), strict=True):  # the last: soon, but in all late
        service.taken.clear()
        assert service.ask(raw, cuts, pause=pause) == expected
        assert not service.taken[-1]
    caplog.clear()
    with service.connect() as connection:
        connection.sendall(raw[:body])
    eventually(lambda: caplog.records)
    assert getattr(caplog.records[0], FIELDS)["status"] == 400


DAMAGED = PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:]
HALF_A_PICTURE = zlib.compress(zlib.decompress(PNG[41:-16])[:30])
CUT = b"".join(
    [
        PNG[:33],
        len(HALF_A_PICTURE).to_bytes(4, "big") + b"IDAT" + HALF_A_PICTURE,
        zlib.crc32(b"IDAT" + HALF_A_PICTURE).to_bytes(4, "big"),
        PNG[-12:],
    ]
)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (post(b"/v1/models/nobody/predict"), 404),
        (post(b"/v1/models/digits-mlp/versions/9/predict"), 404),
        (post(b"/v1/models/digits-mpl/predict"), 404),
        (post(b"/v1/models/digits-mlp/versions/01/predict"), 404),
        (post(b"/predict?samples=1"), 422),
        (post(b"/predict?scale=1"), 422),
        (post(b"/uncertainty?samples=0"), 422),
        (post(b"/uncertainty?samples=1001"), 422),
        (post(headers=ID + b"Origin: http://x\r\n"), 200),
        (post(headers=ID + b"Upgrade: x\r\n"), 200),
        (post(headers=ID + b"Expect: x\r\n"), 200),
        (post(b"/uncertainty?seed=1&seed=2"), 422),
        (post(b"/uncertainty?samples=2&include_samples=true"), 200),
        (post(b"/compare?passes=2"), 200),
        (post(b"/v1/models/digits%2Dmlp/predict"), 200),
        (post(b"/predict#part"), 200),
        (post(b"/uncertainty?samples=2&level=0.5" + b"0" * 500), 200),
        (post(b"/nowhere"), 404),
        (post(kind=b"image/jpeg"), 415),
        (post(kind=b"image/png; q=1"), 200),
        (post(kind=b"IMAGE/PNG"), 200),
        (post(kind=b"application/json"), 400),
        (post(body=b""), 400),
        (post(body=PNG[:40]), 422),
        (post(body=b"BM" + PNG), 415),
        (post(body=DAMAGED), 422),
        (post(body=CUT), 422),
        (post(body=PNG[:-12]), 422),
        (post(body=png(size=(100, 100))), 200),
        (post(body=png().replace(b"IDAT", b"tEXt\0\0\0\0", 1)), 422),
        (post(headers=ID + b"Content-Type: image/jpeg\r\n"), 200),  # the first of a name counts
        (post(headers=ID + b"Content-Encoding: gzip\r\n"), 415),
        (post(headers=ID + b"Connection: close\r\n"), 200),
        (post().replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
        (post(headers=ID + b"Content-Length: 1\r\n"), 400),
        (post().replace(b"Host: x", b"Host : x"), 400),
        (post().replace(b"POST", b"PUT"), 405),
        (post().replace(b"POST", b"GET"), 405),
        (
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n%b"
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (ID, len(PNG), PNG),
            200,
        ),
    ],
)
def test_all_else_takes_the_asgi_path(service, raw, status):
    (found, _, _), taken = service.both_paths(raw)
    assert found == status
    assert taken == (DAMAGED in raw or CUT in raw)


def test_a_body_that_looks_like_a_request_is_a_body(service):
    raw = post(body=post(), kind=b"image/bmp")
    service.taken.clear()
    assert service.ask(raw, [len(raw) - len(post())])[0] == 415
    assert not any(service.taken)


MANY = [
    post(path, headers=b"X-Request-ID: %d\r\n" % k)
    for k, path in enumerate(
        [b"/predict", b"/nowhere", b"/uncertainty?samples=20&seed=1", b"/compare?passes=1"] * 2
        + [b"/predict"] * 3
    )
]
SENT = b"".join(MANY)
STARTS = [*accumulate(map(len, MANY[:-1]))]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, len(SENT) - 1) | st.sampled_from(STARTS), max_size=6, unique=True),
    st.booleans(),
)
def test_pipelined_requests_in_any_pieces_are_all_answered_in_their_order(service, cuts, wait):
    """The thread is busy while they are sent, so that many come behind one in flight."""
    cuts = sorted(cuts)
    with service.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with busy(service):
            for start, end in zip((0, *cuts), (*cuts, len(SENT)), strict=True):
                connection.sendall(SENT[start:end])
                time.sleep(0.003 * wait)
        file = connection.makefile("rb")
        for k in range(len(MANY)):
            status, headers, _ = read_answer(file)
            assert headers[b"x-request-id"] == b"%d" % k
            assert status == (404 if k in (1, 5) else 200)
    assert service.held == 0


def test_what_comes_while_one_is_answered_waits_and_is_not_read_without_end(checkpoints):
    with (
        serving(checkpoints) as service,
        busy(service) as gate,
        service.connect() as connection,
    ):
        connection.sendall(post())
        eventually(lambda: service.held)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.sendall(post() * 100_000)
        gate.set()
        connection.settimeout(20)
        status, _, _ = read_answer(connection.makefile("rb"))
        assert status == 200


def test_a_request_whose_client_leaves_is_cancelled_and_logged(service, caplog):
    caplog.set_level(logging.INFO, "dropserve.requests")
    with busy(service):
        connections = [service.connect() for _ in range(3)]
        for connection in connections:
            connection.sendall(post())
        eventually(lambda: service.held == 3 * len(PNG))
        for connection in connections:
            connection.close()
        eventually(lambda: not service.held)
        assert service.inference.queued <= 1  # the first batch is on its way to the thread
    eventually(lambda: len(caplog.records) >= 3)
    lines = [getattr(record, FIELDS) for record in caplog.records]
    assert [(line["status"], line["route"], line["model"]) for line in lines] == [
        (499, "/predict", "digits-mlp")
    ] * 3


def test_each_request_is_logged_and_counted_once_whichever_path_it_took(service, caplog):
    caplog.set_level(logging.INFO, "dropserve.requests")
    counted = service.app.state.metrics._requests

    def count():
        service.server.servers[0].get_loop().call_soon_threadsafe(
            service.app.state.metrics.flush, service.inference
        )
        time.sleep(0.1)
        return {
            tuple(sample.labels.values()): sample.value
            for metric in counted.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }

    before = count()
    for raw, cuts in ((post(), ()), (post(), (30,)), (post(body=DAMAGED), ())):
        service.ask(raw, cuts)
    after = count()
    grown = {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
    assert grown == {
        ("/predict", "digits-mlp", "2", "200"): 2,
        ("/predict", "digits-mlp", "2", "422"): 1,
    }
    lines = [getattr(record, FIELDS) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 200, 422]
    assert all(line["request_id"] == "this" for line in lines)
    assert lines[0].keys() == lines[1].keys()


def test_a_full_queue_and_too_many_bodies_are_503(checkpoints):
    with serving(checkpoints, max_queue=2) as service, busy(service) as gate:
        waiting = [service.connect() for _ in range(8)]
        for connection in waiting:
            connection.sendall(post())
            time.sleep(0.05)
        refused = service.ask(post())
        assert refused[0] == 503
        assert refused[1][b"retry-after"] == b"1"
        gate.set()
        statuses = [read_answer(connection.makefile("rb"))[0] for connection in waiting]
        assert statuses[:2] == [200, 200]
        assert set(statuses) == {200, 503}
        for connection in waiting:
            connection.close()
    large = post(body=png(size=(24, 24)))
    with serving(checkpoints, max_body_bytes=1024, max_held_bytes=1024) as service:
        with busy(service) as gate, service.connect() as first:
            first.sendall(large)
            eventually(lambda: service.held)
            assert service.ask(large)[0] == 503
            gate.set()
            assert read_answer(first.makefile("rb"))[0] == 200
        eventually(lambda: not service.held)


def test_what_is_too_large_is_413_however_small_the_limit(checkpoints):
    with serving(checkpoints, max_body_bytes=1024) as service:
        (status, _, _), taken = service.both_paths(post(body=png(size=(40, 40))))
        assert (status, taken) == (413, False)


def test_the_most_samples_are_those_of_the_asgi_path(checkpoints):
    with serving(checkpoints, max_samples=50) as service:
        for query, samples in ((b"?samples=51", None), (b"?samples=50", 50), (b"", 50)):
            (status, _, body), taken = service.both_paths(post(b"/uncertainty" + query))
            assert (status, taken) == ((422, False) if samples is None else (200, True))
            assert json.loads(body).get("samples") == samples


def test_middleware_that_is_not_known_switches_the_fast_path_off(checkpoints):
    with serving(checkpoints, middleware=[Middleware(CORSMiddleware)]) as service:
        assert service.both_paths(post())[1] is False


def test_a_key_is_asked_for(checkpoints, tmp_path):
    (tmp_path / "keys").write_text("sesame\n")
    with serving(checkpoints, api_keys_file=tmp_path / "keys") as service:
        (status, _, _), taken = service.both_paths(post())
        assert (status, taken) == (401, False)
        key = ID + b"Authorization: Bearer %b\r\n"
        assert service.both_paths(post(headers=key % b"other"))[0][0] == 401
        (status, _, _), taken = service.both_paths(post(headers=key % b"sesame"))
        assert (status, taken) == (200, True)


def test_the_limits_of_a_key_hold_on_both_paths_and_no_request_counts_twice(checkpoints, tmp_path):
    (tmp_path / "keys").write_text("slow rate=0.001\none concurrency=1\n")
    slow, one = (b"X-API-Key: %b\r\n" % key for key in (b"slow", b"one"))
    with serving(checkpoints, api_keys_file=tmp_path / "keys", max_queue=2) as service:
        first, second = service.app.state.keys._keys
        # what the fast path passes on begins anew: the one token of this key suffices
        assert service.ask(post(body=DAMAGED, headers=slow))[0] == 422
        status, headers, _ = service.ask(post(headers=slow))
        assert (status, first.in_flight) == (429, 0)
        assert 990 <= int(headers[b"retry-after"]) <= 1000

        with busy(service) as gate:
            connection = service.connect()
            service.taken.clear()
            connection.sendall(post(headers=one))
            eventually(lambda: second.in_flight)
            assert service.taken == [True]
            for cuts in ((), (30,)):
                assert service.ask(post(headers=one), cuts)[0] == 429
            gate.set()
            assert read_answer(connection.makefile("rb"))[0] == 200
            connection.close()
        for raw in (post(headers=one), post(headers=one, body=DAMAGED)) * 2:
            assert service.ask(raw)[0] in (200, 422)
        with busy(service), service.connect() as leaving:
            leaving.sendall(post(headers=one))
            eventually(lambda: second.in_flight)
        eventually(lambda: not second.in_flight)


def test_it_is_taken_behind_tls_to_the_same_answer(checkpoints, tmp_path):
    cert, key = certify(tmp_path, "own", "-nodes")
    with serving(checkpoints, tls_cert=cert, tls_key=key) as service:
        for path in (b"/predict", b"/uncertainty?samples=20&seed=3"):
            (status, headers, _), taken = service.both_paths(post(path))
            assert (status, taken) == (200, True)
            assert headers[b"strict-transport-security"] == b"max-age=31536000"
        assert service.both_paths(post(body=DAMAGED))[0][0] == 422
        with service.connect() as connection, connection.makefile("rb") as file:
            connection.sendall(SENT)
            assert [read_answer(file)[1][b"x-request-id"] for _ in MANY] == [
                b"%d" % k for k in range(len(MANY))
            ]
        with busy(service), service.connect() as leaving:
            leaving.sendall(post())
            eventually(lambda: service.held)
        eventually(lambda: not service.held)


def test_an_idle_connection_is_kept_as_long_as_it_may_and_no_longer(checkpoints):
    with serving(checkpoints, keep_alive=0.5) as service, service.connect() as connection:
        file = connection.makefile("rb")
        for raw in (post(), post(), post(b"/compare"), post(), post()):
            connection.sendall(raw)
            assert read_answer(file)[0] == 200
            time.sleep(0.3)
        with busy(service):
            connection.sendall(post())
            time.sleep(0.8)
        assert read_answer(file)[0] == 200
        rested = time.monotonic()
        assert file.read() == b""
        assert 0.1 < time.monotonic() - rested < 5


def test_a_stop_lets_what_is_open_finish_and_then_closes(checkpoints):
    service = Service(checkpoints)
    with (
        busy(service) as gate,
        service.connect() as idle,
        service.connect() as asking,
    ):
        asking.sendall(post())
        eventually(lambda: service.held)
        service.server.should_exit = True
        assert idle.recv(1) == b""
        gate.set()
        status, headers, _ = read_answer(asking.makefile("rb"))
        assert (status, headers[b"connection"]) == (200, b"close")
        assert asking.recv(1) == b""
    service.stop()


def test_after_an_overload_requests_in_two_pieces_take_the_fast_path_again(service):
    raw = post()
    with service.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        file = connection.makefile("rb")
        for taken in (True, False, True):
            service.taken.clear()
            connection.sendall(raw[:-9])
            time.sleep(0.003)
            connection.sendall(raw[-9:])
            assert read_answer(file)[0] == 200
            assert all(service.taken) == taken
            refusing = next(iter(service.server.server_state.connections))._watch.refusing
            assert refusing == set()
            if taken:
                refusing.add("predict")  # as the last request had found it


def test_a_connection_that_is_to_be_closed_is_closed_though_nobody_reads_its_answers(checkpoints):
    """What came behind the last request does not prolong it."""
    get = b"GET /playground/main.js HTTP/1.1\r\nHost: x\r\n%b\r\n"
    raw = get % b"" * 3 + get % b"Connection: close\r\n" + get % b""
    with serving(checkpoints, keep_alive=1) as service, socket.socket() as client:
        service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", service.port))
        client.sendall(raw)
        connections = service.server.server_state.connections
        eventually(lambda: connections)
        eventually(lambda: not connections, 10)


def test_what_the_drain_does_not_wait_for_is_told_so(checkpoints):
    service = Service(checkpoints, drain_seconds=1)
    with busy(service):
        asking = [service.connect() for _ in range(20)]
        for connection in asking:
            connection.sendall(post())
        eventually(lambda: service.held == 20 * len(PNG))
        service.server.should_exit = True
        for connection in asking:
            status, headers, body = read_answer(connection.makefile("rb"))
            assert (status, headers[b"retry-after"]) == (503, b"1")
            assert json.loads(body)["detail"] == "the service is stopping"
            connection.close()
    service.stop()


def test_a_slow_task_does_not_run_on_the_event_loop(service):
    with busy(service) as gate:
        connection = service.connect()
        connection.sendall(post())
        eventually(lambda: service.held)
        assert service.ask(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
        gate.set()
        assert read_answer(connection.makefile("rb"))[0] == 200
        connection.close()
