"""Every path and every way of the folded one: the same figures, for any small architecture."""

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from models.dropout import InvertedDropout, SpatialDropout
from models.errors import UnsupportedModule
from models.montecarlo import MASK_KINDS, Sampler
from models.montecarlo.masks import draw
from models.sequential import lay_out, streamline

RATES = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.8, 0.95])
WIDTHS = st.integers(1, 12)
ACTIVATIONS = st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.Identity, nn.Softplus])
DROPOUTS = st.sampled_from([nn.Dropout, InvertedDropout])


class Residual(nn.Module):
    """A skip around a dropout: no sequence."""

    def __init__(self, width, p):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(p))

    def forward(self, x):
        return x + self.body(x)


@st.composite
def networks(draw):
    """Make a network in eval mode with a dropout at least, and say what its input looks like."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers, shape = [], (draw(WIDTHS),)
    if draw(st.booleans()):
        channels = draw(st.integers(1, 4))
        shape, width = (2, 6, 5), channels * 3 * 2
        layers += [nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [SpatialDropout(draw(RATES))] if draw(st.booleans()) else []
        layers += [nn.MaxPool2d(2), nn.Flatten()]
        layers[1].running_mean.normal_()
        layers[1].running_var.uniform_(0.5, 2)
    else:
        (width,) = shape
    if draw(st.booleans()):
        layers.append(draw(DROPOUTS)(draw(RATES)))
    for _ in range(draw(st.integers(1, 3))):
        out = draw(WIDTHS)
        layers += [nn.Linear(width, out, bias=draw(st.booleans())), draw(ACTIVATIONS)()]
        layers += [nn.BatchNorm1d(out)] if draw(st.integers(0, 4)) == 0 else []
        layers += [Residual(out, 0.3)] if draw(st.integers(0, 4)) == 0 else []
        layers.append(draw(DROPOUTS)(draw(RATES)))
        width = out
    layers += [nn.Dropout(0.4), nn.Linear(width, 3)]
    return nn.Sequential(*layers).eval(), shape


@settings(max_examples=60, deadline=None)
@given(
    networks(), st.integers(1, 70), st.integers(1, 130), st.integers(0, 2**63 - 1),
    st.sampled_from(MASK_KINDS),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Monte Carlo dropout runs one pass")
def test_all_paths_and_ways_agree(network, images, samples, seed, masks):
    module, shape = network
    x = torch.randn(images, *shape)
    try:
        sampler = Sampler(module, x)
    except UnsupportedModule:  # all units of a layer are dead: no mask changes anything
        reject()
    assert sampler.path == ("vmap" if any(isinstance(m, Residual) for m in module) else "folded")
    first = sampler.sample(x, samples, seed, masks)
    assert first.shape == (samples, images, 3)
    some = range(0, samples, 1 + samples // 4)
    for t in some:
        plain = sampler.thinned(x, seed, masks, t).softmax(-1)
        torch.testing.assert_close(first[t], plain, rtol=0, atol=1e-5)
    chosen = sampler._store.get(masks, seed, range(min(samples, 100)), x.device)
    with torch.inference_mode():
        if sampler._folded is not None:
            h = sampler._folded.prefix(x)
            for _, way in sampler._folded.ways(h, chosen):
                got = way(h, chosen).softmax(-1).transpose(0, 1)
                torch.testing.assert_close(got, first[:100], rtol=0, atol=1e-5)
    sampler.path = "vmap"
    torch.testing.assert_close(sampler.sample(x, samples, seed, masks), first, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(networks(), st.integers(1, 9))
def test_a_streamlined_network_computes_what_its_module_does(network, images):
    module, shape = network
    x = torch.randn(images, *shape)
    with torch.inference_mode():
        expected = module(x)
        for made in (streamline(module, x), streamline(lay_out(module), x), module):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", MASK_KINDS)
def test_every_way_computes_the_oracle(masks):
    torch.manual_seed(0)
    rates, widths = (0.2, 0.5), (40, 30)
    module = nn.Sequential(
        nn.Dropout(rates[0]), nn.Linear(40, 30), nn.ReLU(), nn.Dropout(rates[1]), nn.Linear(30, 4)
    ).eval()
    (w1, b1), (w2, b2) = (
        (m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in module[1::3]
    )
    x = torch.randn(37, 40).relu()
    sampler = Sampler(module, x)
    scales = sampler._store.get(masks, 5, range(43), x.device)
    keep = [draw(masks, 5, i, widths[i], rates[i], range(43)) for i in (0, 1)]
    h = x.double().numpy() * keep[0][:, None] / (1 - rates[0])
    h = np.maximum(h @ w1.T + b1, 0) * keep[1][:, None] / (1 - rates[1])
    with torch.inference_mode():
        ways = sampler._folded.ways(x, scales)
        assert len(ways) == 3
        for _, way in ways:
            np.testing.assert_allclose(
                way(x, scales).transpose(0, 1), h @ w2.T + b2, rtol=1e-4, atol=1e-5
            )


def test_a_part_of_the_pinned_masks_shares_what_was_cut_from_them():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    x = torch.randn(64, 50)
    sampler = Sampler(module, x)
    sampler.warm_up(x)
    whole = sampler.sample(x, 100)
    for samples in (20, 33, 99):
        part = sampler._store.get("stratified", 0, range(samples), x.device)
        assert part.whole.pinned
        assert part.whole.thinned.nbytes > 0
        torch.testing.assert_close(sampler.sample(x, samples), whole[:samples], rtol=0, atol=1e-6)


def test_a_repeated_request_gets_the_same_bits_whatever_came_between():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    x = torch.randn(40, 64)
    sampler = Sampler(module, x)
    sampler.warm_up(x)
    for seed in (0, 7):
        first = sampler.sample(x, 100, seed)
        for other in range(100, 140):
            sampler.sample(x[:3], 50, other)
        assert torch.equal(sampler.sample(x, 100, seed), first)


def test_masks_of_many_seeds_are_not_all_kept():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(2000, 200), nn.Linear(200, 3)).eval()
    x = torch.randn(1, 2000)
    sampler = Sampler(module, x)
    sampler.warm_up(x)
    for seed in range(1, 200):
        sampler.sample(x, 100, seed)
    kept = sampler._store._kept
    assert ("stratified", 0, 0, x.device) in kept
    assert 2 < len(kept) < 150
    assert sum(scales.nbytes for scales in kept.values()) < 2**27


def test_hooks_on_a_layer_are_run():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    module[1].register_forward_hook(lambda _m, _args, output: output * 3)
    x = torch.randn(5, 6)
    sampler = Sampler(module, x)
    got = sampler.sample(x, 12)
    for t in range(12):
        plain = sampler.thinned(x, 0, "stratified", t).softmax(-1)
        torch.testing.assert_close(got[t], plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(streamline(module, x)(x), module(x))
