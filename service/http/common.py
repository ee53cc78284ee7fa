"""What routes share: model lookup, waiting while the client is there, JSON, and declarations.

A handler takes the plain `Request` and returns a `Response`, so that the framework solves no
dependencies per request; `described` says in the OpenAPI document what the handler reads.
`request.app.state` has `settings`, `reader` (of bodies), `inference`, and whether the server is
`draining`; `request.state.log` are the fields of the request's log line.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dropserve.service.errors import Overloaded, stopping
from dropserve.service.http.images import SMALL_BYTES, ImageSource, are_small, prepared
from dropserve.service.http.options import TIMEOUT, read_timeout
from dropserve.service.inference.decoder import Pixels, Steps, finish
from dropserve.service.inference.wait_limit import WaitLimit

if TYPE_CHECKING:
    from dropserve.service.inference.classifier import Classifier
    from dropserve.service.inference.inference import Inference, Read

Result = TypeVar("Result")
TASK_ERRORS = (400, 404, 408, 413, 415, 422, 503)
"""Statuses of the errors of a route that reads a body and runs a model."""
_WATCH_AFTER = 0.1
"""Seconds after which it is noticed that a client has left."""


class PlainRoute(APIRoute):
    """A route whose handler takes the request alone.

    It has neither dependencies nor a body limit of the framework's, its router's included.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Refuse dependencies of the route when it is declared: they would not be solved."""
        if self.dependant.dependencies:
            raise TypeError(f"{self.path}: this class of routes has no dependencies")
        return super().get_route_handler()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the handler, and send its response."""
        if scope["method"] not in (self.methods or ()):  # a 405
            await super().handle(scope, receive, send)
            return
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


class JsonResponse(JSONResponse):
    """JSON of Python's and NumPy's types."""

    def render(self, content: object) -> bytes:
        """Write the content."""
        return to_json(content)


def to_json(content: object) -> bytes:
    """Write JSON of Python's and NumPy's types."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare errors by their statuses alone: `openapi.py` describes them."""
    return {status: {} for status in statuses}


def described(
    path: str, options: type[BaseModel] | None = None, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Describe for the OpenAPI document what a handler reads: path, query and body."""
    text = {"schema": {"type": "string"}}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, **text}
        for name in re.findall(r"{(\w+)}", path)
    ]
    if options is not None:
        parameters += [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in options.model_json_schema()["properties"].items()
        ]
    return {"parameters": parameters} | ({} if body is None else {"requestBody": body})


def inference_of(request: Request) -> "Inference":
    """Return the app's inference."""
    inference: Inference = request.app.state.inference
    return inference


async def find_model(request: Request, *, log: bool = False) -> "Classifier":
    """Find the version of a model that a path names, or that answers where it names none.

    With `log`, the model is part of the request's log line and metrics.

    Raises:
        NotFound: there is no such model or version, or no default model.
        Overloaded: it could not be loaded.
    """
    path, store = request.path_params, inference_of(request).store
    model = await store.find_or_load(path.get("name"), path.get("version"))
    if log:
        request.state.log.update(model=model.name, version=model.version)
    return model


def require_serving(request: Request) -> None:
    """Raise Overloaded if the service is stopping: what it reports as ready would be sent more."""
    if request.app.state.draining:
        raise stopping()


def require_model(request: Request) -> None:
    """Raise Overloaded if the service is stopping, or no model is served."""
    require_serving(request)
    if not any(inference_of(request).store):
        raise Overloaded("no model is served", "no_model")


def require_ready(request: Request) -> None:
    """Raise Overloaded if no model is served, or the thread that runs them is stuck."""
    require_model(request)
    problem = inference_of(request).stalled()
    if problem is not None:
        raise Overloaded(problem, "hung")


def admit(request: Request, *, urgent: bool) -> float:
    """Return how many seconds a request may wait once its body is read.

    Raises:
        InvalidRequest: its header that says so is malformed.
        Overloaded: it would wait for longer, as an urgent task or another.
    """
    seconds = read_timeout(request.headers.getlist(TIMEOUT), request.app.state.settings.max_wait)
    arrived = request.scope["state"].get("arrived")  # if the fast path has taken it at first
    if arrived is not None:
        seconds -= perf_counter() - arrived
    if arrived is None or seconds <= 0:  # else it was admitted
        inference_of(request).check_wait(seconds, urgent=urgent)
    return seconds


async def parsed(
    inference: "Inference", steps: Steps[Result], size: int, limit: WaitLimit
) -> Result:
    """Parse a body of so many bytes: small ones here, others on a decoding thread."""
    return finish(steps) if size <= SMALL_BYTES else await inference.decode(steps, limit)


async def decoded(
    inference: "Inference", model: "Classifier", images: Sequence[ImageSource], limit: WaitLimit
) -> "Pixels | Read":
    """Decode images on threads; small ones later, with their batch."""

    def steps() -> Steps[Pixels]:
        return prepared(images, model)

    if are_small(images):
        return lambda: finish(steps())
    return await inference.decode(steps(), limit)


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """End the block with ClientDisconnect once the client of a read body has left.

    Most blocks are over before the watcher starts: a task a request would cost 30 us.
    """
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        timeout.reschedule(0)  # a moment that is over: it ends the block now

    def start() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    try:
        async with asyncio.timeout(None) as timeout:
            timer = asyncio.get_running_loop().call_later(_WATCH_AFTER, start)
            try:
                yield
            finally:
                timer.cancel()
                if watcher is not None:
                    watcher.cancel()
    except TimeoutError:
        if timeout.expired():
            raise ClientDisconnect from None
        raise
