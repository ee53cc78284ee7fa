"""The client against a transport that answers without a network."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from dropserve.service import errors
from dropserve.service.client import AsyncDropserveClient, DropserveClient
from tests.helpers import Caller

PNG = b"\x89PNG\r\n\x1a\n picture"
JPEG = b"\xff\xd8\xff picture"
WEBP = b"RIFF\0\0\0\0WEBP picture"
PREDICTED = {
    "model": "digits",
    "version": 3,
    "predictions": [
        {"label": "b", "index": 1, "probability": 0.75, "probabilities": [0.25, 0.75]},
    ],
}
Handler = Callable[[httpx.Request], httpx.Response]


class StubCaller(Caller):
    """Asks a handler; notes what was sent and how long it waited."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, "http://service.test/prefix")
        self.sent: list[httpx.Request] = []
        self.waited: list[float] = []

    def __call__(self, handler: Handler, method: str, *args: Any, **kwargs: Any) -> Any:
        def handle(request: httpx.Request) -> httpx.Response:
            self.sent.append(request)
            return handler(request)

        async def sleep(seconds: float) -> None:
            self.waited.append(seconds)

        self.options = {k: kwargs.pop(k) for k in ("retries", "max_wait", "api_key") if k in kwargs}
        self.options["transport"] = httpx.MockTransport(handle)
        self.options["sleep"] = self.waited.append if self.kind == "sync" else sleep
        return super().__call__(method, *args, **kwargs)


@pytest.fixture(params=["sync", "async"])
def call(request):
    return StubCaller(request.param)


def answering(status: int, body: object, headers: dict[str, str] | None = None) -> Handler:
    return lambda _: httpx.Response(status, json=body, headers=headers)


def busy(times: int, headers: dict[str, str], status: int = 503) -> Handler:
    """A 503, or another status, so many times, then an answer."""
    left = [httpx.Response(status, headers=headers) for _ in range(times)]
    return lambda _: left.pop() if left else httpx.Response(200, json=PREDICTED)


def test_an_answer_comes_back_typed(call):
    answer = call(answering(200, PREDICTED), "predict", PNG)
    assert (answer.model, answer.version) == ("digits", 3)
    assert answer.predictions[0].label == "b"
    assert answer.predictions[0].probabilities == [0.25, 0.75]


@pytest.mark.parametrize(
    ("image", "content_type"),
    [
        (PNG, "image/png"),
        (JPEG, "image/jpeg"),
        (WEBP, "image/webp"),
        (b"GIF89a", "application/octet-stream"),
    ],
)
def test_one_image_is_the_body_itself_under_its_own_type(call, image, content_type):
    call(answering(200, PREDICTED), "predict", [image])
    assert call.sent[0].headers["content-type"] == content_type
    assert call.sent[0].content == image


def test_several_images_are_parts_of_a_form_in_their_order(call):
    call(answering(200, PREDICTED), "predict", [PNG, JPEG])
    request = call.sent[0]
    assert request.headers["content-type"].startswith("multipart/form-data; boundary=")
    parts = request.content.split(request.headers["content-type"].partition("=")[2].encode())
    assert b'name="file"' in parts[1]
    assert b"Content-Type: image/png" in parts[1]
    assert PNG in parts[1]
    assert b"Content-Type: image/jpeg" in parts[2]
    assert JPEG in parts[2]


def test_a_path_is_read_and_one_that_is_not_there_raises_what_python_raises(call, tmp_path):
    with pytest.raises(FileNotFoundError):
        call(answering(200, PREDICTED), "predict", tmp_path / "nine.png")
    assert call.sent == []
    (tmp_path / "nine.png").write_bytes(PNG)
    call(answering(200, PREDICTED), "predict", tmp_path / "nine.png")
    assert call.sent[0].content == PNG


@pytest.mark.parametrize("images", [[], "nine.png", ["nine.png"]])
def test_no_image_and_a_bare_string_are_refused(call, images):
    with pytest.raises(ValueError, match="at least one image"):
        call(answering(200, PREDICTED), "predict", images)


@pytest.mark.parametrize("action", ["predict", "uncertainty", "compare"])
@pytest.mark.parametrize(
    ("target", "path"),
    [
        ({}, "/{}"),
        ({"model": "a"}, "/v1/models/a/{}"),
        ({"model": "a", "version": 2}, "/v1/models/a/versions/2/{}"),
        ({"model": "a/b c?d"}, "/v1/models/a%2Fb%20c%3Fd/{}"),
    ],
)
def test_a_model_and_a_version_stand_quoted_in_the_path(call, action, target, path):
    with pytest.raises(errors.NotFound):
        call(answering(404, {}), action, PNG, **target)
    sent = call.sent[0].url.raw_path.decode().partition("?")[0]
    assert sent == "/prefix" + path.format(action)


@pytest.mark.parametrize("target", [{"version": 1}, {"model": ""}, {"model": ".."}])
def test_a_version_without_a_model_and_a_name_that_is_none_are_refused(call, target):
    with pytest.raises((ValueError, errors.NotFound), match="model"):
        call(answering(200, PREDICTED), "predict", PNG, **target)


def test_options_go_into_the_query(call):
    options = {"samples": 20, "seed": 2**63 - 1, "masks": "independent", "include_samples": True}
    with pytest.raises(errors.InvalidRequest):
        call(answering(422, {}), "uncertainty", PNG, **options)
    assert dict(call.sent[0].url.params) == {
        "samples": "20",
        "seed": "9223372036854775807",
        "masks": "independent",
        "include_samples": "true",
    }


@pytest.mark.parametrize("status", [429, 503])
def test_a_429_or_503_is_tried_again_after_what_retry_after_asks_for(call, status):
    assert call(busy(2, {"Retry-After": "3"}, status), "predict", PNG).version == 3
    assert len(call.waited) == 2
    assert all(3 <= seconds < 3.3 for seconds in call.waited)
    assert [request.content for request in call.sent] == [PNG] * 3


def test_a_form_is_sent_again_whole(call):
    call(busy(1, {}), "predict", [PNG, JPEG])
    first, second = (request.content.count(b'name="file"') for request in call.sent)
    assert first == second == 2


def test_without_retry_after_the_delay_doubles_within_its_jitter(call):
    call(busy(4, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), "predict", PNG)
    for seconds, most in zip(call.waited, [0.1, 0.2, 0.4, 0.8], strict=True):
        assert most / 2 <= seconds <= most


@pytest.mark.parametrize(
    ("status", "kind"), [(429, errors.TooManyRequests), (503, errors.Overloaded)]
)
def test_it_gives_up_after_the_last_retry(call, status, kind):
    with pytest.raises(kind) as caught:
        call(busy(9, {"Retry-After": "1"}, status), "predict", PNG, retries=2)
    assert len(call.sent) == 3
    assert caught.value.headers == {"retry-after": "1"}


def test_it_does_not_wait_for_longer_than_it_may(call):
    with pytest.raises(errors.Overloaded):
        call(busy(9, {"Retry-After": "20"}), "predict", PNG, max_wait=30)
    assert len(call.waited) == 1
    with pytest.raises(errors.Overloaded):
        call(busy(9, {"Retry-After": "9" * 400}), "predict", PNG)
    assert len(call.waited) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.MalformedRequest),
        (404, errors.NotFound),
        (413, errors.TooLarge),
        (415, errors.UnsupportedMediaType),
        (418, errors.RequestError),
        (422, errors.InvalidRequest),
        (500, errors.ServerError),
    ],
)
def test_a_problem_becomes_its_error_and_is_not_tried_again(call, status, kind):
    problem = {"type": "about:blank", "title": "t", "status": status, "detail": "what was wrong"}
    with pytest.raises(errors.DropserveError) as caught:
        call(answering(status, problem | {"request_id": "r-1"}), "predict", PNG)
    assert type(caught.value) is kind
    assert str(caught.value) == "what was wrong"
    assert caught.value.request_id == "r-1"
    assert len(call.sent) == 1


def test_an_error_without_json_is_named_by_its_status(call):
    def page(_: httpx.Request) -> httpx.Response:
        return httpx.Response(502, text="<html>", headers={"X-Request-ID": "r-2"})

    with pytest.raises(errors.ServerError, match="502 Bad Gateway") as caught:
        call(page, "predict", PNG)
    assert caught.value.request_id == "r-2"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (httpx.ConnectError("refused"), "dropserve serve"),
        (httpx.ReadTimeout("too slow"), "dropserve serve"),
        (httpx.ConnectError("CERTIFICATE_VERIFY_FAILED"), "SSL_CERT_FILE"),
        (httpx.RemoteProtocolError("Server disconnected"), "http or https"),
    ],
)
def test_no_answer_says_what_to_check(call, error, remedy):
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(errors.Unreachable, match=f"service.test.*{error}.*{remedy}"):
        call(fail, "predict", PNG)
    assert call(fail, "ready") is False


@pytest.mark.parametrize("client", [DropserveClient, AsyncDropserveClient])
@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("http://host:port", errors.Unreachable, "http://host:port"),
        ("localhost:8000", ValueError, "no scheme: did you mean http://localhost:8000"),
        ("here.test/?x=http://a", ValueError, "no scheme: did you mean http://here.test/?x=http:"),
        ("", ValueError, "no scheme: did you mean http://"),
        ("ftp://here.test", ValueError, "begins with ftp://, and not with http:// or https://"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused(client, url, error, message):
    with pytest.raises(error, match=re.escape(message)):
        client(url)


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_ready_is_asked_once(call, status, ready):
    assert call(answering(status, {"status": "ready"}), "ready") is ready
    assert [request.url.path for request in call.sent] == ["/prefix/readyz"]


@pytest.mark.parametrize(
    ("method", "arguments", "path"),
    [
        ("models", (), "/v1/models"),
        ("model", ("a",), "/v1/models/a"),
        ("model", ("a", 2), "/v1/models/a/versions/2"),
        ("examples", ("a",), "/v1/models/a/examples"),
        ("examples", ("a", 2), "/v1/models/a/versions/2/examples"),
        ("example", ("a", 2, 7), "/v1/models/a/versions/2/examples/7"),
        ("metrics", (), "/metrics"),
        ("readiness", (), "/readyz"),
        ("live", (), "/livez"),
    ],
)
def test_what_takes_no_image_is_read_from_its_route(call, method, arguments, path):
    try:
        call(answering(404, {}), method, *arguments)
    except errors.NotFound:
        assert method != "live"
    assert (call.sent[0].method, call.sent[0].url.path) == ("GET", "/prefix" + path)


def test_an_example_and_the_metrics_come_as_they_are(call):
    assert call(lambda _: httpx.Response(200, content=PNG), "example", "a", 1, 0) == PNG
    assert call(lambda _: httpx.Response(200, text="up 1\n"), "metrics") == "up 1\n"


@pytest.mark.parametrize(
    ("method", "images", "content", "expected"),
    [
        ("predict", [PNG], b'{"hello": "world"}', "PredictResponse"),
        ("metrics", [], b"\xff", "text"),
    ],
)
def test_an_answer_of_something_else_is_no_answer(call, method, images, content, expected):
    with pytest.raises(errors.ServerError, match=f"did not answer with a {expected}"):
        call(lambda _: httpx.Response(200, content=content), method, *images)


def test_a_service_that_is_not_ready_is_not_asked_again(call):
    with pytest.raises(errors.Overloaded):
        call(busy(1, {}), "readiness")
    assert len(call.sent) == 1


def test_an_option_that_is_none_is_left_out(call):
    for p, query in ((None, {}), (0.25, {"p": "0.25"})):
        with pytest.raises(errors.InvalidRequest):
            call(answering(422, {}), "compare", PNG, p=p)
        assert dict(call.sent[-1].url.params) == query


@pytest.mark.parametrize(("key", "header"), [("s3cret", "Bearer s3cret"), (None, None)])
def test_a_key_goes_along_with_every_request(call, key, header):
    call(answering(200, PREDICTED), "predict", PNG, api_key=key)
    call(answering(200, {}), "ready", api_key=key)
    assert [r.headers.get("authorization") for r in call.sent] == [header] * 2


@pytest.mark.parametrize("key", ["s3cret\n", " s3cret", "s3crét", "s3cret\0"])
@pytest.mark.parametrize("client", [DropserveClient, AsyncDropserveClient])
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(client, key):
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        client(api_key=key)
    assert "s3cr" not in str(caught.value)
