"""A shorter way for what is asked most: a small PNG, the body itself, to predict or to sample.

For each request uvicorn makes a task, a scope and messages back and forth, and the routes work with
them: that takes longer than decoding a picture and running a small network (docs/benchmarks.md).
What needs none of it goes from the socket to the queue in one call here, and its answer from there
to the socket in another.

Only a 200 is written here. Whatever is out of the ordinary - in how it was sent, in what it asks
for, in what becomes of it - is handed to uvicorn from its first byte on, and goes the usual way. So
every rule and error has one place, and leaving this file out would change no answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from starlette.datastructures import State

from dropserve.service.errors import DropserveError, NotFound, Overloaded
from dropserve.service.http.body import BodyReader
from dropserve.service.http.decoding import Pixels
from dropserve.service.http.images import SMALL_PNG_BYTES, decode, is_small_png
from dropserve.service.http.keys import Keys
from dropserve.service.http.options import PATHS, ParsedOptions, read_options, route_template
from dropserve.service.http.request_log import record, request_id
from dropserve.service.inference.tasks import Predict, Uncertainty
from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from dropserve.service.inference.inference import Inference, Waiting

Headers = list[tuple[bytes, bytes]]
_MAX_URL = 512
_UNUSUAL = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"))

_ANSWER = (
    b"HTTP/1.1 200 OK\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\n"
    b"x-request-id: %b\r\n\r\n%b"
)


class FastPath:
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

    def is_plain(self, headers: Headers) -> bool:
        """Say if nothing but the usual is in these lines, and a small PNG is to come after them."""
        given = dict(headers)
        plain = len(given) == len(headers) and _UNUSUAL.isdisjoint(given)
        small = int(given.get(b"content-length", b"0")) <= SMALL_PNG_BYTES
        return plain and small and given.get(b"content-type") == b"image/png"

    def take(self, url: bytes, headers: Headers, body: bytes) -> "FastPathRequest | None":
        """Queue a request; None: it has to go the usual way."""
        started = perf_counter()
        if not self.is_plain(headers) or not is_small_png(body, "image/png"):
            return None
        asked = _asked(url, self._max_samples) if len(url) <= _MAX_URL else None
        if asked is None or (self._keys is not None and not self._keys.admit(headers)):
            return None
        name, version, route, order = asked
        inference: Inference = self._state.inference
        try:
            model = inference.registry.find(name, version)
        except NotFound:
            return None
        if len(body) > self._reader.limits.max_bytes or not self._reader.hold(body):
            return None

        def read() -> Pixels:
            image = decode(body, "image/png", self._reader.limits.image)
            pixels: Pixels = model.prepare(image)[np.newaxis]
            return pixels

        try:
            place = inference.queue(model, order.task, read)
        except Overloaded:
            self._reader.release(len(body))
            return None
        shown = {"model": model.name, "version": model.version}
        line = {"request_id": request_id(headers), "method": "POST", "route": route, **shown}
        return FastPathRequest(place, body, {**shown, **order.head}, line, started)

    def give_up(self, request: "FastPathRequest", status: int | None) -> None:
        """Take a request out of the queue, if it is still there, and `end` it."""
        self._state.inference.leave(request.place)
        self.end(request, status)

    def end(self, request: "FastPathRequest", status: int | None) -> None:
        """Let go of a request; write its line and count it, unless the usual way will (None)."""
        self._reader.release(len(request.body))
        if status is not None:
            request.line |= {"images": 1, "status": status}
            record(self._state.metrics, request.line, request.started)


@dataclass(eq=False, slots=True)
class FastPathRequest:
    """One request on its way.

    Attributes:
        place: in the queue.
        body: what is held meanwhile.
        head: what the answer repeats of the request.
        line: of the log.
        started: when, by `time.perf_counter`.
    """

    place: "Waiting"
    body: bytes
    head: Mapping[str, Any]
    line: dict[str, Any]
    started: float

    def answer(self, server_headers: Headers) -> bytes:
        """Write the response, with these headers and its own, or raise what went wrong instead."""
        content = {**self.head, **self.place.future.result()}
        body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        lines = b"".join([b"%b: %b\r\n" % header for header in server_headers])
        return _ANSWER % (lines, len(body), self.line["request_id"].encode(), body)


@lru_cache(256)
def _asked(
    url: bytes, max_samples: int
) -> tuple[str | None, str | None, str, ParsedOptions] | None:
    """Read a request's line: model, version, route and options; None: not for this way."""
    path, _, query = url.partition(b"?")
    if not url.isascii() or b"%" in path or b"#" in url:
        return None
    found = PATHS.fullmatch(path.decode())
    if found is None:
        return None
    name, version, kind = found.groups()
    try:
        order = read_options(kind, query, max_samples)
    except DropserveError:
        return None
    task = order.task
    plain = type(task) is Predict or (type(task) is Uncertainty and not task.include_samples)
    plain = plain and order.scale != 1
    return (name, version, route_template(name, version, kind), order) if plain else None
