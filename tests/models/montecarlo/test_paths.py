"""Every path and every kernel of the folded one: the same figures, for any small architecture."""

import copy
from itertools import count

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from dropserve.models.dropout import InvertedDropout, SpatialDropout
from dropserve.models.errors import UnsupportedModule
from dropserve.models.montecarlo import MASK_KINDS, Sampler
from dropserve.models.montecarlo.masks import draw
from dropserve.models.sequential import compile_for_inference, convert_memory_format

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
    """Make a network in eval mode with a dropout at least, and give the shape of its input."""
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


class Masked(nn.Module):
    """Takes the place of a dropout and multiplies by a mask drawn by hand."""

    def __init__(self, index, p, drawn):
        super().__init__()
        self.index, self.p, self.drawn, self.sample = index, p, drawn, 0

    def forward(self, x):
        shape = x.shape[1:] if x.dim() == 2 else (x.shape[1], 1, 1)
        units = torch.Size(shape).numel()
        seed, masks = self.drawn
        t = range(self.sample, self.sample + 1)
        keep = draw(masks, seed, self.index, units, self.p, t)
        return x * torch.from_numpy(keep).view(shape) / (1 - self.p)


def oracle(module, seed, masks):
    """Return what maps images and t to the logits of thinned network t, in float64."""
    by_hand, sites = copy.deepcopy(module).double(), count()
    for path, child in list(by_hand.named_modules()):  # in the order in which they are called
        if getattr(child, "p", 0) > 0:
            parent, _, name = path.rpartition(".")
            masked = Masked(next(sites), child.p, (seed, masks))
            setattr(by_hand.get_submodule(parent), name, masked)

    @torch.no_grad()
    def run(x, t):
        for child in by_hand.modules():
            if isinstance(child, Masked):
                child.sample = t
        return by_hand(x.double())

    return run


def test_the_oracle_without_a_dropout_is_the_module():
    module, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).eval(), torch.randn(2, 4)
    torch.testing.assert_close(oracle(module, 0, "stratified")(x, 0).float(), module(x))


@settings(max_examples=60, deadline=None)
@given(
    networks(), st.integers(1, 70), st.integers(1, 130), st.integers(0, 2**63 - 1),
    st.sampled_from(MASK_KINDS),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Monte Carlo dropout runs one pass")
def test_all_paths_and_kernels_agree_with_the_oracle(network, images, samples, seed, masks):
    module, shape = network
    by_hand = oracle(module, seed, masks)
    x = torch.randn(images, *shape)
    try:
        sampler = Sampler(module, x)
    except UnsupportedModule:  # all units of a layer are dead: no mask changes anything
        reject()
    assert sampler.path == ("vmap" if any(isinstance(m, Residual) for m in module) else "folded")
    first = sampler.sample(x, samples, seed, masks)
    assert first.shape == (samples, images, 3)
    for t in {*range(0, samples, 1 + samples // 4), samples - 1}:
        expected = by_hand(x, t).softmax(-1).float()
        torch.testing.assert_close(first[t], expected, rtol=0, atol=1e-5)
        plain = sampler.thinned(x, seed, masks, t).softmax(-1)
        torch.testing.assert_close(first[t], plain, rtol=0, atol=1e-5)
    for start in range(0, samples, 100):
        chunk = range(start, min(start + 100, samples))
        assert_kernels_give(first[start : start + 100], sampler, x, (masks, seed, chunk))
    for path, some in (("vmap", samples), ("loop", min(samples, 12))):
        sampler.path = path
        got = sampler.sample(x, some, seed, masks)
        torch.testing.assert_close(got, first[:some], rtol=0, atol=1e-5)


@torch.inference_mode()
def assert_kernels_give(expected, sampler, x, which):
    """Hold each kernel of the folded path, if that is the sampler's, against [t, B, C]."""
    if sampler._kernels[torch.float32] is None:
        return
    h, masks = sampler._kernels[torch.float32].prefix(x), sampler._store.get(*which, x.device)
    for _, kernel in sampler._kernels[torch.float32].choices(h, masks):
        got = kernel(h, masks).softmax(-1).transpose(0, 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


EDGES = {
    "two in a row": (nn.Linear(9, 9), nn.Dropout(0.5), nn.Dropout(0.2), nn.Linear(9, 3)),
    "two in a row, one at rate 0": (nn.Dropout(0.5), nn.Dropout(0.0), nn.Linear(9, 3)),
    "rate 0 behind a mask": (
        nn.Dropout(0.5), nn.Linear(9, 8), nn.Dropout(0.2), nn.Dropout(0.0), nn.Linear(8, 3),
    ),
    "after the last layer": (nn.Linear(9, 3), nn.Dropout(0.5)),
    "activation at the end": (nn.Dropout(0.5), nn.Linear(9, 3), nn.Sigmoid()),
    "activation behind a mask": (nn.Dropout(0.5), nn.Tanh(), nn.Linear(9, 3)),
    "in place": (
        nn.Dropout(0.5, inplace=True), nn.Linear(9, 9), nn.ELU(inplace=True), nn.Dropout(0.2),
        nn.LeakyReLU(inplace=True), nn.Linear(9, 3),
    ),
    "nothing but dropout": (nn.Dropout(0.5),),
    "p close to 0": (nn.Dropout(1e-9), nn.Linear(9, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
    "p close to 1": (nn.Dropout(0.5), nn.Linear(9, 8), nn.Dropout(0.999), nn.Linear(8, 3)),
    "both masks close to 1": (nn.Dropout(0.999), nn.Linear(9, 8), nn.ReLU(), nn.Dropout(0.99),
        nn.Linear(8, 3)),
    "nested": (nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(9, 8))), nn.Linear(8, 3)),
    "lazy": (nn.Dropout(0.5), nn.LazyLinear(4), nn.ReLU(), nn.Dropout(0.2), nn.LazyLinear(3)),
    "parametrized": (
        nn.Dropout(0.5), nn.utils.parametrizations.weight_norm(nn.Linear(9, 8)), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(8, 3),
    ),
    "softmax within": (nn.Dropout(0.5), nn.Linear(9, 8), nn.Softmax(1), nn.Linear(8, 3)),
    "group norm": (nn.Dropout(0.5), nn.Linear(9, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", EDGES)
def test_odd_sequences_are_folded_too(case):
    module, x = nn.Sequential(*EDGES[case]).eval(), torch.randn(70, 9)
    x[3], x[:, 4] = 0, 0
    before = x.clone()
    sampler = Sampler(module, torch.randn(2, 9))
    assert sampler.path == "folded"
    by_hand = oracle(module, 4, "stratified")
    expected = torch.stack([by_hand(x, t) for t in range(25)]).softmax(-1).float()
    for images in (70, 1):
        mine = expected[:, :images]
        assert_kernels_give(mine, sampler, x[:images], ("stratified", 4, range(25)))
        for path in ("folded", "vmap", "loop"):
            sampler.path = path
            got = sampler.sample(x[:images], 25, 4)
            torch.testing.assert_close(got, mine, rtol=0, atol=1e-5)
    assert torch.equal(x, before)


class Doubled(nn.Sequential):
    """A sequence that does more than its modules."""

    def forward(self, x):
        return 2 * super().forward(x)


def twice(layer, drop, again):
    return nn.Sequential(layer, nn.ReLU(), drop, layer, nn.ReLU(), again, nn.Linear(9, 3)).eval()


@pytest.mark.parametrize(
    ("module", "path"),
    [
        (twice(nn.Linear(9, 9), nn.Dropout(0.5), nn.Dropout(0.2)), "folded"),
        (twice(nn.Linear(9, 9), *[nn.Dropout(0.5)] * 2), "vmap"),
        (Doubled(nn.Linear(9, 9), nn.Dropout(0.5), nn.Linear(9, 3)).eval(), "vmap"),
        (nn.Sequential(nn.Dropout(0.5), Doubled(nn.Linear(9, 3))).eval(), "folded"),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(9, 3)).double().eval(), "vmap"),
    ],
    ids=["layer twice", "dropout twice", "subclass", "subclass within", "float64"],
)
def test_every_path_of_shared_and_strange_modules_is_a_forward_pass(module, path):
    x = torch.randn(5, 9).to(next(module.parameters()).dtype)
    sampler = Sampler(module, x)
    assert sampler.path == path
    plain = torch.stack([sampler.thinned(x, 6, "stratified", t).softmax(-1) for t in range(12)])
    for each in {path, "vmap", "loop"}:
        sampler.path = each
        torch.testing.assert_close(sampler.sample(x, 12, 6), plain.float(), rtol=0, atol=1e-6)


class Overwrite(nn.Module):
    """Adds to what it is given, in place."""

    def forward(self, x):
        return x.add_(1)


FIRST = {
    "custom": Overwrite,
    "subclass of a sequence": lambda: Doubled(nn.ELU(inplace=True)),
    "module": lambda: nn.LeakyReLU(inplace=True),
}


@pytest.mark.parametrize("first", FIRST)
def test_what_a_first_module_overwrites_is_no_image_of_the_caller(first):
    layers = FIRST[first](), nn.Linear(9, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    module, x = nn.Sequential(*layers).eval(), torch.randn(7, 9)
    before = x.clone()
    sampler = Sampler(module, x)
    assert sampler.path == "folded"
    assert torch.equal(sampler.sample(x, 12), sampler.sample(x, 12))
    made = compile_for_inference(module, x)
    assert made is not module
    assert torch.equal(x, before)
    torch.testing.assert_close(made(x.clone()), module(x.clone()))


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d(8, affine=False), (9,)), (nn.BatchNorm1d(5), (5, 9))]
)
def test_batch_normalisation_that_does_not_go_into_a_linear_layer_stays(norm, shape):
    layers = nn.Linear(9, 8), norm, nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(3)
    module, x = nn.Sequential(*layers).eval(), torch.randn(4, *shape)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    module(x)
    assert_folded_as_plain_passes(module, x)


def assert_folded_as_plain_passes(module, x):
    sampler = Sampler(module, x)
    assert sampler.path == "folded"
    got = sampler.sample(x, 12)
    for t in range(12):
        plain = sampler.thinned(x, 0, "stratified", t).softmax(-1)
        torch.testing.assert_close(got[t], plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(compile_for_inference(module, x)(x), module(x))


@pytest.mark.parametrize("images", [1, 3])
def test_an_image_in_which_nothing_is_active_has_an_answer(images):
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    black = torch.zeros(images, 256)
    sampler = Sampler(module.eval(), torch.randn(2, 256))
    masks = sampler._store.draw("stratified", 0, range(9), black.device)
    assert len(sampler._kernels[torch.float32].choices(black, masks)) == 3
    sampler.warm_up(black[:1])
    got = sampler.sample(black, 100)
    expected = module(black).softmax(-1).detach().expand_as(got)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert_kernels_give(expected, sampler, black, ("stratified", 0, range(100)))


@settings(max_examples=30, deadline=None)
@given(networks(), st.integers(1, 9))
def test_a_streamlined_network_computes_what_its_module_does(network, images):
    module, shape = network
    x = torch.randn(images, *shape)
    with torch.inference_mode():
        expected = module(x)
        for made in (
            compile_for_inference(module, x),
            compile_for_inference(convert_memory_format(module), x),
            module,
        ):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


def test_the_first_of_the_pinned_masks_share_the_networks_gathered_for_all():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    x = torch.randn(64, 50)
    sampler = Sampler(module, x)
    sampler.warm_up(x)
    whole = sampler.sample(x, 100)
    for samples in (20, 33, 99):
        part = sampler._store.get("stratified", 0, range(samples), x.device)
        assert part.parent.pinned
        assert len(part.parent.thinned) == 5
        assert part.thinned == []
        torch.testing.assert_close(sampler.sample(x, samples), whole[:samples], rtol=0, atol=1e-6)


def test_a_repeated_request_gets_the_same_bits_whatever_came_between():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    x = torch.randn(40, 64)
    sampler = Sampler(module, x)
    sampler.warm_up(x)
    for seed in (0, 7):
        first = sampler.sample(x, 100, seed)
        part = sampler.sample(x, 13, seed)
        for other in range(100, 140):
            sampler.sample(x[:3], 50, other)
        assert torch.equal(sampler.sample(x, 13, seed), part)
        assert torch.equal(sampler.sample(x, 100, seed), first)


def test_a_request_for_more_samples_changes_no_bits_of_one_for_fewer():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 3))
    x = torch.randn(400, 800)
    sampler = Sampler(module.eval(), x)
    first = sampler.sample(x, 20, 7)
    sampler.sample(x, 100, 7)
    assert torch.equal(sampler.sample(x, 20, 7), first)


def test_what_a_hook_sees_or_gives_is_not_overwritten():
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
    seen, mine = [], torch.randn(1, 5)
    before = mine.clone()
    module[0].register_forward_hook(lambda _m, _args, output: seen.append(output))
    module[0].register_forward_hook(lambda _m, _args, output: mine.expand(output.shape))
    Sampler(module, torch.randn(4, 6)).sample(torch.randn(4, 6), 5)
    assert min(output.min() for output in seen) < 0
    assert torch.equal(mine, before)


class Largest(nn.Module):
    """Notes how large a tensor ever came through."""

    largest = 0

    def forward(self, x):
        self.largest = max(self.largest, x.numel())
        return x


@pytest.mark.parametrize("images", [80, 1100])
def test_a_head_that_widens_is_run_a_few_samples_at_a_time(images):
    noted = Largest().eval()
    module = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(4, 1024), noted, nn.Dropout(0.2), nn.Linear(1024, 3)
    ).eval()
    x = torch.randn(images, 4)
    sampler = Sampler(module, x)
    assert sampler.path == "folded"
    got = sampler.sample(x, 23)
    assert images * 1024 <= noted.largest <= max(2**20, images * 1024)
    by_hand = oracle(module, 0, "stratified")
    expected = torch.stack([by_hand(x, t) for t in range(23)]).softmax(-1).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_hooks_on_a_layer_are_run():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    module[1].register_forward_hook(lambda _m, _args, output: output * 3)
    assert_folded_as_plain_passes(module, torch.randn(5, 6))
