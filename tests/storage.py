"""An S3 server, moto's, behind a proxy that can cut, delay, corrupt and refuse."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

URL = "s3://models/prod"
_HOPS = {"connection", "transfer-encoding", "content-length", "date", "server"}


class _Handler(BaseHTTPRequestHandler):
    storage: "Storage"
    upstream: tuple[str, int]
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.storage.requests.append((self.command, self.path))
        fault = self.storage.fault(self.command, self.path)
        if fault == "down":
            self.close_connection = True
            return
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, str) and fault not in ("cut", "corrupt"):
            text = f"<Error><Code>{fault}</Code><Message>no</Message></Error>".encode()
            self._answer(403, [("Content-Type", "application/xml")], text)
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOPS}
        connection = http.client.HTTPConnection(*self.upstream, timeout=20)
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "cut" and not content:  # it was done, and nobody is told
            self.close_connection = True
            return
        if fault == "corrupt" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOPS]
        length = answer.getheader("content-length") if self.command == "HEAD" else None
        self._answer(answer.status, kept, content, length, cut=fault == "cut")

    def _answer(self, status, headers, content, length=None, *, cut=False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep stderr clean."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that have left are no news."""


class Storage:
    """The proxy: what was asked, and what is done to it.

    `fault` gets method and path, and returns None or one of: "down", "cut", "corrupt", a number of
    seconds to wait, or an error code of S3, which is answered with 403.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], object] = lambda _method, _path: None
        handler = type("Handler", (_Handler,), {"storage": self, "upstream": upstream})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What clients of it need."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_TIMEOUT": "1s",
        }

    def asked(self, method: str) -> list[str]:
        """The paths asked by a method, since the last `requests.clear()`."""
        return [path for had, path in self.requests if had == method]

    def empty(self) -> None:
        """Remove all objects, and all faults."""
        self.fault = lambda _method, _path: None
        host = self.endpoint.removeprefix("http://")
        connection = http.client.HTTPConnection(host)
        for method, path in (("POST", "/moto-api/reset"), ("PUT", "/models")):
            connection.request(method, path)
            connection.getresponse().read()
        connection.close()
        self.requests.clear()


@contextmanager
def running_storage() -> Iterator[Storage]:
    """Run the server and the proxy for the length of the block."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    storage = Storage(server.get_host_and_port())
    try:
        storage.empty()
        yield storage
    finally:
        storage.close()
        server.stop()
