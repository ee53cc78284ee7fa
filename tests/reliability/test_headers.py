"""Security headers of every response, cross-origin requests, and pages that are switched off."""

import shutil
from email.parser import BytesHeaderParser

import httpx
import pytest
from playwright.sync_api import sync_playwright

from dropserve.service.settings import Settings
from tests.helpers import PNG

SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
KEY = "a-key-0123456789"
PAGE = "https://page.example"


def request(line, *headers, body=b""):
    lines = [line, b"Host: x", b"Connection: close", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


POST = b"POST /predict HTTP/1.1"
IMAGE, WITH_KEY = b"Content-Type: image/png", b"X-API-Key: " + KEY.encode()
FAST = request(POST, IMAGE, WITH_KEY, body=PNG).replace(b"Connection: close\r\n", b"")
REQUESTS = {
    "fast path": (FAST + request(b"GET /livez HTTP/1.1"), 200),
    "ASGI path": (request(POST, IMAGE, WITH_KEY, body=PNG), 200),
    "stream": (request(b"POST /uncertainty/stream?samples=2 HTTP/1.1", WITH_KEY, body=PNG), 415),
    "probe": (request(b"GET /livez HTTP/1.1"), 200),
    "metrics": (request(b"GET /metrics HTTP/1.1", WITH_KEY), 200),
    "page": (request(b"GET / HTTP/1.1", WITH_KEY), 200),
    "static file": (request(b"GET /playground/main.js HTTP/1.1", WITH_KEY), 200),
    "documentation": (request(b"GET /docs HTTP/1.1", WITH_KEY), 200),
    "its script": (
        request(b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1", WITH_KEY),
        200,
    ),
    "redirect": (request(b"GET /playground/ HTTP/1.1", WITH_KEY), 307),
    "no key": (request(b"GET /v1/models HTTP/1.1"), 401),
    "no route": (request(b"GET /nowhere HTTP/1.1", WITH_KEY), 404),
    "no method": (request(b"PUT /predict HTTP/1.1", WITH_KEY), 405),
    "no image": (request(POST, IMAGE, WITH_KEY, body=b"x"), 415),
    "protocol": (request(b"GET /v2/models/x HTTP/1.1", WITH_KEY), 404),
    "parser error": (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
}


@pytest.fixture(scope="module")
def servers(make_server, tmp_path_factory):
    """One server with keys; one that pages of one origin may ask, without pages of its own."""
    path = tmp_path_factory.mktemp("headers") / "keys"
    path.write_text(KEY)
    origins = f"{PAGE}, https://other.example:8443"
    closed = make_server(api_keys_file=path)
    shared = make_server(api_keys_file=path, cors_origins=origins, docs=False)
    return closed.start(), shared.start()


def first_answer(raw):
    """Read the status and the headers of the first answer."""
    head = raw.partition(b"\r\n\r\n")[0]
    status, _, lines = head.partition(b"\r\n")
    return int(status.split()[1]), BytesHeaderParser().parsebytes(lines + b"\r\n\r\n")


@pytest.mark.parametrize("case", REQUESTS)
def test_every_response_has_the_security_headers_once_and_no_banner(servers, case):
    raw, expected = REQUESTS[case]
    status, headers = first_answer(servers[0].exchange(raw))
    assert status == expected
    for name, value in SECURITY.items():
        assert headers.get_all(name) == [value], name
    policies = headers.get_all("content-security-policy")
    assert policies[0] == "frame-ancestors 'none'"
    pages = ("page", "static file", "documentation")
    assert [policy.split(";")[0] for policy in policies[1:]] == ["default-src 'none'"] * (
        case in pages
    )
    assert "strict-transport-security" not in headers
    assert "access-control-allow-origin" not in headers
    assert not {"server", "x-powered-by", "via"} & {name.lower() for name in headers}


def test_the_documentation_works_in_a_browser_under_its_policy(servers):
    faults = []
    with sync_playwright() as playwright:
        options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**options)
        page = browser.new_page(http_credentials={"username": "x", "password": KEY})
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(servers[0].url + "/docs")
        page.click("text=/livez")
        page.click("text=Try it out")
        page.click("button.execute")
        answered = page.locator(".live-responses-table .response-col_status").last
        answered.wait_for()
        assert answered.inner_text() == "200"
        page.evaluate("document.body.append(document.createElement('script'))")
        inline = "s => document.body.lastChild.append('window.injected = true')"
        page.evaluate(inline, "")
        assert page.evaluate("window.injected") is None
        browser.close()
    (violation,) = faults
    assert "script-src" in violation


def preflight(server, origin, headers="content-type,x-api-key"):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return httpx.options(server.url + "/predict", headers={"Origin": origin, **asked})


def ask(server, method="POST", path="/predict", key=KEY, **headers):
    given = {"Content-Type": "image/png", "X-API-Key": key, **headers}
    return httpx.request(method, server.url + path, content=PNG, headers=given)


@pytest.mark.parametrize("origin", [PAGE, "https://other.example:8443"])
def test_a_listed_origin_may_ask_with_a_key_and_read_answers_and_errors(servers, origin):
    server = servers[1]
    allowed = preflight(server, origin)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == origin
    assert "x-api-key" in allowed.headers["access-control-allow-headers"].lower()
    assert server.line(allowed.headers["x-request-id"])["method"] == "OPTIONS"
    for key, path, status in ((KEY, "/predict", 200), ("", "/predict", 401), (KEY, "/no", 404)):
        answer = ask(server, path=path, key=key, Origin=origin)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == origin
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
        assert "cross-origin-resource-policy" not in answer.headers


def test_another_origin_may_not(servers):
    closed, shared = servers
    for origin in ("https://page.example.org", "http://page.example", "null"):
        refused = preflight(shared, origin)
        assert refused.status_code == 400
        answer = ask(shared, Origin=origin)
        for response in (refused, answer):
            assert "access-control-allow-origin" not in response.headers
    assert preflight(shared, PAGE, "x-unknown").status_code == 400
    assert preflight(closed, PAGE).status_code == 401
    assert "access-control-allow-origin" not in ask(closed, Origin=PAGE).headers


def test_both_paths_answer_alike_beside_cross_origin_requests(servers):
    server = servers[1]
    name = b"X-Request-ID: this"
    fast = request(POST, IMAGE, WITH_KEY, name, body=PNG).replace(b"Connection: close\r\n", b"")
    end = request(b"GET /livez HTTP/1.1")
    slow = fast.replace(b"image/png", b"image/png;a=b")  # which only the ASGI path reads
    answers = [first_answer(server.exchange(raw + end)) for raw in (fast, slow)]
    (status, headers), (_, others) = answers
    assert status == 200
    for found in (headers, others):
        del found["date"]
    assert sorted(headers.items()) == sorted(others.items())
    assert headers["vary"] == "Origin"


def test_pages_can_be_switched_off_and_the_api_stays(servers):
    server = servers[1]
    pages = ("/", "/playground/main.js", "/docs", "/openapi.json")
    for path in (*pages, "/static-offline-docs/swagger-ui-bundle.js", "/redoc"):
        assert ask(server, "GET", path).status_code == 404
    assert ask(server).status_code == 200


@pytest.mark.parametrize(
    "origins", ["https://page.example/", "page.example", "https://a b", "null", "*,x"]
)
def test_what_is_no_origin_is_refused(origins):
    with pytest.raises(ValueError, match="an origin is"):
        Settings(cors_origins=origins)
