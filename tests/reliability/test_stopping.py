"""A drain that ends while requests are still being decoded."""

import asyncio

import pytest

from dropserve.service.errors import Overloaded
from dropserve.service.inference.classifier import Predict, Stream
from dropserve.service.inference.inference import Inference
from dropserve.service.settings import Settings


def test_what_comes_to_the_threads_after_their_end_is_refused_as_draining(checkpoints):
    """Between two steps of decoding, too: the next one finds the threads stopped."""

    def steps(close):
        yield 0
        if close:
            inference.close()
        yield 2**30
        return None

    async def main():
        model = inference.store.find("digits-mlp")
        for work in (
            inference.decode(steps(close=True)),
            inference.decode(steps(close=False)),
            inference.run(model, Predict(), lambda: None, 1),
            anext(inference.stream(model, Stream(), lambda: None)),
        ):
            with pytest.raises(Overloaded) as refused:
                await work
            assert refused.value.reason == "draining"

    inference = Inference(Settings(checkpoints=checkpoints, max_pixels=10**6))
    asyncio.run(main())
    assert inference.stalled() is None


def test_a_dead_inference_thread_is_told(checkpoints):
    inference = Inference(Settings(checkpoints=checkpoints))
    assert inference.stalled() is None
    inference._worker.shutdown(wait=True)  # a thread ends by itself in no other way
    assert inference.stalled() == "the inference thread is dead"
    inference.close()
