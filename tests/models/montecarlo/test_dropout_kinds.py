"""Every kind of dropout: the values under a mask are the exact ones, on every path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropserve.models.dropout import InvertedDropout, SpatialDropout, VanillaDropout
from dropserve.models.montecarlo import MASK_KINDS, Sampler
from dropserve.models.montecarlo.masks import draw

P = 0.3
T = 12
ALPHA = 1.7580993408473766  # Klambauer et al. (2017): SELU's scale times alpha


class Functional(nn.Module):
    """Calls `F.dropout` in its own forward, as the mode says."""

    def forward(self, x):
        return F.dropout(x, P, self.training)


class Skip(nn.Module):
    """A residual connection around a dropout."""

    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        dropped = self.drop(x)
        return x + dropped


class Twice(nn.Module):
    """Uses one dropout module two times."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(P)

    def forward(self, x):
        return self.drop(self.drop(x))


class InPlace(nn.Module):
    """Drops in place, and goes on with the tensor that it gave and not with what came back."""

    def forward(self, x):
        F.dropout(x, P, self.training, inplace=True)
        return x


class Uniform(nn.Module):
    """Draws a mask of whole rows as older releases of timm do, and Hugging Face's networks."""

    def forward(self, x):
        if not self.training:
            return x
        mask = (1 - P) + torch.rand((len(x), 1, 1, 1), dtype=x.dtype, device=x.device)
        mask.floor_()
        return x.div(1 - P) * mask


class Drawn(nn.Module):
    """Draws a mask of its own by `bernoulli_`, in train mode alone."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape  # of the mask, given that of a batch

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(self.shape(x)).bernoulli_(1 - P).div_(1 - P)


def inverted(x, keep):
    return x * keep / (1 - P)


def alpha(x, keep):
    """Drop to -ALPHA, then scale and shift to the old mean and variance."""
    a = ((1 - P) * (1 + P * ALPHA**2)) ** -0.5
    return a * torch.where(keep, x, torch.full_like(x, -ALPHA)) + a * ALPHA * P


ROWS, PIXELS = (6,), (6, 2, 3)
CASES = {
    "root": (nn.Dropout(P), ROWS, ROWS, inverted),
    "in place": (nn.Dropout(P, inplace=True), ROWS, ROWS, inverted),
    "on pixels": (nn.Dropout(P), PIXELS, PIXELS, inverted),
    "1d": (nn.Dropout1d(P), (6, 3), (6, 1), inverted),
    "2d": (nn.Dropout2d(P), PIXELS, (6, 1, 1), inverted),
    "2d in place": (nn.Dropout2d(P, inplace=True), PIXELS, (6, 1, 1), inverted),
    "3d": (nn.Dropout3d(P), (6, 2, 1, 2), (6, 1, 1, 1), inverted),
    "alpha": (nn.AlphaDropout(P), ROWS, ROWS, alpha),
    "feature alpha": (nn.FeatureAlphaDropout(P), PIXELS, (6, 1, 1), alpha),
    "functional": (Functional(), ROWS, ROWS, inverted),
    "skip": (Skip(nn.Dropout(P)), ROWS, ROWS, lambda x, keep: x + inverted(x, keep)),
    "inverted": (InvertedDropout(P), ROWS, ROWS, inverted),
    "vanilla": (VanillaDropout(P), ROWS, ROWS, lambda x, keep: x * keep),
    "spatial": (SpatialDropout(P), PIXELS, (6, 1, 1), inverted),
    "in place, not returned": (InPlace(), ROWS, ROWS, inverted),
    "in place, before a skip": (
        nn.Sequential(Skip(nn.Dropout(P, inplace=True))),
        ROWS,
        ROWS,
        lambda x, k: 2 * inverted(x, k),
    ),
    "uniform": (Uniform(), PIXELS, (1, 1, 1), inverted),
    "unbatched": (nn.Dropout1d(P), ROWS, (), inverted),
    "drawn": (Drawn(lambda x: x.shape), ROWS, ROWS, inverted),
    "by row": (Drawn(lambda x: (len(x), 1, 1, 1)), PIXELS, (1, 1, 1), inverted),
    "by batch": (Drawn(lambda x: (1,) * x.dim()), PIXELS, (1, 1, 1, 1), inverted),
}


def kept(masks, site, shape):
    """Draw the masks of T samples: [T, *shape], True where a unit is kept."""
    units = torch.Size(shape).numel()
    return torch.from_numpy(draw(masks, 8, site, units, P, range(T))).view(T, *shape)


def assert_samples(module, x, masks, expected, atol=1e-6, spread=0.01):
    """Hold every path, and one thinned network at a time, against the logits expected."""
    sampler = Sampler(module, x)
    before = x.clone()
    assert sampler.path != "loop"
    for path in {sampler.path, "vmap", "loop"}:
        sampler.path = path
        got = sampler.sample(x, T, 8, masks)
        torch.testing.assert_close(got, expected.softmax(-1), rtol=0, atol=atol)
        assert got.std(0).max() > spread, "samples must differ"
    for t in range(T):
        torch.testing.assert_close(sampler.thinned(x, 8, masks, t), expected[t])
    assert torch.equal(x, before)


@pytest.mark.parametrize("masks", MASK_KINDS)
@pytest.mark.parametrize("case", CASES)
def test_a_masked_forward_pass_has_the_exact_values(case, masks):
    drop, shape, mask_shape, masked = CASES[case]
    module = drop.eval() if shape == ROWS else nn.Sequential(drop, nn.Flatten()).eval()
    x = torch.randn(5, *shape)
    keep = kept(masks, 0, mask_shape)
    assert_samples(module, x, masks, torch.stack([masked(x, k).flatten(1) for k in keep]))


def test_a_module_used_twice_is_two_sites_with_masks_of_their_own():
    x = torch.randn(5, 6)
    first, second = kept("stratified", 0, ROWS), kept("stratified", 1, ROWS)
    assert not torch.equal(first, second)
    expected = torch.stack([x * a * b / (1 - P) ** 2 for a, b in zip(first, second, strict=True)])
    module = Twice().eval()
    assert_samples(module, x, "stratified", expected)
    assert [s.name for s in Sampler(module, x).sites] == ["drop", "drop[2]"]


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout_keeps_mean_0_and_variance_1(kind, p):
    x = torch.randn(20, 20_000)
    logits = Sampler(kind(p).eval(), x[:1]).thinned(x, 0, "independent", 0)
    assert logits.mean().abs() < 0.05
    assert logits.var().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "kind",
    [nn.Dropout, VanillaDropout, SpatialDropout, nn.AlphaDropout, nn.FeatureAlphaDropout],
)
def test_another_rate_is_that_of_a_module_made_with_it_but_for_alpha_dropout(kind):
    x = torch.randn(4, 500)
    p = P if "Alpha" in kind.__name__ else 0.6
    got = Sampler(kind(P).eval(), x).thinned(x, 8, "independent", 3, p=0.6)
    assert torch.equal(got, Sampler(kind(p).eval(), x).thinned(x, 8, "independent", 3))


def test_alpha_dropout_has_the_values_of_torchs_own():
    x = torch.randn(4, 500)
    torchs = F.alpha_dropout(x, P, training=True)
    keep = (torchs - alpha(x, torch.zeros(500, dtype=torch.bool))).abs() > 1e-5
    assert 0 < keep.float().mean() < 1
    torch.testing.assert_close(torchs, alpha(x, keep))


class Encoder(nn.Module):
    """A transformer encoder layer over images [B, L, E], averaged to logits [B, E]."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, P, batch_first=batch_first)

    def forward(self, x):
        if self.batch_first:
            return self.layer(x).mean(1)
        return self.layer(x.transpose(0, 1)).mean(0)


def attention(layer, x, keep):
    """Return multi-head self-attention of x [B, L, E] by hand; keep [B, heads, L, L]."""
    heads, size = layer.num_heads, x.shape[-1] // layer.num_heads
    q, k, v = (
        t.unflatten(-1, (heads, size)).transpose(1, 2)  # [B, heads, L, size]
        for t in F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    weights = (q @ k.transpose(-2, -1) / size**0.5).softmax(-1)
    return layer.out_proj((inverted(weights, keep) @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def encoder_by_hand(layer, x, keeps):
    """Run a post-norm encoder layer (Vaswani et al., 2017) with given masks: logits [B, E]."""
    x = layer.norm1(x + inverted(attention(layer.self_attn, x, keeps[0]), keeps[1]))
    hidden = inverted(layer.linear1(x).relu(), keeps[2])
    return layer.norm2(x + inverted(layer.linear2(hidden), keeps[3])).mean(1)


@pytest.mark.parametrize("masks", MASK_KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_layer_drops_at_its_four_sites(batch_first, masks):
    module, x = Encoder(batch_first).eval(), torch.randn(3, 5, 8)
    sites = Sampler(module, x).sites
    assert [(s.name, s.kind, s.shape) for s in sites] == [
        ("layer.self_attn:attention", "attention", (2, 5, 5)),
        ("layer.dropout1", "dropout", (5, 8)),
        ("layer.dropout", "dropout", (5, 16)),
        ("layer.dropout2", "dropout", (5, 8)),
    ]
    keeps = [kept(masks, i, s.shape) for i, s in enumerate(sites)]
    expected = [encoder_by_hand(module.layer, x, [k[t] for k in keeps]) for t in range(T)]
    assert_samples(module, x, masks, torch.stack(expected), atol=2e-6, spread=1e-3)


def test_attention_that_returns_its_weights_is_dropped_too():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, P, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=True)[0].mean(1)

    module, x = Attention().eval(), torch.randn(3, 5, 8)
    assert [(site.p, site.units) for site in Sampler(module, x).sites] == [(P, 2 * 5 * 5)]
    keep = kept("stratified", 0, (2, 5, 5))
    with torch.no_grad():
        expected = torch.stack([attention(module.attention, x, k).mean(1) for k in keep])
    assert_samples(module, x, "stratified", expected, atol=2e-6, spread=1e-3)
