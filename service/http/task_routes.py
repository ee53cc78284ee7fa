"""Predict, uncertainty and compare: what runs when they are asked for.

`native.py` declares these routes, so that the OpenAPI document has them. They run here, before
FastAPI's middleware, router, dependencies and response: those take about as long as decoding a
picture and running a small network together (docs/benchmarks.md).
"""

from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from dropserve.service.errors import InvalidRequest, TooLarge
from dropserve.service.http.body import BodyReader, parse_images
from dropserve.service.http.front import Front
from dropserve.service.http.images import is_small_png, prepared
from dropserve.service.http.orders import PATHS, ParsedOptions, read_options, template
from dropserve.service.http.stream import send_events
from dropserve.service.http.waiting import WhileConnected
from dropserve.service.inference.classifier import Answer, Classifier, Stream, Task, Uncertainty
from dropserve.service.inference.decoder import Pixels, Steps, finish
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.inference.inference import Inference, Read

_MAX_NUMBERS = 1_000_000
"""Sampled probabilities in one answer: about 12 MB of JSON."""
Watched = tuple[Answer, AsyncGenerator[Answer, None]]
"""An answer in steps: the first, and what makes the others."""


class TaskRoutes(Front):
    """ASGI application: answers what asks for a task, and leaves the rest to another one.

    Args:
        behind: gets every other path and method.
        settings: for the most samples.
        reader: of bodies.
    """

    paths = PATHS

    def __init__(self, behind: ASGIApp, settings: Settings, reader: BodyReader) -> None:
        super().__init__(behind)
        self._max_samples = settings.max_samples
        self._reader = reader

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the model, run the task, write the answer."""
        name, version, kind = scope["path_params"].values()
        log = scope["state"]["log"]
        log["route"] = template(name, version, kind)
        inference: Inference = scope["app"].state.inference
        model = inference.store.find(name, version)
        log.update(model=model.name, version=model.version)
        order = read_options(kind, scope["query_string"], self._max_samples)
        answer = await self._run(model, order, scope, receive)
        head = {"model": model.name, "version": model.version, **order.head}
        if isinstance(answer, tuple):
            with WhileConnected(receive):
                await send_events(send, head, *answer, scope["state"])
        else:
            await _send(send, {**head, **answer})

    async def _run(
        self, model: Classifier, order: ParsedOptions, scope: Scope, receive: Receive
    ) -> Answer | Watched:
        """Read the pictures and run the task, or the first step of one that is answered in steps.

        The body is needed until its pictures are found in it.
        """
        inference: Inference = scope["app"].state.inference
        task = order.task
        given = dict(reversed(scope["headers"]))  # the first of a name counts
        content_type = given.get(b"content-type", b"").decode("latin-1")
        sent = await self._reader.read(given, receive)
        size, quick = len(sent), is_small_png(sent, content_type)
        try:

            def read() -> Steps[Pixels]:
                nonlocal sent
                limits = self._reader.limits
                found = yield from parse_images(sent, content_type, limits, order.scale)
                if not quick:  # which may be read again
                    sent = b""
                return (yield from prepared(found, model.prepare))

            with WhileConnected(receive):
                pixels: Pixels | Read
                if quick:
                    pixels, images = (lambda: finish(read())), 1
                else:
                    pixels = await inference.decode(read())
                    images = len(pixels)
                _check_length(task, model, images)
                scope["state"]["log"]["images"] = images
                if isinstance(task, Stream):
                    steps = inference.stream(model, task, pixels)
                    return await anext(steps), steps
                return await inference.run(model, task, pixels, images)
        finally:
            self._reader.release(size)


async def _send(send: Send, answer: Mapping[str, Any]) -> None:
    body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _check_length(task: Task, model: Classifier, images: int) -> None:
    """Refuse, before the work, an answer that would be too long to write, or of several parts."""
    if isinstance(task, Stream) and images > 1:
        raise InvalidRequest("one picture is watched at a time")
    if not isinstance(task, Uncertainty) or not task.include_samples:
        return
    if task.samples * images * len(model.classes) > _MAX_NUMBERS:
        raise TooLarge(
            f"samples x images x classes is more than {_MAX_NUMBERS}: ask for less at once, or "
            f"without include_samples"
        )
