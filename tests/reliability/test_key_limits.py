"""Limits and metrics of API keys, of real servers with the fast path on and off."""

import re
import socket
import time
from contextlib import contextmanager

import httpx
import pytest

from dropserve.service.client import DropserveClient
from dropserve.service.errors import TooManyRequests
from dropserve.service.http.keys import ApiKey, Keys
from dropserve.service.settings import Settings
from tests.helpers import PNG, eventually
from tests.reliability.messages import request

KEYS = """
# one of each kind
plain-key-0123456789
phone-key-0123456789 name=phone
slow-key-0123456789  name=slow rate=0.001
quick-key-0123456789 name=quick rate=2
alone-key-0123456789 name=alone concurrency=1
"""
IMAGE = {"Content-Type": "image/png"}


@pytest.fixture(scope="module", params=[True, False], ids=["fast path", "ASGI path"])
def limited(make_server, tmp_path_factory, request):
    path = tmp_path_factory.mktemp("limits") / "keys"
    path.write_text(KEYS)
    return make_server(api_keys_file=path, fast_path=request.param).start()


def ask(server, name, path="/predict", content=PNG, **headers):
    headers = {**IMAGE, "X-API-Key": f"{name}-key-0123456789", **headers}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=20)


def post(name, path="/predict", body=PNG):
    """Write a request, as it is sent."""
    return request(path, body, "image/png", f"X-API-Key: {name}-key-0123456789")


def requests_of(server, name):
    """Requests so far with the key of a name, by status."""
    text = ask_metrics(server)
    found = re.findall(rf'key_requests_total{{key="{name}",status="(\d+)"}} (\S+)', text)
    return {int(status): float(count) for status, count in found}


def ask_metrics(server):
    headers = {"X-API-Key": "plain-key-0123456789"}
    return httpx.get(server.url + "/metrics", headers=headers).text


@contextmanager
def in_flight(server, name):
    """Have a request whose body does not come."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(post(name)[:-1])
        eventually(lambda: ask(server, name).status_code == 429, 5, 0.01)
        yield


def test_more_requests_than_the_rate_are_refused_until_retry_after_has_passed(limited, problem):
    assert ask(limited, "slow").status_code == 200
    refused = ask(limited, "slow", **{"X-Request-ID": "refused-1"})
    assert problem(refused, 429).startswith("this API key may send 0.001 requests per second")
    assert 1 <= int(refused.headers["retry-after"]) <= 1000
    line = limited.line("refused-1")
    assert (line["status"], line["key"], line["route"]) == (429, "slow", "/predict")
    assert line["detail"] == refused.json()["detail"]

    statuses = [ask(limited, "quick") for _ in range(2)]
    while statuses[-1].status_code == 200:  # a slow machine may take a second for each
        statuses.append(ask(limited, "quick"))
    time.sleep(int(statuses[-1].headers["retry-after"]))
    assert ask(limited, "quick").status_code == 200


def test_no_more_requests_are_in_flight_than_may_be(limited, problem, protocol_error):
    before = ask(limited, "alone").status_code
    with in_flight(limited, "alone"):
        refused = ask(limited, "alone")
        assert "1 requests in flight" in problem(refused, 429)
        assert refused.headers["retry-after"] == "1"
        protocol_error(ask(limited, "alone", "/v2/models/digits-mlp/infer"), 429)
        assert ask(limited, "phone").status_code == 200
        assert httpx.get(limited.url + "/readyz").status_code == 200
    assert before == 200
    eventually(lambda: ask(limited, "alone").status_code == 200)  # its client has left


def test_an_answered_request_is_in_flight_no_more_whatever_the_answer(limited):
    asked = [
        ("/predict", PNG, 200),
        ("/predict", PNG[:-20], 422),
        ("/uncertainty/stream?samples=30", PNG, 200),
        ("/predict", PNG, 200),
        ("/uncertainty", PNG, 200),
        ("/nowhere", b"", 404),
        ("/predict?x=1", PNG, 422),
        ("/compare", PNG, 200),
        ("/playground/main.js", b"", 200),  # its file is closed on a thread, after the answer
    ] * 5
    raw = b"".join(post("alone", path, body) for path, body, _ in asked)
    raw = raw.replace(b"POST /playground", b"GET /playground")
    last = post("alone").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    received = limited.exchange(raw + last)
    statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", received)]
    assert statuses == [*(status for _, _, status in asked), 200]


def test_requests_are_counted_once_by_name_and_status_and_no_key_is_told(limited):
    before = requests_of(limited, "phone")
    sent = [PNG, PNG, PNG[:-20], PNG[:-12]]
    statuses = [ask(limited, "phone", content=content).status_code for content in sent]
    assert statuses == [200, 200, 422, 422]
    after = requests_of(limited, "phone")
    assert after[200] - before.get(200, 0) == after[422] - before.get(422, 0) == 2
    assert requests_of(limited, "line-3")[200] >= 2  # of /metrics
    assert ask(limited, "wrong").status_code == 401
    said = limited.log.read_text() + limited.errors.read_text() + ask_metrics(limited)
    assert "-key-0123456789" not in said


def test_the_client_waits_and_tries_again(limited):
    def sleep(seconds):
        waited.append(seconds)
        time.sleep(seconds)

    waited = []
    with DropserveClient(limited.url, api_key="quick-key-0123456789", sleep=sleep) as client:
        for _ in range(6):
            assert client.predict(PNG).model == "digits-mlp"
    assert waited
    ask(limited, "slow")
    refused = pytest.raises(TooManyRequests)
    with DropserveClient(limited.url, api_key="slow-key-0123456789") as client, refused as caught:
        client.predict(PNG)
    assert int(caught.value.headers["retry-after"]) > 30  # more than it may wait


def test_a_bucket_holds_a_second_and_fills_with_time(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("dropserve.service.http.keys.time.monotonic", lambda: clock[0])
    key = ApiKey(b"", "x", rate=4, concurrency=0)
    for passed, admitted in ((0, 4), (0.5, 2), (0.25, 1), (60, 4)):
        clock[0] += passed
        for _ in range(admitted):
            key.enter()
        with pytest.raises(TooManyRequests):
            key.enter()
    assert key.in_flight == 11
    key.leave(counted=False)
    key.enter()
    with pytest.raises(TooManyRequests) as refused:
        key.enter()
    assert refused.value.headers == {"Retry-After": "1"}
    key.rate = 0.1
    with pytest.raises(TooManyRequests) as refused:
        key.enter()
    assert refused.value.headers == {"Retry-After": "10"}


def test_a_key_that_stays_in_the_file_keeps_what_it_has_used(tmp_path):
    path = tmp_path / "keys"
    path.write_text("a-key name=before concurrency=1\n")
    keys = Keys(path)
    key = keys.find([(b"x-api-key", b"a-key")])
    key.enter()
    path.write_text("another\na-key name=after concurrency=2\n")
    keys.refresh()
    same = keys.find([(b"x-api-key", b"a-key")])
    assert (same.name, same.in_flight) == ("after", 1)
    same.enter()
    with pytest.raises(TooManyRequests):
        same.enter()


@pytest.mark.parametrize("limit", [{"key_rate": 1}, {"key_concurrency": 1}])
def test_limits_without_keys_are_refused(limit):
    with pytest.raises(ValueError, match="need DROPSERVE_API_KEYS_FILE"):
        Settings(**limit)
