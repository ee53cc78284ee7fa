"""Both clients against a real server: every route, and the same answers."""

import asyncio
import inspect
import io

import numpy as np
import pytest
from PIL import Image

from service import errors, schemas
from service.client import AsyncDropserveClient, DropserveClient
from service.events import StreamEnd, StreamStart


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNG = picture(1)


class Caller:
    """Calls a method of one of the two clients; a stream comes back as a list."""

    def __init__(self, kind, url):
        self.kind = kind
        self.url = url

    def __call__(self, method, *arguments, **options):
        if self.kind == "sync":
            with DropserveClient(self.url) as client:
                answer = getattr(client, method)(*arguments, **options)
                return list(answer) if inspect.isgenerator(answer) else answer

        async def run():
            async with AsyncDropserveClient(self.url) as client:
                answer = getattr(client, method)(*arguments, **options)
                if inspect.isasyncgen(answer):
                    return [event async for event in answer]
                return await answer

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def call(request, server):
    return Caller(request.param, server.url)


def test_the_two_clients_have_the_same_methods_and_arguments():
    def public(client):
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(client).items()
            if not name.startswith("_")
        }

    assert public(DropserveClient) == public(AsyncDropserveClient)


def test_several_images_are_answered_in_their_order(call):
    together = call("predict", [PNG, picture(2)]).predictions
    alone = [call("predict", image).predictions[0] for image in (PNG, picture(2))]
    assert [p.index for p in together] == [p.index for p in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_version_answers_for_itself(call):
    answer = call("predict", PNG, model="digits-mlp", version=1)
    assert (answer.model, answer.version) == ("digits-mlp", 1)
    with pytest.raises(errors.NotFound):
        call("predict", PNG, model="digits-mlp", version=9)


def test_a_stream_ends_with_what_uncertainty_answers(call):
    how = {"samples": 30, "seed": 5, "masks": "independent", "level": 0.8}
    start, *samples, end = call("uncertainty_stream", PNG, **how)
    assert isinstance(start, StreamStart)
    assert (start.samples, start.seed, start.level) == (30, 5, 0.8)
    assert [sample.t for sample in samples] == list(range(1, 31))
    assert isinstance(end, StreamEnd)
    whole = call("uncertainty", PNG, **how)
    assert end.predictions[0].mean == pytest.approx(whole.predictions[0].mean, abs=1e-5)
    assert samples[-1].mean == pytest.approx(whole.predictions[0].mean, abs=1e-5)


def test_a_stream_that_is_left_leaves_the_service_well(server):
    with DropserveClient(server.url) as client:
        for event in client.uncertainty_stream(PNG, samples=1000):
            assert isinstance(event, StreamStart)
            break
        assert client.predict(PNG).predictions


def test_a_stream_of_too_many_samples_is_refused_before_it_begins(call):
    with pytest.raises(errors.InvalidRequest, match="samples"):
        call("uncertainty_stream", PNG, samples=1001)


def test_compare_takes_another_rate_for_train_mode(call):
    usual, none = call("compare", PNG, passes=2), call("compare", PNG, passes=2, p=0.0)
    assert usual.predictions[0].train[0] != usual.predictions[0].train[1]
    assert none.p == 0.0
    assert none.predictions[0].train[0] == pytest.approx(none.predictions[0].eval[0], abs=1e-5)


def test_what_is_served_and_whether_it_is_ready(call):
    assert [m.name for m in call("models").models] == ["colour-cnn", "digits-mlp"]
    assert call("model", "digits-mlp").classes[3] == "class 3"
    assert call("model", "digits-mlp", 1).version == 1
    assert call("live") is True
    assert call("ready") is True
    assert sorted(call("readiness").models["digits-mlp"].versions) == [1, 2]


def test_metrics_are_text(call):
    call("predict", PNG)
    assert "\ndropserve_requests_total{" in call("metrics")


def test_examples_of_a_model_saved_without(call):
    assert call("examples", "digits-mlp") == schemas.ExampleList(
        model="digits-mlp", version=2, examples=[]
    )
    with pytest.raises(errors.NotFound):
        call("example", "digits-mlp", 2, 0)
