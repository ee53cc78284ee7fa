"""Spans, as a collector gets them from a real server; and nothing of them where tracing is off."""

import asyncio
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from PIL import Image

from dropserve.service.observability.tracing import TracedRequests, Tracing
from tests.helpers import encode, eventually

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def png(side):
    file = encode(Image.new("L", (side, side)))
    return {"content": file, "headers": {"content-type": "image/png"}}


class Collector:
    """Takes in what is exported to it."""

    def __init__(self):
        self.resources, self.spans = [], []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def take(self, request):
        for group in request.resource_spans:
            self.resources.append({a.key: a.value.string_value for a in group.resource.attributes})
            for scope in group.scope_spans:
                self.spans += scope.spans

    def trace(self, request_id):
        """Wait for a request's span; return it and its children by name."""

        def found():
            spans = list(self.spans)
            return [s for s in spans if attributes(s).get("dropserve.request_id") == request_id]

        (span,) = eventually(found)
        return span, {s.name: s for s in self.spans if s.parent_span_id == span.span_id}


def attributes(span):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.fixture(scope="module")
def collector():
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def traced(make_server, collector):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        return make_server(tracing=True).start()


def post(server, path, request_id, **options):
    headers = {**options.pop("headers", {}), "x-request-id": request_id}
    return httpx.post(server.url + path, headers=headers, timeout=30, **options)


def test_a_request_and_its_stages_follow_each_other(traced, collector):
    assert post(traced, "/predict", "small", **png(8)).status_code == 200
    span, stages = collector.trace("small")
    assert span.name == "POST /predict"
    assert span.kind == span.SPAN_KIND_SERVER
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "dropserve.request_id": "small",
        "dropserve.model": "digits-mlp",
        "dropserve.version": 2,
        "dropserve.images": 1,
    }
    assert set(stages) == {"queue", "decode", "run"}
    assert {stage.trace_id for stage in stages.values()} == {span.trace_id}
    moments = [span.start_time_unix_nano]
    for name in ("queue", "decode", "run"):
        assert stages[name].start_time_unix_nano >= moments[-1]
        moments.append(stages[name].end_time_unix_nano)
    assert span.end_time_unix_nano >= moments[-1]
    assert {resource["service.name"] for resource in collector.resources} == {"dropserve"}


def test_a_large_picture_is_decoded_before_the_queue(traced, collector):
    assert post(traced, "/uncertainty?samples=20", "large", **png(1500)).status_code == 200
    span, stages = collector.trace("large")
    assert span.name == "POST /uncertainty"
    assert set(stages) == {"queue", "decode", "run"}
    assert stages["decode"].end_time_unix_nano <= stages["queue"].start_time_unix_nano


def test_traceparent_is_honoured(traced, collector):
    sent = {**png(8)}
    sent["headers"] = {**sent["headers"], "traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert post(traced, "/v1/models/colour-cnn/predict", "part", **sent).status_code == 200
    span, stages = collector.trace("part")
    assert span.name == "POST /v1/models/{name}/predict"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert {stage.trace_id.hex() for stage in stages.values()} == {TRACE}
    sent["headers"]["traceparent"] = f"00-{TRACE}-{PARENT}-00"  # its sender does not sample it
    assert post(traced, "/predict", "left-out", **sent).status_code == 200
    sent["headers"]["traceparent"] = "nonsense"
    assert post(traced, "/predict", "own", **sent).status_code == 200
    assert collector.trace("own")[0].trace_id.hex() != TRACE
    assert "left-out" not in {attributes(s).get("dropserve.request_id") for s in collector.spans}


def test_failures_are_traced_and_probes_are_not(traced, collector):
    assert post(traced, "/predict", "broken", content=b"x").status_code == 415
    span, _ = collector.trace("broken")
    assert attributes(span)["http.response.status_code"] == 415
    assert span.status.code == span.status.STATUS_CODE_UNSET
    for path in ("/livez", "/metrics"):
        httpx.get(traced.url + path)
    httpx.get(traced.url + "/nothing", headers={"x-request-id": "nothing"})
    assert collector.trace("nothing")[0].name == "GET"
    names = {span.name for span in collector.spans}
    assert not [name for name in names if name.startswith("GET /")]


def test_a_collector_that_is_away_costs_no_request_and_no_long_wait_at_the_end(make_server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
        server = make_server(tracing=True).start()
    started = time.monotonic()
    assert post(server, "/predict", "lost", **png(8)).status_code == 200
    assert time.monotonic() - started < 3
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 8  # of the exporter's own patience of ten


def test_nothing_of_the_sdk_is_loaded_where_tracing_is_off():
    code = (
        "import sys; from dropserve.service.app import create_app\n"
        "from dropserve.service.settings import Settings\n"
        "import dropserve.service.server, dropserve.service.inference.inference\n"
        "create_app(Settings())\n"
        "found = [m for m in sys.modules if m.startswith(('opentelemetry.sdk',"
        " 'opentelemetry.exporter', 'dropserve.service.observability.tracing'))]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stream_that_breaks_off_is_traced_as_a_failure():
    async def breaks_off(scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        scope["state"]["log"]["status"] = 503

    async def send(_):
        pass

    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    scope["state"] = {"request_id": "x", "log": {}}
    asyncio.run(TracedRequests(breaks_off, tracing, ())(scope, None, send))
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["http.response.status_code"] == 200  # which it was


@pytest.mark.parametrize("absent", ["opentelemetry", "opentelemetry.exporter"])
def test_without_opentelemetry_the_server_says_what_is_missing(absent):
    code = (
        "import sys\n"
        "from dropserve.service.server import serve\n"
        "from dropserve.service.settings import Settings\n"
        f"sys.modules[{absent!r}] = None\n"
        "serve(Settings(tracing=True))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "pip install 'dropserve[otel]'" in run.stderr.splitlines()[-1]
