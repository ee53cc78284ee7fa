"""How the client reads a stream of events, whatever the pieces it comes in."""

import asyncio
import base64
import json
from contextlib import aclosing

import httpx
import pytest

from dropserve.service import errors
from dropserve.service.client import AsyncDropserveClient, DropserveClient
from dropserve.service.schemas import StreamEnd, StreamSample, StreamStart
from tests.helpers import Caller

PNG = b"\x89PNG\r\n\x1a\n picture"
START = {
    "model": "digits", "version": 3, "method": "dropout", "samples": 2, "seed": 7,
    "masks": "stratified", "log_base": "e", "level": 0.9, "classes": ["a", "\u2028b"],
    "eval": [0.25, 0.75],
    "input": {"height": 1, "width": 2, "channels": 1, "pixels": "AP8="},
    "sites": [{"name": "drop", "kind": "dropout", "p": 0.5, "shape": [3], "units": 3}],
}  # fmt: skip
DOUBT = {"predictive_entropy": 0.5, "expected_entropy": 0.4, "mutual_information": 0.1}
SAMPLES = [
    {"t": t, "probabilities": [0.2, 0.8], "mean": [0.2, 0.8], "standard_error": None, **DOUBT,
     "kept": ["oA=="]}
    for t in (1, 2)
]  # fmt: skip
END = {
    "model": "digits", "version": 3, "method": "dropout", "samples": 2, "seed": 7,
    "masks": "stratified", "log_base": "e",
    "predictions": [{
        "label": "b", "index": 1, "mean": [0.2, 0.8], "variance": None, "standard_error": None,
        **DOUBT, "variation_ratio": 0.0,
        "interval": {"level": 0.9, "lower": [0.1, 0.7], "upper": [0.3, 0.9]},
    }],
}  # fmt: skip
PROBLEM = {"type": "about:blank", "title": "t", "status": 503, "detail": "no", "request_id": "r-1"}


def event(kind, data):
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


WHOLE = b"".join([event("start", START), *(event("sample", s) for s in SAMPLES), event("end", END)])


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that comes in pieces of a size; says whether it was closed."""

    def __init__(self, body, size, error=None):
        self.pieces = [body[i : i + size] for i in range(0, len(body), size)]
        self.error = error
        self.closed = False

    def __iter__(self):
        yield from self.pieces
        if self.error:
            raise self.error

    async def __aiter__(self):
        for piece in self:
            yield piece

    def close(self):
        self.closed = True

    async def aclose(self):
        self.closed = True


@pytest.fixture(params=["sync", "async"])
def stream(request):
    """Reads a stream, of these answers, with one of the two clients."""

    def read(answers, **how):
        def handle(request):
            read.sent.append(request)
            answer = answers.pop(0)
            whole = isinstance(answer, httpx.Response)
            return answer if whole else httpx.Response(200, stream=answer)

        sleep = {"sync": lambda _: None, "async": lambda _: asyncio.sleep(0)}[request.param]
        options = {"transport": httpx.MockTransport(handle), "sleep": sleep}
        return Caller(request.param, "http://a.test", **options)("uncertainty_stream", PNG, **how)

    read.sent = []
    return read


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_events_come_typed_however_they_are_cut(stream, size):
    start, *samples, end = stream([Pieces(WHOLE, size)])
    assert isinstance(start, StreamStart)
    assert start.classes == ["a", "\u2028b"]
    assert base64.b64decode(start.input.pixels) == b"\0\xff"
    assert all(isinstance(sample, StreamSample) for sample in samples)
    assert [sample.t for sample in samples] == [1, 2]
    assert isinstance(end, StreamEnd)
    assert end.predictions[0].label == "b"


def test_carriage_returns_comments_and_unknown_events_do_no_harm(stream):
    body = b": hello\n\n" + event("news", {}) + WHOLE
    assert len(stream([Pieces(body.replace(b"\n", b"\r\n"), 5)])) == 4


def test_the_options_and_the_model_are_asked_for(stream):
    stream([Pieces(WHOLE, 100)], model="digits", version=3, samples=2, masks="independent")
    request = stream.sent[0]
    assert request.url.path == "/v1/models/digits/versions/3/uncertainty/stream"
    assert dict(request.url.params) == {"samples": "2", "masks": "independent"}
    assert request.content == PNG


def test_a_503_before_the_stream_is_tried_again(stream):
    assert len(stream([httpx.Response(503), Pieces(WHOLE, 100)])) == 4
    assert len(stream.sent) == 2


def test_an_error_before_the_stream_is_raised_with_what_it_says(stream):
    problem = PROBLEM | {"status": 422, "detail": "samples: too many"}
    with pytest.raises(errors.InvalidRequest, match="samples: too many"):
        stream([httpx.Response(422, json=problem)])


def test_an_error_in_the_stream_is_raised_as_the_service_meant_it(stream):
    body = event("start", START) + event("error", PROBLEM)
    with pytest.raises(errors.Overloaded, match="no") as caught:
        stream([Pieces(body, 50)])
    assert caught.value.request_id == "r-1"


@pytest.mark.parametrize("size", [50, 10**6])
@pytest.mark.parametrize("error", [None, httpx.ReadError("reset")], ids=repr)
def test_a_stream_that_breaks_off_is_no_answer(stream, size, error):
    with pytest.raises(errors.Unreachable, match=r"broke off|reset"):
        stream([Pieces(WHOLE[:-10], size, error)])


@pytest.mark.parametrize("body", [event("start", {}), event("error", {"detail": 3})])
def test_an_event_of_something_else_is_an_error(stream, body):
    with pytest.raises(errors.ServerError, match=r"StreamStart|Problem"):
        stream([Pieces(body, 100)])


def test_a_stream_that_is_left_is_closed():
    pieces, more = Pieces(WHOLE, 10), Pieces(WHOLE, 10)
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=pieces))
    with DropserveClient(transport=transport) as client:
        next(events := client.uncertainty_stream(PNG))
        events.close()

    async def leave():
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=more))
        async with (
            AsyncDropserveClient(transport=transport) as client,
            aclosing(client.uncertainty_stream(PNG)) as events,
        ):
            await anext(events)

    asyncio.run(leave())
    assert pieces.closed
    assert more.closed


def test_several_images_are_refused():
    with DropserveClient() as client, pytest.raises(ValueError, match="one image"):
        next(client.uncertainty_stream([PNG, PNG]))
