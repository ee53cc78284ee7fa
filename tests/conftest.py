"""Fixtures of the tests of `service`: checkpoints to serve, and a real server on a socket."""

import json
import os
import signal
import socket
import ssl
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from dropserve.models import checkpoint
from dropserve.models.networks import NetworkConfig
from dropserve.models.preprocessing import Preprocessing
from dropserve.service.schemas import Problem
from dropserve.service.settings import environment_name
from tests.forked import Process
from tests.helpers import eventually

SERVE = (
    "from dropserve.service.server import serve; from dropserve.service.settings import Settings;"
    "serve(Settings())"
)
LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); {SERVE}"
"""The same, with so many file descriptors at most."""
CONTRACT = {
    *("test_bad_http", "test_bad_inputs", "test_contract", "test_http", "test_kserve", "test_oip"),
}
"""Modules whose tests run with the fast path on and off."""
URL = os.environ.get("CONTRACT_URL")
"""Of a server that runs already, whose CONTRACT_CHECKPOINTS are those below: tests/scale."""
DIGITS = Preprocessing((8, 8), 1, (0.3,), (0.4,), invert=True)
COLOUR = Preprocessing((16, 16), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def _save(root, name, network, preprocessing, seed):
    """Write a version with weights that only the seed decides; BatchNorm has seen some noise."""
    torch.manual_seed(seed)
    module = network.build().train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(16, *network.input))
        for parameter in module.parameters():
            parameter.mul_(1.5)  # answers are then far enough from uniform to tell apart
    classes = tuple(f"class {k}" for k in range(network.classes))
    return checkpoint.save(root, module, checkpoint.Metadata(name, network, preprocessing, classes))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder of two models: digits-mlp, versions 1 and 2, and colour-cnn."""
    if URL is not None:
        return Path(os.environ["CONTRACT_CHECKPOINTS"])
    root = tmp_path_factory.mktemp("checkpoints")
    mlp = NetworkConfig("mlp", DIGITS.shape, 10, (32, 32), (0.2, 0.5))
    cnn = NetworkConfig("cnn", COLOUR.shape, 4, (32,), (0.5,), (8, 16), 0.1)
    with torch.random.fork_rng(devices=[]):
        _save(root, "digits-mlp", mlp, DIGITS, seed=1)
        _save(root, "digits-mlp", mlp, DIGITS, seed=2)
        _save(root, "colour-cnn", cnn, COLOUR, seed=3)
    return root


class Server:
    """A process that runs `dropserve.service.server.serve`, its log in a file."""

    def __init__(
        self, folder: Path, checkpoints: Path, command: str = SERVE, **settings: object
    ) -> None:
        defaults = {"port": 0, "checkpoints": checkpoints, "default_model": "digits-mlp"}
        self.settings = defaults | settings
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DROPSERVE_")}
        given = {k: v for k, v in self.settings.items() if v is not None}
        environment |= {environment_name(k): str(v) for k, v in given.items()}
        environment["OMP_NUM_THREADS"] = "1"
        environment.setdefault(environment_name("precision"), "float32")  # figures are compared
        self.log = folder / "stdout.log"
        self.errors = folder / "stderr.log"
        self.process = Process(command, environment, self.log, self.errors)
        self.port = 0

    @property
    def url(self) -> str:
        scheme = "https" if self.settings.get("tls_cert") else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    def lines(self) -> list[dict]:
        """The log so far; every whole line of it is JSON."""
        text = self.log.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def line(self, request_id: str) -> dict:
        """The log's line about a request, once it is there."""

        def found():
            return [line for line in self.lines() if line.get("request_id") == request_id]

        return eventually(found, 5, 0.01)[-1]

    def start(self, seconds: float = 60, verify: ssl.SSLContext | bool = True) -> "Server":
        """Wait until it answers /readyz."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if self.port or self._find_port():
                try:
                    if httpx.get(self.url + "/readyz", verify=verify).status_code == 200:
                        return self
                except httpx.TransportError:
                    pass
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.errors.read_text()}")

    def _find_port(self) -> bool:
        told = [e["message"] for e in self.lines() if "running on http" in e["message"]]
        self.port = int(told[0].split(" (")[0].rpartition(":")[2]) if told else 0
        return bool(told)

    def connect(self, seconds: float = 20) -> socket.socket:
        """Open a connection whose calls take so many seconds at most."""
        return socket.create_connection(("127.0.0.1", self.port), seconds)

    def exchange(self, raw: bytes, seconds: float = 10, *, end: bool = False) -> bytes:
        """Send bytes over a fresh connection, and perhaps no more after them.

        It returns what comes until the server closes the connection.
        """
        with self.connect(seconds) as connection:
            connection.sendall(raw)
            if end:
                connection.shutdown(socket.SHUT_WR)
            return self.read_all(connection)

    @staticmethod
    def read_all(connection: socket.socket) -> bytes:
        """Return what comes until the other side closes the connection."""
        received = b""
        try:
            while chunk := connection.recv(65_536):
                received += chunk
        except ConnectionResetError:
            pass
        return received

    def resident(self) -> int:
        """Bytes of memory that the process holds."""
        statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, seconds: float = 30) -> int:
        """Ask it to stop, and wait; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="session")
def make_server(tmp_path_factory, checkpoints):
    """Start a server process with settings of its own; it may still be loading."""
    made = []

    def make(root=checkpoints, **settings):
        made.append(Server(tmp_path_factory.mktemp("server"), root, **settings))
        return made[-1]

    yield make
    for server in made:
        server.process.kill()


def pytest_generate_tests(metafunc):
    """Run the tests of the HTTP contract that use the shared server with and without fast path."""
    if (
        URL is None
        and metafunc.module.__name__.rpartition(".")[2] in CONTRACT
        and "server" in metafunc.fixturenames
    ):
        paths = {"fast path": True, "ASGI path": False}
        metafunc.parametrize("server", paths.values(), ids=paths, indirect=True, scope="session")


@pytest.fixture(scope="session")
def servers(make_server):
    """The shared servers, by `fast_path`; their logs hold no failure when all tests are done."""
    running = {}

    def serving(fast_path):
        if fast_path not in running:
            options = {"max_body_bytes": 2**20, "max_queue": 100_000, "fast_path": fast_path}
            options["max_wait"] = 60  # no test is refused because another has the machine
            running[fast_path] = make_server(**options).start()
        return running[fast_path]

    yield serving
    for each in running.values():
        assert httpx.get(each.url + "/readyz").status_code == 200
        assert [e for e in each.lines() if e.get("status") == 500 or "exception" in e] == []
        assert "Traceback" not in each.errors.read_text()


@pytest.fixture(scope="session")
def server(servers, request):
    """The server that most tests share."""
    if URL is not None:
        return SimpleNamespace(url=URL, port=httpx.URL(URL).port)
    return servers(getattr(request, "param", True))


@pytest.fixture(scope="session")
def tight_server(make_server):
    """A server with next to no patience and room."""
    return make_server(body_timeout=0.5, max_body_bytes=65_536, max_queue=4).start()


@pytest.fixture(scope="session")
def http(server):
    """A client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def problem():
    """Check that a response is a whole RFC 9457 problem of that status; return its detail."""

    def check(response: httpx.Response, status: int) -> str:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        found = Problem.model_validate_json(response.content, strict=True)
        assert set(response.json()) == {"type", "title", "status", "detail", "request_id"}
        assert found.status == status
        assert found.request_id == response.headers["x-request-id"]
        assert "MARKER" not in response.text
        return found.detail

    return check


@pytest.fixture(scope="session")
def protocol_error():
    """Check that a response is an error as the Open Inference Protocol has it; return its text."""

    def check(response: httpx.Response, status: int) -> str:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert set(response.json()) == {"error"}
        assert response.headers["x-request-id"]
        assert "MARKER" not in response.text
        return response.json()["error"]

    return check


@pytest.fixture(scope="session")
def running_storage():
    """An S3 server, for all tests of this process."""
    from tests.storage import running_storage

    with running_storage() as running:
        yield running


@pytest.fixture
def storage(running_storage):
    """The S3 server with an empty bucket and no faults."""
    running_storage.empty()
    yield running_storage
    running_storage.fault = lambda _method, _path: None
