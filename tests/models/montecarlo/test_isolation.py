"""Sampling leaves the module, and everybody else who uses it, alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from dropserve.models.errors import SamplingError
from dropserve.models.montecarlo import Sampler
from dropserve.models.networks import NetworkConfig

CNN = NetworkConfig("cnn", (1, 8, 8), 5, (16,), (0.3,), (4, 6), 0.2)


def network():
    """Return a CNN whose batch norms have seen data, in eval mode."""
    module = CNN.build()
    for _ in range(3):
        module(torch.randn(16, 1, 8, 8) * 3 + 1)
    return module.eval()


@pytest.mark.parametrize("path", ["folded", "vmap", "loop"])
def test_sampling_leaves_flags_buffers_parameters_and_hooks_as_they_are(path):
    module, x = network(), torch.randn(9, 1, 8, 8)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    sampler = Sampler(module, x)
    sampler.path = path
    assert sampler.sample(x, 12).std(0).max() > 1e-3
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert int(after["norm1.num_batches_tracked"]) == 3
    assert not any(m.training for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    for m in (*module.modules(), *sampler.training_copy.modules()):
        assert not m._forward_hooks
        assert not m._forward_pre_hooks


def test_a_profile_function_is_put_back():
    def mine(*_):
        pass

    sys.setprofile(mine)
    try:
        Sampler(network(), torch.randn(2, 1, 8, 8))
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)


def test_batch_norm_uses_its_running_statistics_while_sampling():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    module(torch.randn(50, 4) * 2 + 3)
    module.eval()
    x = torch.randn(6, 4)
    sampler = Sampler(module, x)
    with torch.no_grad():
        normed = module[0](x)
    for t in range(5):
        logits = sampler.thinned(x, 0, "independent", t)
        assert ((logits == 0) | torch.isclose(logits, 2 * normed)).all()


def test_sampling_draws_nothing_from_the_global_generator():
    module, x = network(), torch.randn(2, 1, 8, 8)
    before = torch.random.get_rng_state()
    Sampler(module, x).sample(x, 5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("path", ["folded", "vmap", "loop"])
def test_an_eval_prediction_in_another_thread_stays_bit_for_bit_what_it_was(path):
    module, x = network(), torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        alone = module(x)
    sampler = Sampler(module, x)
    sampler.path = path
    expected = sampler.sample(x, 10)
    done, samples = threading.Event(), []

    def sample_on_and_on():
        while not done.is_set():
            samples.append(sampler.sample(x, 10))

    thread = threading.Thread(target=sample_on_and_on)
    thread.start()
    try:
        predictions = []
        while len(predictions) < 100 or len(samples) < 5:
            with torch.inference_mode():
                predictions.append(module(x))
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(p, alone) for p in predictions)
    assert all(torch.equal(s, expected) for s in samples)


@pytest.mark.parametrize("path", ["folded", "vmap", "loop"])
def test_two_threads_sample_at_once_each_with_its_own_masks(path):
    module, x = network(), torch.randn(4, 1, 8, 8)
    sampler = Sampler(module, x)
    sampler.path = path
    expected = [sampler.sample(x, 10, seed) for seed in range(4)]

    def sample(seed):
        return [sampler.sample(x, 10, seed) for _ in range(8)]

    with ThreadPoolExecutor(4) as threads:
        for seed, got in enumerate(threads.map(sample, range(4))):
            assert all(torch.equal(one, expected[seed]) for one in got)
    assert not torch.equal(expected[0], expected[1])


def test_two_threads_may_cut_the_same_thinned_networks():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3))
    x = torch.randn(200, 300)
    expected = Sampler(module.eval(), x).sample(x, 100, 1)
    for _ in range(5):
        sampler, start = Sampler(module, x), threading.Barrier(4)

        def sample(_, sampler=sampler, start=start):
            start.wait()
            return sampler.sample(x, 100, 1)

        with ThreadPoolExecutor(4) as threads:
            samples = list(threads.map(sample, range(4)))
        for got in (*samples, sampler.sample(x, 100, 1)):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Monte Carlo dropout runs one pass")
def test_a_module_that_changes_its_input_sees_the_same_images_in_every_sample():
    def build(inplace):
        torch.manual_seed(1)
        first = nn.LeakyReLU(0.5, inplace=inplace)
        return nn.Sequential(first, nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval()

    x = torch.randn(4, 6)
    expected = Sampler(build(inplace=False), x).sample(x, 12)
    got = Sampler(build(inplace=True), x.clone()).sample(x.clone(), 12)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_gradients_need_not_be_off_where_the_sampler_is_used():
    module, x = network(), torch.randn(2, 1, 8, 8, requires_grad=True)
    assert not Sampler(module, x).sample(x, 3).requires_grad


def test_a_module_in_training_mode_is_refused():
    module = replace(CNN, spatial_dropout=0.0).build().eval()
    module.norm2.train()
    with pytest.raises(SamplingError, match=r"training mode: call module\.eval\(\) first"):
        Sampler(module, torch.randn(1, 1, 8, 8))


def test_a_module_put_into_training_mode_afterwards_is_refused():
    module, x = network(), torch.randn(4, 1, 8, 8)
    sampler = Sampler(module, x)
    module.train()
    with pytest.raises(SamplingError, match=r"training mode: call module\.eval\(\) first"):
        sampler.sample(x, 2)
