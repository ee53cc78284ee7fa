"""HTTPS over a socket: clients, several workers, and certificates that cannot be used."""

import os
import socket
import ssl
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from dropserve.service.cli import main
from dropserve.service.client import DropserveClient
from dropserve.service.errors import Unreachable
from dropserve.service.settings import Settings
from dropserve.service.tls import TlsError, context
from tests.helpers import PNG, certify, free_port, invoke
from tests.test_deploy import health_check

IMAGE = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Two certificates with their keys, and one whose key has a password."""
    folder = tmp_path_factory.mktemp("tls")
    locked = certify(folder, "locked", "-passout", "pass:sesame")
    return certify(folder, "plain", "-nodes"), certify(folder, "other", "-nodes"), locked


@pytest.fixture(scope="module")
def trusted(certificates):
    return ssl.create_default_context(cafile=certificates[0][0])


@pytest.fixture(scope="module")
def running(certificates, make_server):
    """A server of one worker and one of two, which load at the same time."""
    cert, key = certificates[0]
    return [make_server(tls_cert=cert, tls_key=key, workers=n) for n in (1, 2)]


@pytest.fixture(scope="module", params=[0, 1], ids=["one worker", "two workers"])
def server(running, trusted, request):
    return running[request.param].start(verify=trusted)


def connect(server, client):
    plain = socket.create_connection(("127.0.0.1", server.port), 20)
    return client.wrap_socket(plain, server_hostname="127.0.0.1")


def test_requests_of_every_kind_are_answered(server, trusted):
    with httpx.Client(base_url=server.url, verify=trusted, headers=IMAGE) as client:
        for _ in range(10):
            answer = client.post("/predict", content=PNG)
            assert answer.json()["model"] == "digits-mlp"
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert client.post("/predict", content=bytes(2**20)).status_code == 415
        events = client.post("/uncertainty/stream?samples=300", content=PNG).text
        assert events.count("event: sample") == 300


def test_who_does_not_trust_the_certificate_does_not_ask(server, certificates, monkeypatch):
    untrusting = pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED")
    with DropserveClient(server.url) as client, untrusting:
        client.models()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0][0]))
    with DropserveClient(server.url) as client:
        assert client.models().models
    listed = invoke("models", DROPSERVE_TLS_CERT="x", DROPSERVE_TLS_KEY="x")
    assert "https://127.0.0.1:8000" in listed.stderr  # the address of the settings
    assert invoke("models", "--url", server.url).exit_code == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_of_both_versions_is_spoken_and_no_plain_http(server, certificates, version):
    client = ssl.create_default_context(cafile=certificates[0][0])
    client.minimum_version = client.maximum_version = version
    with closing(connect(server, client)) as connection:
        assert connection.version() == version.name.replace("_", ".")
    assert b"HTTP" not in server.exchange(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert context(*certificates[0]).minimum_version == ssl.TLSVersion.TLSv1_2


def test_silent_and_idle_clients_are_closed_and_a_stop_waits_for_none(
    certificates, make_server, trusted
):
    cert, key = certificates[0]
    server = make_server(tls_cert=cert, tls_key=key).start(verify=trusted)
    with (
        socket.create_connection(("127.0.0.1", server.port), 20) as silent,
        closing(connect(server, trusted)) as idle,
    ):
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(15) == b"HTTP/1.1 200 OK"
        started = time.monotonic()
        assert server.read_all(silent) == b""
        assert 4 < time.monotonic() - started < 15
        started = time.monotonic()
        assert server.stop(60) == 0
        assert time.monotonic() - started < 10
    assert [line for line in server.lines() if line["level"] != "info"] == []
    assert server.errors.read_text() == ""


def test_the_health_check_of_the_image_passes(server, certificates):
    command = [sys.executable, *health_check()[1][1:]]
    environment = os.environ | {"DROPSERVE_PORT": str(server.port)}
    tls = {"DROPSERVE_TLS_CERT": str(certificates[0][0])}
    assert subprocess.run(command, env=environment | tls, check=False).returncode == 0
    refused = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert refused.returncode == 1


def test_the_line_on_a_terminal_needs_no_trust_in_the_certificate(server, capsys):
    main._announce(server.url)
    assert f"ready: {server.url} serves" in capsys.readouterr().err


def wrong(certificates, tmp_path):
    """Yield settings that cannot work, and what is said about them."""
    (cert, key), (_, other_key), (locked, locked_key) = certificates
    yield cert, other_key, "key values mismatch"
    yield key, cert, "no PEM certificate"
    yield locked, locked_key, "encrypted"
    yield tmp_path / "none.pem", key, "none.pem: cannot be read: No such file"
    yield cert, tmp_path, "cannot be read: Is a directory"


def test_what_cannot_be_used_is_named(certificates, tmp_path):
    for cert, key, complaint in wrong(certificates, tmp_path):
        with pytest.raises(TlsError, match=complaint):
            context(cert, key)


def test_the_start_fails_before_anything_listens(certificates, make_server):
    files = {"tls_cert": certificates[0][0], "tls_key": certificates[1][1]}
    server = make_server(port=free_port(), **files)
    environment = os.environ | {f"DROPSERVE_{k.upper()}": str(path) for k, path in files.items()}
    command = [Path(sys.executable).with_name("dropserve"), "serve"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert said.stderr.startswith("error: ")
    assert "key values mismatch" in said.stderr
    assert server.process.wait(60) == 1
    assert server.lines() == []


def test_a_certificate_and_its_key_need_each_other():
    for half in ("tls_cert", "tls_key"):
        with pytest.raises(ValueError, match="need each other"):
            Settings(**{half: "x"})
    assert Settings(tls_cert="x", tls_key="y").url == "https://127.0.0.1:8000"
