"""`/uncertainty/stream` against `/uncertainty`, and against networks thinned here by its masks."""

import asyncio
import base64
import gc
import json
import select
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from starlette.requests import ClientDisconnect, Request

from dropserve.models import checkpoint
from dropserve.service.app import create_app
from dropserve.service.errors import Overloaded
from dropserve.service.http.routes.tasks import EventStream
from dropserve.service.inference.classifier import Predict, Stream
from dropserve.service.inference.inference import MAX_STREAMS, Inference
from dropserve.service.observability.logs import FIELDS
from dropserve.service.schemas import Problem, StreamEnd, StreamSample, StreamStart
from dropserve.service.settings import Settings
from tests.helpers import encode, noise
from tests.reliability.messages import request

MLP, CNN = "/v1/models/digits-mlp", "/v1/models/colour-cnn"
EVENTS = {"start": StreamStart, "sample": StreamSample, "end": StreamEnd, "error": Problem}
PNG_TYPE = {"Content-Type": "image/png"}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
TOLD = (
    *("mean", "standard_error", "predictive_entropy", "expected_entropy"),
    "mutual_information",
)


def picture(model, seed=0):
    return noise(*((8, 8) if model == MLP else (16, 16, 3)), seed=seed)


def post(http, path, pixels):
    return http.post(path, content=encode(pixels), headers=PNG_TYPE)


def parse(text):
    """Read server-sent events as strictly as they are promised: (event, data as text, data)."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    found = []
    for event in events:
        first, second = event.split("\n")
        name, data = first.removeprefix("event: "), second.removeprefix("data: ")
        read = EVENTS[name].model_validate_json(data, strict=True)
        assert set(read.model_dump()) == set(json.loads(data))
        found.append((name, data, read))
    return found


def watched(http, path, pixels):
    """Stream a picture: start, samples, end as text."""
    response = post(http, path, pixels)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    (first, _, start), *samples, (last, end, _) = parse(response.text)
    assert (first, last) == ("start", "end")
    assert {name for name, _, _ in samples} == {"sample"}
    return start, [sample for _, _, sample in samples], end


def bits(text, units):
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:units].astype(bool)


@pytest.mark.parametrize("model", [MLP, CNN])
@pytest.mark.parametrize(
    "query", ["", "?samples=1", "?samples=25&seed=3&masks=independent", "?samples=230&level=0.5"]
)
def test_the_end_is_the_answer_of_uncertainty_byte_for_byte(model, query, http):
    start, samples, end = watched(http, f"{model}/uncertainty/stream{query}", picture(model))
    whole = post(http, f"{model}/uncertainty{query}", picture(model))
    assert end == whole.text
    assert [sample.t for sample in samples] == list(range(1, start.samples + 1))
    (found,) = whole.json()["predictions"]
    for name in TOLD:
        if found[name] is None:
            assert getattr(samples[-1], name) is None
        else:
            np.testing.assert_allclose(getattr(samples[-1], name), found[name], **CLOSE)


@pytest.mark.parametrize("masks", ["stratified", "independent"])
def test_what_is_known_after_t_samples_is_what_uncertainty_says_of_t(masks, http):
    query = f"seed=5&masks={masks}"
    path = f"{CNN}/uncertainty/stream?samples=130&{query}"
    _, samples, end = watched(http, path, picture(CNN))
    every = np.array([sample.probabilities for sample in samples])
    for t in (1, 2, 9, 10, 19, 20, 21, 100, 101, 117):
        told = samples[t - 1]
        path = f"{CNN}/uncertainty?samples={t}&include_samples=true&{query}"
        (found,) = post(http, path, picture(CNN)).json()["predictions"]
        np.testing.assert_allclose(every[:t], found["sample_probabilities"], **CLOSE)
        for name in TOLD:
            if found[name] is None:
                assert getattr(told, name) is None, (t, name)
            else:
                np.testing.assert_allclose(getattr(told, name), found[name], **CLOSE)
    assert json.loads(end)["samples"] == 130


@pytest.mark.parametrize("masks", ["stratified", "independent"])
def test_a_network_thinned_by_hand_to_the_kept_units_says_the_same(masks, http, checkpoints):
    path = f"{MLP}/versions/1/uncertainty/stream?samples=20&seed=2&masks={masks}"
    start, samples, _ = watched(http, path, picture(MLP))
    module, _ = checkpoint.load(checkpoints / "digits-mlp" / "1")
    weights = {name: t.double().numpy() for name, t in module.state_dict().items()}
    pixels = np.frombuffer(base64.b64decode(start.input.pixels), np.uint8)
    x = (pixels.reshape(-1) / 255 - 0.3) / 0.4
    for sample in samples:
        h = x
        for k, (site, mask) in enumerate(zip(start.sites, sample.kept, strict=True), 1):
            h = weights[f"hidden{k}.weight"] @ h + weights[f"hidden{k}.bias"]
            h = np.maximum(h, 0) * bits(mask, site.units) / (1 - site.p)
        logits = weights["logits.weight"] @ h + weights["logits.bias"]
        p = np.exp(logits - logits.max())
        np.testing.assert_allclose(sample.probabilities, p / p.sum(), **CLOSE)
    shares = [np.mean([bits(s.kept[k], 32) for s in samples]) for k in (0, 1)]
    np.testing.assert_allclose(shares, [0.8, 0.5], atol=0.08)


def test_the_start_shows_the_picture_as_the_network_sees_it(http):
    for model, size in ((MLP, (8, 8, 1)), (CNN, (16, 16, 3))):
        start, samples, _ = watched(http, f"{model}/uncertainty/stream?samples=2", picture(model))
        details = http.get(model).json()
        seen = np.frombuffer(base64.b64decode(start.input.pixels), np.uint8)
        assert (start.input.height, start.input.width, start.input.channels) == size
        expected = 255 - picture(MLP) if model == MLP else picture(CNN)
        np.testing.assert_array_equal(seen.reshape(expected.shape), expected)
        (predicted,) = post(http, f"{model}/predict", picture(model)).json()["predictions"]
        assert start.eval == predicted["probabilities"]
        assert start.classes == details["classes"]
        assert [site.model_dump() for site in start.sites] == details["sites"]
        for site, mask in zip(start.sites, samples[0].kept, strict=True):
            assert len(base64.b64decode(mask)) == (site.units + 7) // 8
        assert (start.method, start.masks, start.level, start.seed) == (
            *("dropout", "stratified", 0.9, 0),
        )


def test_it_is_neither_stored_nor_held_back_on_its_way(http):
    headers = post(http, "/uncertainty/stream?samples=1", picture(MLP)).headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"]


def test_every_body_that_holds_one_picture_is_taken(http):
    path = "/uncertainty/stream?samples=3"
    image = encode(picture(MLP))
    first = post(http, path, picture(MLP)).content
    text = {"images": [base64.b64encode(image).decode()]}
    assert http.post(path, files=[("file", ("a.png", image))]).content == first
    assert http.post(path, json=text).content == first
    assert http.post(path, json={"instances": [picture(MLP).tolist()]}).content == first


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/uncertainty/stream?include_samples=true", 422),
        ("/uncertainty/stream?samples=0", 422),
        ("/uncertainty/stream?samples=1001", 422),
        ("/uncertainty/stream?seed=-1", 422),
        ("/uncertainty/stream?level=1", 422),
        ("/v1/models/MARKER/uncertainty/stream", 404),
        (f"{MLP}/versions/7/uncertainty/stream", 404),
        ("/predict/stream", 404),
    ],
)
def test_what_is_wrong_before_it_begins_is_an_ordinary_error(path, status, http, problem):
    problem(post(http, path, picture(MLP)), status)


def test_pictures_that_cannot_be_watched_are_refused(http, problem):
    two = http.post("/uncertainty/stream", json={"instances": [[[0]], [[1]]]})
    assert "one image" in problem(two, 422)
    damaged = http.post("/uncertainty/stream", content=encode(picture(MLP))[:-40], headers=PNG_TYPE)
    problem(damaged, 422)
    problem(http.get("/uncertainty/stream"), 405)


def test_many_are_watched_at_once_and_each_is_told_the_same(http):
    path = f"{CNN}/uncertainty/stream?samples=60&seed={{}}"
    alone = [post(http, path.format(seed), picture(CNN)).content for seed in range(3)]
    with ThreadPoolExecutor(9) as threads:
        together = list(
            threads.map(lambda n: post(http, path.format(n % 3), picture(CNN)).content, range(9))
        )
    assert together == alone * 3


def test_the_work_stops_when_the_one_who_watches_has_left(server):
    many = json.dumps({"instances": [picture(CNN).tolist()] * 64}).encode()
    with ExitStack() as stack:
        others = [stack.enter_context(server.connect()) for _ in range(4)]
        for seed, other in enumerate(others):  # they take turns with the stream, which so lasts
            path = f"{CNN}/uncertainty?samples=1000&seed={seed}"
            other.sendall(request(path, many, "application/json"))
        with server.connect() as connection:
            path = f"{CNN}/uncertainty/stream?samples=1000&seed=1"
            watcher = request(path, encode(picture(CNN)), "image/png", "X-Request-ID: watcher")
            connection.sendall(watcher)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        line = server.line("watcher")
        assert len(select.select(others, [], [], 0)[0]) < len(others)
    assert (line["status"], line["level"]) == (499, "info")
    assert (line["model"], line["images"]) == ("colour-cnn", 1)
    assert line["route"] == "/v1/models/{name}/uncertainty/stream"


@pytest.fixture(scope="module")
def inference(checkpoints):
    running = Inference(Settings(checkpoints=checkpoints, default_model="digits-mlp", max_queue=4))
    yield running
    running.close()


@pytest.fixture
def model(inference):
    return inference.store.find("digits-mlp", "1")


PIXELS = np.zeros((1, 1, 8, 8), np.uint8)


def test_a_step_is_made_when_it_is_asked_for_and_no_sooner(inference, model, monkeypatch):
    made = []
    steps = model.stream

    def counted(task, pixels):
        for step in steps(task, pixels):
            made.append(step)
            yield step

    monkeypatch.setattr(model, "stream", counted)

    async def main():
        told = inference.stream(model, Stream(samples=1000), PIXELS)
        await anext(told)
        await asyncio.sleep(0.1)
        assert len(made) == 1
        await anext(told)
        await told.aclose()
        await asyncio.sleep(0.1)
        assert len(made) == 2

    asyncio.run(main())


async def sent(first, rest, send):
    """Send events to a client that does not leave by itself."""
    request = Request({"type": "http", "state": {"request_id": "x", "log": {}}})
    await EventStream(request, {}, first, rest)(request.scope, asyncio.Event().wait, send)


def test_nothing_is_made_while_the_client_does_not_read():
    made = []

    async def steps():
        for _ in range(100):
            made.append({"sample": []})
            yield made[-1]

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sent({"start": []}, steps(), send), 0.1)
        assert not made

    asyncio.run(main())


def test_predictions_go_in_between_and_a_full_queue_stops_none_who_has_begun(inference, model):
    async def main():
        told = inference.stream(model, Stream(samples=100), PIXELS)
        await anext(told)
        others = [asyncio.create_task(inference.run(model, Predict(), PIXELS, 4)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await anext(inference.stream(model, Stream(), PIXELS))
        steps = [step async for step in told]
        assert len(steps) == 11
        assert len((await others[0])["predictions"]) == 1
        with pytest.raises(Overloaded):
            await others[1]

    asyncio.run(main())


def test_the_steps_are_closed_as_soon_as_the_client_has_left():
    closed = []

    async def steps():
        try:
            while True:
                yield {"sample": []}
        finally:
            closed.append(True)

    async def send(message):
        if message.get("body") == b"":  # of the first step that `steps` makes
            raise ClientDisconnect

    async def main():
        with pytest.raises(ClientDisconnect):
            await sent({"start": [{}]}, steps(), send)
        assert closed

    asyncio.run(main())


def test_a_body_is_let_go_of_once_the_first_step_is_made(inference, model):
    class Body:
        def __call__(self):
            return PIXELS

    async def main():
        body = Body()
        left = weakref.ref(body)
        told = inference.stream(model, Stream(samples=20), body)
        del body
        await anext(told)
        gc.collect()
        assert left() is None
        assert len([step async for step in told]) == 3

    asyncio.run(main())


def test_no_more_than_so_many_are_watched_at_once(inference, model):
    async def main():
        def watch():
            return inference.stream(model, Stream(samples=10), PIXELS)

        told = [watch() for _ in range(MAX_STREAMS)]
        for steps in told:
            await anext(steps)
        with pytest.raises(Overloaded) as refused:
            await anext(watch())
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
        assert len([step async for step in told[0]]) == 2
        await told[1].aclose()
        told += [watch(), watch()]
        for steps in told[-2:]:
            await anext(steps)
        with pytest.raises(Overloaded):
            await anext(watch())
        for steps in told:
            await steps.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status"), [(Overloaded("later"), 503), (ValueError("MARKER"), 500)], ids=repr
)
def test_an_error_after_the_first_step_is_an_event_and_counts_as_one(
    error, status, inference, model, monkeypatch, caplog
):
    def failing(_task, _pixels):
        yield {"start": []}
        raise error

    monkeypatch.setattr(model, "stream", failing)
    app = create_app(inference._settings, inference)
    app.state.inference = inference
    path = f"{MLP}/versions/1/uncertainty/stream"

    async def main():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await post(client, path, picture(MLP))

    with caplog.at_level("INFO", "dropserve.requests"):
        response = asyncio.run(main())
    assert response.status_code == 200
    ((name, data, read),) = parse(response.text)
    assert (name, read.status) == ("error", status)
    assert read.request_id == response.headers["x-request-id"]
    assert "MARKER" not in data
    route = "/v1/models/{name}/versions/{version}/uncertainty/stream"
    assert list(app.state.metrics.requests) == [(route, "digits-mlp", 1, status)]
    line = caplog.records[-1].__dict__[FIELDS]
    assert (line["status"], line["detail"]) == (status, read.detail)
