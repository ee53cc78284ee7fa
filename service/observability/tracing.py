"""OpenTelemetry spans of a request: the whole, its decoding, its wait in the queue and its run.

Imported only where tracing is on; a ServerError then says if OpenTelemetry is missing. Nothing
global is set: the provider belongs to one application, and the OTEL_* variables configure it.

The server span is made here, not by opentelemetry-instrumentation-asgi or FastAPI's telemetry: both
export what the sender made up (path, query, host), and neither sees that a stream has failed.
"""

from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from itertools import pairwise
from threading import Thread
from time import time_ns
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.service.errors import ServerError

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    text = "DROPSERVE_TRACING needs OpenTelemetry: pip install 'dropserve[otel]'"
    raise ServerError(text) from error

Result = TypeVar("Result")
_CLOSE_SECONDS = 2.0  # for the last spans


class Tracing:
    """Makes spans and sends them: to `exporter`, or by OTLP to OTEL_EXPORTER_OTLP_ENDPOINT."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "dropserve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self.tracer = self._provider.get_tracer("dropserve")

    def span(self, name: str) -> AbstractContextManager[object]:
        """Trace what is done inside the block, as part of the request that does it."""
        return self.tracer.start_as_current_span(name)

    def staged(self, submit: Callable[..., Awaitable[Result]]) -> Callable[..., Awaitable[Result]]:
        """Wrap what submits an item, or a function that reads it: each stage becomes a span."""

        async def traced(item: Any) -> Result:  # noqa: ANN401
            starts = [("queue", time_ns())]

            def read() -> Any:  # noqa: ANN401  on the worker thread
                try:
                    if callable(item):
                        starts.append(("decode", time_ns()))
                    return item() if callable(item) else item
                finally:
                    starts.append(("run", time_ns()))

            try:
                return await submit(read)
            finally:
                for (name, start), (_, end) in pairwise([*starts, ("end", time_ns())]):
                    self.tracer.start_span(name, start_time=start).end(end)

        return traced

    def close(self) -> None:
        """Send the last spans, and stop; a collector that does not answer is not waited for."""
        last = Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_CLOSE_SECONDS)


class TracedRequests:
    """ASGI middleware: one span per request, as part of its sender's trace if it names one.

    Its attributes are method, route as declared and status, and from `scope["state"]` the request's
    id and what its log line has of model, version and images. `excluded` paths have no span.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing, excluded: Collection[str]) -> None:
        self._app, self._tracing, self._excluded = app, tracing, excluded
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in self._excluded:
            await self._app(scope, receive, send)
            return
        method, status = scope["method"], 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = self._propagator.extract(sent)
        with self._tracing.tracer.start_as_current_span(method, parent, SpanKind.SERVER) as span:
            try:
                await self._app(scope, receive, send_noting_status)
            finally:
                state = scope.get("state", {})
                log = state.get("log", {})
                route = log.get("route") or getattr(scope.get("route"), "path", None)
                span.update_name(f"{method} {route}" if route else method)
                attributes = {
                    "http.request.method": method,
                    "http.route": route,
                    "http.response.status_code": status or None,
                    "dropserve.request_id": state.get("request_id", ""),
                    **{f"dropserve.{x}": log.get(x) for x in ("model", "version", "images")},
                }
                span.set_attributes({k: v for k, v in attributes.items() if v is not None})
                if max(status, log.get("status", 0)) >= 500:  # a failed stream began with 200
                    span.set_status(StatusCode.ERROR)
