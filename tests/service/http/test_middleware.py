"""What surrounds every route: middleware that others add, and causes of a 503 in log and metric."""

import asyncio
import gc
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from dropserve.service.app import create_app
from dropserve.service.errors import Overloaded
from dropserve.service.http.request_log import RequestLog
from dropserve.service.inference.batcher import Batcher, QueueTimeout
from dropserve.service.inference.inference import Inference
from dropserve.service.observability.logs import FIELDS
from dropserve.service.settings import Settings

INFER = "/v2/models/digits-mlp/infer"
TENSOR = {"name": "image", "shape": [1, 1, 1], "datatype": "UINT8", "data": [0]}


class Client:
    """Asks an application with CORSMiddleware and API keys, without a socket."""

    def __init__(self, settings):
        self.app = create_app(settings)
        self.app.add_middleware(CORSMiddleware, allow_origins=["https://page"])
        self.app.state.inference = Inference(settings)

    def ask(self, method, path, key="a-key", **body):
        async def main():
            transport = httpx.ASGITransport(self.app)
            headers = {"Origin": "https://page", "X-API-Key": key}
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return await client.request(method, path, headers=headers, **body)

        return asyncio.run(main())


@pytest.fixture(scope="module")
def client(checkpoints, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("a-key")
    given = {"checkpoints": checkpoints, "default_model": "digits-mlp", "api_keys_file": keys}
    client = Client(Settings(**given))
    yield client
    client.app.state.inference.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[("POST", path, 200) for path in ("/predict", "/uncertainty", "/compare", INFER)],
        *(("POST", "/uncertainty/stream", 200), ("GET", "/v1/models", 200), ("GET", "/livez", 200)),
        *(("POST", "/predict?x=1", 422), ("POST", "/v1/models/x/predict", 404), ("GET", "/x", 404)),
        *(("GET", "/predict", 405), ("POST", INFER + "/x", 404), ("GET", "/v1/models/%0a", 404)),
    ],
)
def test_middleware_that_is_added_to_the_app_covers_every_route(client, method, path, status):
    numbers = {"inputs": [TENSOR]} if path == INFER else {"instances": [[[0]]]}
    answer = client.ask(method, path, json=numbers)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "https://page"
    assert answer.headers["x-request-id"]


def test_it_covers_refused_and_failed_requests_too(client, monkeypatch):
    refused = client.ask("POST", "/predict", key="wrong")
    monkeypatch.setitem(client.app.state._state, "reader", None)
    failed = client.ask("POST", "/predict")
    assert (refused.status_code, failed.status_code) == (401, 500)
    for answer in (refused, failed):
        assert answer.headers["access-control-allow-origin"] == "https://page"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


def ask_log(error, *, begun):
    """Have an application raise an error, in its answer if begun; return metrics, messages."""
    sent = []

    async def fails(_scope, _receive, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    async def send(message):
        sent.append(message)

    app = create_app(Settings())
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], "app": app}
    with pytest.raises(type(error)) if begun else nullcontext():
        asyncio.run(RequestLog(fails)(scope, None, send))
    return app.state.metrics, sent


@pytest.mark.parametrize(
    ("error", "status"), [(asyncio.CancelledError(), 503), (ValueError(), 500)], ids=repr
)
def test_half_an_answer_is_not_counted_as_a_whole_one(error, status):
    metrics, _ = ask_log(error, begun=True)
    assert list(metrics.requests) == [("other", "", "", status)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        *((Overloaded("later", reason), reason) for reason in ("queue", "decode", "no_model")),
        (asyncio.CancelledError(), "draining"),
        (ValueError(), None),
    ],
    ids=str,
)
def test_the_cause_of_a_503_is_logged_and_counted(error, reason, caplog):
    with caplog.at_level("INFO", "dropserve.requests"):
        metrics, sent = ask_log(error, begun=False)
    assert sent[0]["status"] == (503 if reason else 500)
    assert ((b"retry-after", b"1") in sent[0]["headers"]) == bool(reason)
    assert getattr(caplog.records[-1], FIELDS).get("reason") == reason
    text = metrics.write("")[0].decode()
    assert re.findall(r'dropserve_shed_total{reason="(\w+)"} 1.0', text) == [reason] * bool(reason)


@pytest.mark.parametrize("in_the_queue", [False, True])
def test_a_failed_request_keeps_no_memory(in_the_queue):
    """Not even until the next garbage collection: an image's body has megabytes."""
    died = []

    class Body:
        def __init__(self):
            weakref.finalize(self, died.append, True)

    async def fails(_scope, _receive, _send):
        body, future = Body(), asyncio.get_running_loop().create_future()
        if in_the_queue:
            batcher = Batcher(None, ThreadPoolExecutor(1), max_batch=1, max_queue=1)
            batcher._busy = True
            try:
                await batcher.submit("key", body, max_wait=0.01)
            except QueueTimeout as error:
                raise Overloaded("too long", "timeout") from error
        future.set_exception(Overloaded(f"{type(body).__name__} is too large", "queue"))
        await future

    async def main(scope):
        async def send(message):
            pass

        gc.disable()
        try:
            await RequestLog(fails)(scope, None, send)
            await asyncio.sleep(0)  # the loop holds what it has just called
            assert died
        finally:
            gc.enable()

    app = create_app(Settings())
    asyncio.run(main({"type": "http", "method": "GET", "path": "/x", "headers": [], "app": app}))


def test_a_body_that_finds_no_memory_says_so(client):
    reader, part = client.app.state.reader, bytes(2**18)
    count = 0
    while reader.hold(part):
        count += 1
    refused = client.ask("POST", "/predict", content=b"x")
    for _ in range(count):
        reader.release(len(part))
    assert client.app.state.settings.max_held_bytes == count * len(part)
    assert refused.status_code == 503
    assert 'reason="body_memory"' in client.ask("GET", "/metrics").text
