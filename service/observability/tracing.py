"""OpenTelemetry spans of a request: the whole, its decoding, its wait in the queue and its run.

Only imported if tracing is on; a ServerError then says what is missing, if it is. It sets nothing
global: the provider belongs to one application, and the standard OTEL_* variables configure it.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from time import time_ns
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.service.errors import ServerError
from dropserve.service.http.keys import OPERATIONS

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    raise ServerError(
        "DROPSERVE_TRACING needs OpenTelemetry: pip install 'dropserve[otel]'"
    ) from error

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Item = TypeVar("Item")
Result = TypeVar("Result")
_PATIENCE = 2.0
"""Seconds that the last spans get at the end."""
_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes spans and sends them.

    Args:
        exporter: where they go; None: by OTLP over HTTP to where OTEL_EXPORTER_OTLP_ENDPOINT says.
    """

    def __init__(self, exporter: "SpanExporter | None" = None) -> None:
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "dropserve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("dropserve")

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Trace what is done inside the block, as part of the request that does it."""
        with self._tracer.start_as_current_span(name):
            yield

    def staged(self, submit: Callable[..., Awaitable[Result]]) -> Callable[..., Awaitable[Result]]:
        """Wrap the queue's `submit`, so that the stages of what is submitted are traced."""

        async def traced(key: Any, item: Any, weight: int, **how: Any) -> Result:  # noqa: ANN401
            stages = _Stages(item)
            try:
                return await submit(key, stages, weight, **how)
            finally:
                for name, start, end in stages.ended():
                    self._tracer.start_span(name, start_time=start).end(end)

        return traced

    def of_requests(self, app: ASGIApp) -> "TracedRequests":
        """Wrap an application, so that its requests are traced."""
        return TracedRequests(app, self)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Span]:
        """Trace a request, as part of its sender's trace if it says which."""
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._tracer.start_as_current_span(
            scope["method"], _propagator.extract(sent), SpanKind.SERVER
        ) as span:
            yield span

    def close(self) -> None:
        """Send what is left, and stop; a collector that does not take it is not waited for long."""
        last = Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_PATIENCE)


class _Stages(Generic[Item]):
    """An item of the queue that notes when it is taken out and when it has been read.

    Calling it does what calling the item does, or returns the item if there is nothing to call.
    """

    def __init__(self, item: Item | Callable[[], Item]) -> None:
        self._item = item
        self._queued = time_ns()
        self._taken = self._read = 0

    def __call__(self) -> Item:
        """Read the item; on the worker thread."""
        self._taken = time_ns()
        try:
            return self._item() if callable(self._item) else self._item
        finally:
            self._read = time_ns()

    def ended(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, start and end of the stages that it went through, the last of which ends."""
        now = time_ns()
        yield "queue", self._queued, self._taken or now
        if self._read:
            if callable(self._item):
                yield "decode", self._taken, self._read
            yield "run", self._read, now


class TracedRequests:
    """ASGI middleware: a span a request, but none for probes and /metrics.

    Args:
        app: what answers.
        tracing: makes the spans.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in OPERATIONS:
            await self._app(scope, receive, send)
            return
        with self._tracing.request(scope) as span:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self._app(scope, receive, watched)
            finally:
                _describe(span, scope)


def _describe(span: trace.Span, scope: Scope) -> None:
    """Say what is known of a request at its end; nothing that its sender made up."""
    span.set_attribute("http.request.method", scope["method"])
    route = scope.get("state", {}).get("log", {}).get("route")
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    state = scope.get("state", {})
    span.set_attribute("dropserve.request_id", state.get("request_id", ""))
    log = state.get("log", {})
    if log.get("status", 0) >= 500:  # of a stream: its response had begun with 200
        span.set_status(StatusCode.ERROR)
    for name in ("model", "version", "images"):
        if name in log:
            span.set_attribute(f"dropserve.{name}", log[name])
