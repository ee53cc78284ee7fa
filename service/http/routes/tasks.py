"""POST predict, uncertainty, uncertainty/stream and compare: what runs in batches.

Another such route needs options in `schemas.py` and `http/options.py`, a task in
`inference/classifier.py` and a method in `client.py`; the batcher takes any task.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dropserve.service.errors import InvalidRequest, TooLarge
from dropserve.service.http.body import BodyReader, parse_images
from dropserve.service.http.common import (
    TASK_ERRORS,
    JsonResponse,
    PlainRoute,
    admit,
    decoded,
    described,
    errors,
    find_model,
    inference_of,
    parsed,
    to_json,
    while_connected,
)
from dropserve.service.http.options import MODEL, OPTIONS, VERSION, read_options
from dropserve.service.http.request_log import failure, problem
from dropserve.service.inference.classifier import (
    Answer,
    Classifier,
    Predict,
    Stream,
    Task,
    Uncertainty,
)
from dropserve.service.inference.wait_limit import WaitLimit
from dropserve.service.schemas import CompareResponse, PredictResponse, UncertaintyResponse

MAX_NUMBERS = 1_000_000
"""Sampled probabilities in one answer: about 12 MB of JSON."""
_IMAGE, _IMAGES = ({"$ref": f"#/components/requestBodies/{name}"} for name in ("Image", "Images"))
_EVENTS = {200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}}
router = APIRouter(route_class=PlainRoute, tags=["models"], responses=errors(*TASK_ERRORS))
Handler = Callable[[Request], Awaitable[Response]]


def _post(action: str, body: Answer = _IMAGES, **answer: Any) -> Callable[[Handler], Handler]:  # noqa: ANN401
    """Declare the routes of a task: by the default model, a named one, and one of its versions."""

    def declare(handler: Handler) -> Handler:
        for prefix in ("", MODEL, VERSION):
            path = f"{prefix}/{action}"
            extra = described(path, OPTIONS[action], body)
            router.post(path, openapi_extra=extra, **answer)(handler)
        return handler

    return declare


class EventStream(StreamingResponse):
    """Server-sent events: a step is made once the events of the one before are sent.

    Args:
        request: that is answered.
        head: what the events `start` and `end` say before their own data.
        first: step of the answer, `{event: a list of its data}`.
        rest: the other steps; closed at the end. An error in one of them is an event too.
    """

    def __init__(
        self, request: Request, head: Answer, first: Answer, rest: AsyncGenerator[Answer, None]
    ) -> None:
        headers = {
            "content-type": "text/event-stream",
            "cache-control": "no-store",
            "x-accel-buffering": "no",  # nginx would buffer events
        }
        super().__init__(self._events(request, head, first), headers=headers)
        self._rest = rest

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events while the client is connected."""
        async with while_connected(receive), aclosing(self._rest):
            await self.stream_response(send)

    async def _events(self, request: Request, head: Answer, first: Answer) -> AsyncIterator[bytes]:
        yield _write_events(first, head)
        try:
            async for step in self._rest:
                yield _write_events(step, head)
        except Exception as error:
            sent = failure(error, request.scope)
            error.__traceback__ = None  # as in RequestLog
            request.state.log["status"] = sent.status  # the header said 200
            content = problem(sent.status, str(sent), request.state.request_id)
            yield _write_events({"error": [content]}, {})


def _write_events(step: Answer, head: Answer) -> bytes:
    return b"".join(
        b"event: %s\ndata: %s\n\n"
        % (event.encode(), to_json({**head, **data} if event in ("start", "end") else data))
        for event, found in step.items()
        for data in found
    )


@_post("predict", response_model=PredictResponse)
async def predict(request: Request) -> Response:
    """Classify images in eval mode."""
    return await _answer(request, "predict")


@_post("uncertainty", response_model=UncertaintyResponse)
async def uncertainty(request: Request) -> Response:
    """Classify images by Monte Carlo dropout, with measures of uncertainty."""
    return await _answer(request, "uncertainty")


@_post("uncertainty/stream", _IMAGE, response_class=Response, responses=_EVENTS)
async def uncertainty_stream(request: Request) -> Response:
    """Stream Monte Carlo dropout of one image: events start, sample (T of them) and end."""
    return await _answer(request, "uncertainty/stream")


@_post("compare", response_model=CompareResponse)
async def compare(request: Request) -> Response:
    """Show images in train mode and in eval mode, layer by layer."""
    return await _answer(request, "compare")


async def _answer(request: Request, action: str) -> Response:
    inference, state = inference_of(request), request.app.state
    model = await find_model(request, log=True)
    options = read_options(action, request.scope["query_string"], state.settings.max_samples)
    seconds = admit(request, urgent=isinstance(options.task, Predict))
    head = {"model": model.name, "version": model.version, **options.head}
    reader: BodyReader = state.reader
    content_type = request.headers.get("content-type", "")
    body = await reader.read(request)
    limit = WaitLimit(seconds)
    size, parsing = len(body), parse_images(body, content_type, state.settings, options.scale)
    del body  # its memory is free as soon as it is parsed
    try:
        async with while_connected(request.receive):
            sources = await parsed(inference, parsing, size, limit)
            request.state.log["images"] = images = len(sources)
            _check_length(options.task, model, images)
            pixels = await decoded(inference, model, sources, limit)
            del sources  # and with them the body
            if isinstance(options.task, Stream):
                steps = inference.stream(model, options.task, pixels, limit)
                return EventStream(request, head, await anext(steps), steps)
            answer = await inference.run(model, options.task, pixels, images, limit)
            return JsonResponse({**head, **answer})
    finally:
        reader.release(size)


def _check_length(task: Task, model: Classifier, images: int) -> None:
    """Refuse, before the work, an answer that would be too long to write, or of several images."""
    if isinstance(task, Stream) and images > 1:
        raise InvalidRequest("one image is streamed at a time")
    numbers = len(model.classes) * images
    if (
        isinstance(task, Uncertainty)
        and task.include_samples
        and task.samples * numbers > MAX_NUMBERS
    ):
        raise TooLarge(
            f"samples x images x classes is more than {MAX_NUMBERS}: ask for less at once, or "
            f"without include_samples"
        )
