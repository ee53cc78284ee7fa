"""On a GPU: answers are those of a CPU, and a batch is one copy in and one out.

The GPU is a pretended one (`simulated_gpu.py`), and a real one where PyTorch finds it.
"""

import asyncio
import copy
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import partial

import httpx
import numpy as np
import pytest
import torch
from torch import nn

from dropserve.models.device import find_device, to_cpu, to_device
from dropserve.models.errors import ConfigError
from dropserve.models.montecarlo import Sampler, Statistics
from dropserve.models.networks import NetworkConfig
from dropserve.models.regularizers import METHODS, with_moment_matching
from dropserve.service.inference.classifier import (
    Classifier,
    Compare,
    Predict,
    Stream,
    Uncertainty,
)
from dropserve.service.inference.decoder import finish
from dropserve.service.inference.inference import Inference, only_to_check
from dropserve.service.settings import Settings
from tests.helpers import zero
from tests.simulated_gpu import GPU, simulated_gpu

HAS_GPU = torch.cuda.is_available()
ON_GPU = pytest.mark.skipif(not HAS_GPU, reason="PyTorch finds no GPU here")
SIMULATED = pytest.mark.skipif(HAS_GPU, reason="there is a real GPU")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Of float32 on two devices, whose sums have other orders: 1e-4 of a probability at most."""
SHAPE = (1, 8, 8)
IN, OUT = "in, not waited for", "out"


SMALL = {
    "mlp": {"hidden": (16, 8)},
    "cnn": {"hidden": (16,), "channels": (4,)},
    "gru": {"hidden": (12,)},
    "wrn": {"hidden": (), "channels": (4, 6)},
    "vit": {"hidden": (8,), "stochastic_depth": 0.1},
}


@contextmanager
def real_gpu():
    yield None  # which counts nothing


@pytest.fixture(
    params=[
        pytest.param(simulated_gpu, marks=SIMULATED, id="simulated"),
        pytest.param(real_gpu, marks=ON_GPU, id="real"),
    ]
)
def gpu(request):
    with request.param() as counts:
        yield counts


class Branching(nn.Module):
    """Cannot be vectorised: which way it takes depends on numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, x):
        h = nn.functional.dropout(x.flatten(1), 0.5, self.training)
        return self.linear(h) if h.abs().sum() >= 0 else h


def network(kind, regularizer):
    on_weights = kind == "gru" and regularizer == "dropconnect"
    options = SMALL[kind] | ({"mask_scope": "batch"} if on_weights else {})
    return NetworkConfig(kind, SHAPE, 5, dropout=(0.4,), regularizer=regularizer, **options).build()


def _modules():
    """Yield every network with every method, the kernels and paths first, the others slow."""
    quick = {("mlp", "dropout"), ("mlp", "noise"), ("mlp", "dropconnect"), ("cnn", "gaussian")}
    quick |= {("gru", "zoneout"), ("vit", "dropout")}
    for name, method in METHODS.items():
        for kind in method.networks:
            marks = () if (kind, name) in quick else pytest.mark.slow
            yield pytest.param(partial(network, kind, name), marks=marks, id=f"{kind}, {name}")
    drawn = lambda: with_moment_matching(network("mlp", "dropconnect"))  # noqa: E731
    yield pytest.param(drawn, id="moment matching")
    yield pytest.param(Branching, id="loop")


@pytest.mark.parametrize("make", [*_modules()])
def test_every_path_gives_the_figures_of_a_cpu_and_copies_them_once(make, gpu):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, images = make().eval().requires_grad_(False), torch.randn(3, *SHAPE)
    of_cpu, device = Sampler(module, images), find_device("cuda")
    x = images.to(device)
    sampler = Sampler(copy.deepcopy(module).to(device), x)
    assert (sampler.path, sampler.sites) == (of_cpu.path, of_cpu.sites)
    sampler.warm_up(x, 20)
    for seed, masks in ((0, 0), (7, 1), (7, 0)):
        _clear(gpu)
        got, expected = sampler.summarize(x, 20, seed), of_cpu.summarize(images, 20, seed)
        if isinstance(module, Branching):
            gpu is None or gpu.pop("waits for a number")  # its own
        _assert_counts(gpu, {IN: masks, OUT: 1})
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(got, name), value, **CLOSE)


def test_chunks_and_ties_add_up_as_on_a_cpu(gpu):
    device, rng = find_device("cuda"), np.random.default_rng(0)
    p = torch.from_numpy(rng.dirichlet(np.ones(4), (3, 257)).astype(np.float32).round(1))
    chunks = torch.split(p.permute(2, 0, 1), 100, dim=2)  # [C, B, t], rounded: many are equal
    there, here = (Statistics(257, "stratified", 0.8) for _ in range(2))
    for chunk in chunks:
        there.add(chunk.to(device))
        here.add(chunk)
    _clear(gpu)
    got, expected = there.summary(), here.summary()
    _assert_counts(gpu, {OUT: 1})
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, name), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["digits-mlp", pytest.param("colour-cnn", marks=pytest.mark.slow)])
def test_a_version_answers_every_task_as_on_a_cpu(name, gpu, checkpoints):
    path = checkpoints / name / "1"
    there, here = (Classifier(name, 1, path, device=find_device(d)) for d in ("cuda", "cpu"))
    assert there.device.startswith("cuda (")
    assert set(there.inline.values()) == {0}
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, 256, (n, *here.preprocessing.shape), np.uint8) for n in (2, 1)]
    tasks = {
        Predict(): {IN: 1, OUT: 1},
        Uncertainty(samples=100): {IN: 1, OUT: 1},
        Uncertainty(samples=250): {IN: 3, OUT: 1, "events": 2, "waits for an event": 1},
        Uncertainty(samples=20, include_samples=True): {IN: 1, OUT: 2},
        Compare(passes=2): {IN: 6, OUT: 2, "events": 8, "waits for an event": 6},
    }
    for each, counts in tasks.items():
        _clear(gpu)
        got = finish(there.run(each, requests))
        _assert_counts(gpu, counts)
        _assert_close(got, finish(here.run(each, requests)))
    _clear(gpu)
    streamed = [*there.stream(Stream(samples=120, seed=77), requests[1])]
    _assert_counts(gpu, {IN: 3, OUT: 3})  # eval mode, and two chunks with their masks
    _assert_close(streamed, [*here.stream(Stream(samples=120, seed=77), requests[1])])


@pytest.mark.usefixtures("gpu")
def test_requests_of_several_seeds_get_their_own_masks_on_a_gpu_too(checkpoints):
    path = checkpoints / "digits-mlp" / "1"
    there, here = (Classifier("m", 1, path, device=find_device(d)) for d in ("cuda", "cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 1, 8, 8), np.uint8)
    (got, expected) = (
        finish(each.run(Uncertainty(samples=20), [*pixels], [5, 5, 9])) for each in (there, here)
    )
    _assert_close(got, expected)


def test_several_tensors_are_copied_as_one_whatever_their_types(gpu):
    device = find_device("cuda")
    sent = [
        torch.tensor([[True, False], [True, True]]).t(), torch.arange(3, dtype=torch.uint8),
        torch.randn(2, 3, dtype=torch.float64), torch.tensor(1.5), torch.empty(0, 4),
    ]  # fmt: skip
    _clear(gpu)
    there = to_device(sent, device)
    assert {tensor.device for tensor in there} == {device}
    for got, expected in zip(to_cpu(there), sent, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    _assert_counts(gpu, {IN: 1, OUT: 1})
    assert to_cpu(sent)[0] is sent[0]


@SIMULATED
def test_the_simulated_gpu_shows_mixed_devices_and_every_copy(gpu):
    x = torch.ones(2, 3).to(GPU)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(3)
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()
    _clear(gpu)
    assert x.sum().item() == 6
    assert x.cpu().sum() == 6
    x.copy_(torch.zeros(2, 3))
    x.to(GPU)
    assert x.sum().item() == 0
    _assert_counts(gpu, {"in": 1, OUT: 1, "waits for a number": 2})


@SIMULATED
def test_a_gpu_that_is_missing_is_an_error_that_says_what_to_do(checkpoints):
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="built for CPUs alone: install a CUDA build"):
        find_device("cuda")
    settings = Settings(checkpoints=checkpoints, device="cuda")
    for start in (Inference, only_to_check):  # of one process, and of several
        with pytest.raises(ConfigError, match="no GPU for the device cuda"):
            start(settings)
    assert only_to_check(Settings(workers=2)).device == "cpu"


def test_a_gpu_without_memory_for_a_batch_answers_what_fits_in_halves(checkpoints):
    inference = Inference(Settings(checkpoints=checkpoints, default_model="digits-mlp"))
    model = inference.store.find()
    run, sizes, held = model.run, [], []

    def with_little_memory(task, requests, seeds):
        sizes.append(len(requests))
        batch = torch.ones(len(requests))
        held.append(weakref.ref(batch))
        if len(requests) > 1 or requests[0].any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(task, requests, seeds)

    model.run = with_little_memory
    pixels = np.zeros((4, 1, 1, 8, 8), np.uint8)
    pixels[3] = 1

    async def main():
        asked = (inference.run(model, Predict(), each, 1) for each in pixels)
        return await asyncio.gather(*asked, return_exceptions=True)

    *answered, refused = asyncio.run(main())
    inference.close()
    assert sizes == [4, 2, 2, 1, 1, 1, 1]
    assert [answer["predictions"][0]["index"] for answer in answered]
    assert isinstance(refused, MemoryError)  # which is answered 503
    assert not any(ref() is not None for ref in held[:3]), "the failed batches hold their tensors"


@pytest.mark.parametrize("fault", ["illegal memory access", None])
def test_a_gpu_that_has_failed_stops_the_process_and_another_error_does_not(
    fault, checkpoints, monkeypatch
):
    def synchronize():
        if fault:
            raise RuntimeError(f"CUDA error: {fault}\nmore of it")

    def run(*_):
        raise RuntimeError("CUDA error")

    inference = Inference(Settings(checkpoints=checkpoints, default_model="digits-mlp"))
    model = inference.store.find()
    model.run = run
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError):
        asyncio.run(inference.run(model, Predict(), np.zeros((1, 1, 8, 8), np.uint8), 1))
    failure = f"the GPU has failed: CUDA error: {fault}" if fault else None
    assert inference.stalled() == failure  # which the watchdog and /readyz read
    inference.close()


@ON_GPU
def test_a_server_on_a_gpu_answers_as_one_on_a_cpu(make_server):
    answers = []
    for device in ("cuda", "cpu"):
        server = make_server(device=device).start()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            details = client.get("/v1/models/digits-mlp").json()
            assert details["device"].startswith(device)
            paths = ("/predict", "/uncertainty?seed=5&samples=250", "/compare")
            answers.append([client.post(path, **zero()).json() for path in paths])
    _assert_close(*answers)


def _clear(counts):
    if counts is not None:
        counts.clear()


def _assert_counts(counts, expected):
    if counts is not None:
        assert +counts == +Counter(expected)


def _assert_close(got, expected, where=""):
    """Hold answers against others: numbers to rounding, all else equal."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            if key not in ("version", "model", "request_id"):
                _assert_close(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), where
        for i, value in enumerate(expected):
            _assert_close(got[i], value, f"{where}[{i}]")
    elif isinstance(expected, float | np.floating | np.ndarray):
        np.testing.assert_allclose(got, expected, **CLOSE, err_msg=where)
    else:
        assert got == expected, where
