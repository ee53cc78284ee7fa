"""A shorter way for what is asked most: a small PNG, sent in one piece, to predict or to sample.

For each request uvicorn makes a task, a scope and messages back and forth, and the routes work with
them: that takes longer than decoding a picture and running a small network (docs/benchmarks.md).
What needs none of it goes from the socket to the queue in one call here, and its answer from there
to the socket in another.

Only a 200 is written here. Whatever is out of the ordinary - in how it was sent, in what it asks
for, in what becomes of it - is handed to uvicorn from its first byte on, and goes the usual way. So
every rule and error has one place, and leaving this file out would change no answer.
"""

from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import orjson
from starlette.datastructures import State

from service.bodies import BodyReader
from service.classifier import Answer, Pixels
from service.errors import DropserveError
from service.images import decode, is_quick
from service.keys import Keys
from service.middleware import record, request_id
from service.routes.orders import PATHS, Order, read_order, template
from service.settings import Settings
from service.tasks import Predict, Uncertainty

if TYPE_CHECKING:
    from asyncio import Future

    from service.inference import Inference

Headers = list[tuple[bytes, bytes]]
_UNUSUAL = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"))

_ANSWER = (
    b"HTTP/1.1 200 OK\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\n"
    b"x-request-id: %b\r\n\r\n%b"
)


class Express:
    """What this way knows of the application.

    Args:
        state: of the application: `inference`, once it has started, and `metrics`.
        settings: for the most samples.
        reader: of bodies: these count among what it holds.
        keys: that open the door, if there is one.
    """

    def __init__(
        self, state: State, settings: Settings, reader: BodyReader, keys: Keys | None
    ) -> None:
        self._state = state
        self._max_samples = settings.max_samples
        self._reader = reader
        self._keys = keys

    def take(self, url: bytes, headers: Headers, body: bytes) -> "Errand | None":
        """Queue a request; None: it has to go the usual way."""
        given = dict(headers)
        if len(given) < len(headers) or not _UNUSUAL.isdisjoint(given):
            return None
        if given.get(b"content-type") != b"image/png" or not is_quick(body, "image/png"):
            return None
        asked = _asked(url)
        if asked is None or (self._keys is not None and not self._keys.admit(headers)):
            return None
        name, version, route, order = asked
        if isinstance(order.task, Uncertainty) and order.task.samples > self._max_samples:
            return None
        try:
            return Errand(self._state, self._reader, (name, version), order, route, headers, body)
        except DropserveError:
            return None


class Errand:
    """One request on its way.

    Raises:
        DropserveError: it cannot be queued.
    """

    __slots__ = (
        "_body",
        "_head",
        "_inference",
        "_line",
        "_metrics",
        "_place",
        "_reader",
        "_started",
    )

    def __init__(
        self,
        state: State,
        reader: BodyReader,
        model: tuple[str | None, str | None],
        order: Order,
        route: str,
        headers: Headers,
        body: bytes,
    ) -> None:
        self._started = perf_counter()
        self._inference: Inference = state.inference
        self._metrics = state.metrics
        self._reader = reader
        self._body = body
        classifier = self._inference.registry.find(*model)
        shown = {"model": classifier.name, "version": classifier.version}
        self._head = {**shown, **order.head}
        self._line = {"request_id": request_id(headers), "method": "POST", "route": route, **shown}
        reader.hold(body)

        def read() -> Pixels:
            image = decode(body, "image/png", reader.limits.image)
            pixels: Pixels = classifier.prepare(image)[np.newaxis]
            return pixels

        try:
            self._place = self._inference.queue(classifier, order.task, read)
        except DropserveError:
            reader.release(body)
            raise

    @property
    def future(self) -> "Future[Answer]":
        """What will answer it."""
        future: Future[Answer] = self._place.future
        return future

    def give_up(self) -> None:
        """Take it out of the queue, if it is still there."""
        self._inference.leave(self._place)

    def answer(self, more: bytes) -> bytes:
        """Return the response's bytes.

        Args:
            more: header lines.
        """
        content = {**self._head, **self._place.future.result()}
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        return _ANSWER % (more, len(body), self._line["request_id"].encode(), body)

    def end(self, status: int) -> None:
        """Write the request's line in the log, and count it."""
        self._line["status"] = status
        record(self._metrics, self._line, self._started)

    def release(self) -> None:
        """Let go of the body."""
        self._reader.release(self._body)


@lru_cache(256)
def _asked(url: bytes) -> tuple[str | None, str | None, str, Order] | None:
    """Read a request's line: model, version, route and options; None: not for this way."""
    path, _, query = url.partition(b"?")
    found = PATHS.fullmatch(path.decode("latin-1"))
    if found is None or b"%" in path or len(url) > 512:
        return None
    name, version, kind = found.groups()
    try:
        order = read_order(kind, query)
    except DropserveError:
        return None
    task = order.task
    plain = type(task) is Predict or (type(task) is Uncertainty and not task.include_samples)
    return (name, version, template(name, version, kind), order) if plain else None
