"""API keys: who has none gets in nowhere but to the probes."""

import os
from pathlib import Path

import httpx
import pytest

from dropserve.service.http.keys import OPEN, Keys, KeysError
from tests.helpers import eventually

KEY, OTHER = "first-key-0123456789", "second-key-0123456789"
CHALLENGE = 'Basic realm="dropserve", charset="UTF-8", Bearer realm="dropserve"'


@pytest.fixture(scope="module")
def guarded(make_server, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# who: the tests\n\n{KEY}\n  {OTHER}  \n")
    server = make_server(api_keys_file=path, max_body_bytes=1024).start()
    server.keys_file = path
    return server


def get(server, path, **headers):
    return httpx.get(
        server.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_a_key_is_taken_as_bearer_as_header_and_as_password(guarded, key):
    assert get(guarded, "/v1/models", authorization=f"Bearer {key}").status_code == 200
    assert get(guarded, "/v1/models", authorization=f"bearer  {key}").status_code == 200
    assert get(guarded, "/v1/models", x_api_key=key).status_code == 200
    assert httpx.get(guarded.url + "/v1/models", auth=("anyone", key)).status_code == 200


def test_a_key_beside_an_admin_token_is_found(guarded):
    headers = {"authorization": "Bearer something-else", "x_api_key": KEY}
    assert get(guarded, "/v1/models", **headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x_api_key": ""},
        {"x_api_key": KEY[:-1]},
        {"x_api_key": KEY + "x"},
        {"x_api_key": "# who: the tests"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic Og=="},  # ":"
        {"authorization": f"Digest {KEY}"},
        {"authorization": "Bearer"},
    ],
    ids=str,
)
def test_anything_else_is_refused(guarded, problem, headers):
    answer = get(guarded, "/v1/models", **headers)
    assert "API key" in problem(answer, 401)
    assert answer.headers["www-authenticate"] == CHALLENGE


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/metrics", "/nothing", "/predict", "/livez/", "/x/livez"],
)
def test_everything_but_the_probes_is_behind_the_key(guarded, problem, path):
    problem(get(guarded, path), 401)
    assert get(guarded, path, x_api_key=KEY).status_code in (200, 404, 405, 307)


@pytest.mark.parametrize("path", sorted(OPEN))
def test_probes_need_no_key(guarded, path):
    assert get(guarded, path).status_code == 200


def test_the_inference_protocol_gets_its_own_kind_of_error(guarded):
    answer = get(guarded, "/v2/models/digits-mlp")
    assert answer.status_code == 401
    assert set(answer.json()) == {"error"}
    assert answer.headers["www-authenticate"] == CHALLENGE


def test_a_body_is_not_waited_for(guarded):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n"
    answer = guarded.exchange(head)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer.lower()
    whole = httpx.post(guarded.url + "/predict", content=bytes(10**6))  # but who sends, sees it
    assert whole.status_code == 401


def test_refusals_are_logged_and_counted_and_no_key_is_told(guarded):
    answer = get(guarded, "/v1/models", x_api_key="wrong-key", x_request_id="refused-1")
    assert answer.headers["x-request-id"] == "refused-1"
    assert guarded.line("refused-1")["status"] == 401
    metrics = get(guarded, "/metrics", x_api_key=KEY).text
    assert 'dropserve_requests_total{model="",route="other",status="401",version=""}' in metrics
    said = guarded.log.read_text() + guarded.errors.read_text() + metrics
    assert not [key for key in (KEY, OTHER, "wrong-key") if key in said]


def test_a_changed_file_counts_within_two_seconds_and_a_bad_one_does_not(guarded):
    def admitted(key):
        return get(guarded, "/v1/models", x_api_key=key).status_code == 200

    before = guarded.keys_file.read_text()
    guarded.keys_file.write_text("third-key-0123456789\n")
    eventually(lambda: admitted("third-key-0123456789"))
    assert not admitted(KEY)
    guarded.keys_file.unlink()
    eventually(lambda: any("stay as they were" in e["message"] for e in guarded.lines()))
    assert admitted("third-key-0123456789")
    guarded.keys_file.write_text(before)
    eventually(lambda: admitted(KEY))
    assert not admitted("third-key-0123456789")


def test_what_is_wrong_with_a_file_is_said_but_not_what_is_in_it(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(FileNotFoundError):
        Keys(path)
    for content, complaint in (
        ("", "no API key in it"),
        ("# nothing yet\n", "no API key in it"),
        ("secret-one\nsecret two\n", "line 2 is no key"),
        ("schlüssel\n", "line 1 is no key"),
        ("secret-one name=\n", "line 1 is no key"),
        ("secret-one name=schlüssel\n", "line 1 is no key"),
        ("secret-one name=a=b\n", "line 1 is no key"),
        ("secret-one rate=-1\n", "line 1 is no key"),
        ("secret-one rate=nan\n", "line 1 is no key"),
        ("secret-one concurrency=1.5\n", "line 1 is no key"),
        ("secret-one secret=two\n", "line 1 is no key"),
        ("secret-one name=a\nsecret-two name=a\n", "line 2 has a name that an earlier line has"),
        ("secret-one name=a\nsecret-one rate=9\n", "line 2 has a key that an earlier line has"),
    ):
        path.write_text(content)
        with pytest.raises(KeysError, match=complaint) as caught:
            Keys(path)
        assert "secret" not in str(caught.value)


def test_the_file_is_only_read_again_when_it_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(KEY)
    keys = Keys(path)
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read_bytes(self))
    keys.refresh()
    keys.refresh()
    assert not reads
    os.utime(path, (1, 1))
    keys.refresh()
    assert reads == [path]
    assert keys.find([(b"x-api-key", KEY.encode())])


def test_a_key_has_a_name_and_limits_of_its_own_or_those_of_the_service(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# who\nolder==\nfirst  name=phone rate=0.5\nsecond rate=0 concurrency=3\n")
    keys = Keys(path, rate=7, concurrency=9)

    def read(key):
        found = keys.find([(b"x-api-key", key)])
        return found.name, found.rate, found.concurrency

    assert read(b"older==") == ("line-2", 7, 9)
    assert read(b"first") == ("phone", 0.5, 9)
    assert read(b"second") == ("line-4", 0, 3)


def test_a_worker_that_starts_when_the_keys_are_spoilt_uses_the_last_good_ones(tmp_path):
    path, kept = tmp_path / "keys", tmp_path / "kept"
    path.write_text("first-key name=phone rate=5\n")
    Keys(path, kept)
    path.write_text("# none\n")
    late = Keys(path, kept)
    found = late.find([(b"x-api-key", b" first-key ")])
    assert (found.name, found.rate) == ("phone", 5)
    assert not late.find([(b"x-api-key", b"# none")])
    assert "first-key" not in kept.read_text()
    path.unlink()
    os.mkfifo(path)
    assert Keys(path, kept).find([(b"authorization", b"Bearer first-key")])


def test_keys_that_cannot_be_kept_are_in_force(tmp_path, caplog):
    path, kept = tmp_path / "keys", tmp_path / "kept"
    path.write_text("revoked-key\n")
    Keys(path, kept)
    path.write_text("new-key\n")
    kept.with_suffix(f".{os.getpid()}").mkdir()  # as on a full disk, it cannot be written
    late = Keys(path, kept)
    assert late.find([(b"x-api-key", b"new-key")])
    assert not late.find([(b"x-api-key", b"revoked-key")])
    assert "not kept for workers that start later" in caplog.text
