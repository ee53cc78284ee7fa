"""Classifiers: what one version answers, and how much at once."""

import asyncio
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from dropserve.models.defaults import DEFAULT_SAMPLES
from dropserve.service.errors import InvalidRequest, Overloaded
from dropserve.service.http.options import read_options
from dropserve.service.inference.classifier import (
    Classifier,
    Compare,
    Predict,
    Stream,
    Uncertainty,
)
from dropserve.service.inference.decoder import finish
from dropserve.service.inference.inference import Inference, _answers, _fits, _is_inline, _key
from dropserve.service.settings import Settings


@pytest.fixture(scope="module")
def classifier(checkpoints):
    return Classifier("digits-mlp", 1, checkpoints / "digits-mlp" / "1")


def test_more_than_fits_at_once_is_answered_in_parts_that_agree(classifier):
    pixels = np.random.default_rng(0).integers(0, 256, (450, 1, 8, 8), np.uint8)
    task = Uncertainty(samples=1000)  # 4.5 million probabilities; some 4.2 fit
    (whole,) = finish(classifier.run(task, [pixels]))
    (end,) = finish(classifier.run(task, [pixels[-20:]]))
    assert len(whole["predictions"]) == 450
    for one, other in zip(whole["predictions"][-20:], end["predictions"], strict=True):
        np.testing.assert_allclose(one["mean"], other["mean"], atol=1e-5)
        np.testing.assert_allclose(one["variance"], other["variance"], atol=1e-5)


def test_an_answer_too_long_to_write_is_refused_before_the_work(make_server, problem):
    server = make_server(max_images=101).start()
    body = {"instances": [[[0]]] * 101}
    url = server.url + "/uncertainty?samples=1000"
    assert httpx.post(url, json=body, timeout=60).status_code == 200
    refused = httpx.post(url + "&include_samples=true", json=body, timeout=60)
    assert "include_samples" in problem(refused, 413)


def test_what_waits_to_be_decoded_is_limited(checkpoints):
    settings = Settings(checkpoints=checkpoints, max_queue=3, default_model="digits-mlp")
    inference = Inference(settings)
    gate = threading.Event()

    def work():
        yield 0
        gate.wait(10)
        return "read"

    async def main():
        waiting = [asyncio.create_task(inference.decode(work())) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await inference.decode(work())
        gate.set()
        await asyncio.gather(*waiting)
        assert await inference.decode(work()) == "read"

    asyncio.run(main())
    inference.close()


@pytest.mark.parametrize("error", [InvalidRequest("damaged"), MemoryError()], ids=repr)
def test_an_image_that_cannot_be_decoded_fails_alone_in_its_batch(error, checkpoints):
    settings = Settings(checkpoints=checkpoints, default_model="digits-mlp")
    inference = Inference(settings)
    model = inference.store.find(None, None)
    sizes = []
    run = model.run

    def counted(task, requests, seeds):
        sizes.append(len(requests))
        return run(task, requests, seeds)

    model.run = counted
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 1, 8, 8), np.uint8)

    def damaged():
        raise error

    async def main():
        reads = [lambda: images[0], damaged, lambda: images[1], images[2]]
        return await asyncio.gather(
            *(inference.run(model, Predict(), read, 1) for read in reads), return_exceptions=True
        )

    first, failed, second, third = asyncio.run(main())
    assert sizes == [3]
    assert failed is error
    alone = finish(run(Predict(), list(images)))
    for got, expected in zip((first, second, third), alone, strict=True):
        np.testing.assert_array_equal(
            got["predictions"][0]["probabilities"], expected["predictions"][0]["probabilities"]
        )
    inference.close()


def test_default_requests_run_on_the_event_loop_whatever_the_defaults_are(classifier):
    """What was measured with the most samples holds for fewer, and no seed is special."""
    parsed = [read_options(kind, b"", 1000).task for kind in ("predict", "uncertainty")]
    asked = [*parsed, Uncertainty(samples=DEFAULT_SAMPLES - 1, level=0.5, masks="independent")]
    classifier.inline.update({Predict: 8, Uncertainty: 8})
    for task in asked:
        assert [_is_inline(_key(classifier, task), n) for n in (0, 1, 8, 9)] == [0, 1, 1, 0]
    long = Uncertainty(samples=DEFAULT_SAMPLES + 1)
    for task in (long, Stream(), Compare()):
        assert not _is_inline(_key(classifier, task), 1)


def test_requests_of_several_seeds_share_a_batch_and_are_answered_each_by_its_own(checkpoints):
    inference = Inference(Settings(checkpoints=checkpoints, default_model="digits-mlp"))
    model = inference.store.find()
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 1, 8, 8), np.uint8)
    tasks = [Uncertainty(samples=20, seed=seed) for seed in (5, 7, 5, 2**63 - 1, 0, 7)]
    batches = []
    inference.metrics = SimpleNamespace(
        record_batch=lambda _task, images, _waits: batches.append(images),
        record_answers=lambda *_: None,
    )

    async def main():
        requests = zip(tasks, images, strict=True)
        return await asyncio.gather(*(inference.run(model, t, x, 1) for t, x in requests))

    answers = asyncio.run(main())
    inference.close()
    assert sorted(batches) == [1, 5]  # the default seed, whose masks are drawn already, is alone
    for task, image, answer in zip(tasks, images, answers, strict=True):
        (alone,) = finish(model.run(task, [image]))
        for name in ("mean", "variance"):
            found, expected = (a["predictions"][0][name] for a in (answer, alone))
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_seeds_whose_clients_have_left_are_not_run():
    ran = []

    class Recorder:
        def run(self, task, pixels, seeds):
            ran.extend(seeds or [task.seed])
            yield
            return [{"n": len(one)} for one in pixels]

    def steps():
        answers.extend((yield from _answers(Recorder(), requests)))

    answers, pixels = [], np.zeros((1, 1, 8, 8), np.uint8)
    requests = [(Uncertainty(seed=seed), pixels) if seed != 2 else None for seed in (3, 2, 1, 3)]
    list(steps())
    assert ran == [1, 3, 3]
    assert answers == [{"n": 1}, None, {"n": 1}, {"n": 1}]


def test_a_batch_has_four_seeds_at_most():
    fits = _fits(None)
    seeds = [5, 6, 5, 7, 6, 8, 8, 9]
    assert [fits((Uncertainty(seed=seed), None)) for seed in seeds] == [True] * 7 + [False]
