"""What stands for functions of PyTorch's is what they are, with the given masks."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.models.montecarlo.interception import Interception
from dropserve.models.regularizers import Bernoulli


@st.composite
def attentions(draw):
    """Make arguments of `F.scaled_dot_product_attention`, all but the rate."""
    queries, keys, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    groups = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    query, key, value = (
        torch.randn(2, h, rows, 4, generator=generator)
        for h, rows in ((heads * groups, queries), (heads, keys), (heads, keys))
    )
    mask = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    given = {"enable_gqa": True} if groups > 1 else {}
    given["scale"] = draw(st.sampled_from([None, 0.3]))
    if mask == "causal":
        given["is_causal"] = True
    elif mask == "bool":  # a row of it may be closed altogether
        given["attn_mask"] = torch.rand(queries, keys, generator=generator) < 0.6
    elif mask == "float":
        given["attn_mask"] = torch.randn(queries, keys, generator=generator)
    return (query, key, value), given


def oracle(query, key, value, keep, attn_mask=None, is_causal=False, scale=None, **_):
    """Attention in NumPy, one query at a time; `keep` multiplies its weights."""
    query, key, value, keep = (t.double().numpy() for t in (query, key, value, keep))
    result = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, h, i in np.ndindex(query.shape[:3]):
        shared = h * key.shape[1] // query.shape[1]
        scores = key[b, shared] @ query[b, h, i] * (0.5 if scale is None else scale)
        if is_causal:
            scores[i + 1 :] = -np.inf
        elif attn_mask is not None:
            row = attn_mask[i].numpy()
            scores = np.where(row, scores, -np.inf) if row.dtype == bool else scores + row
        if scores.max() > -np.inf:
            weights = np.exp(scores - scores.max())
            result[b, h, i] = weights / weights.sum() * keep[b, h, i] @ value[b, shared]
    return torch.from_numpy(result).float()


@settings(max_examples=150)
@given(attentions(), st.sampled_from([0.0, 0.25]))
def test_attention_is_the_oracles_under_a_mask_and_without_dropout(arguments, p):
    tensors, given = arguments
    query, key, _ = tensors
    shape = (*query.shape[:3], key.shape[2])
    keep = (torch.rand(shape) < 0.75) / 0.75 if p else torch.ones(shape)
    calls, rate = [], {"dropout_p": p} if p else {}
    with Interception(lambda *call: calls.append(call) or keep):
        got = F.scaled_dot_product_attention(*tensors, **rate, **given)
    torch.testing.assert_close(got, oracle(*tensors, keep, **given))
    assert calls == ([(Bernoulli("attention", p), shape)] if p else [])
    if "enable_gqa" not in given:
        with Interception(lambda *_: keep[0, 0]):  # one head alone, as matrices
            alone = F.scaled_dot_product_attention(
                *(t[0, 0] for t in tensors), dropout_p=p, **given
            )
        torch.testing.assert_close(alone, got[0, 0])


def test_bernoulli_asks_for_the_mask_of_a_rate_and_is_its_mean_where_there_is_none():
    for arguments, keep in (((), 0.5), ((0.75,), 0.75), ((torch.tensor(0.75),), 0.75), ((1,), 1)):
        calls = []
        with Interception(lambda *call, calls=calls: calls.append(call)):
            got = torch.zeros(2, 3).bernoulli_(*arguments)
        assert torch.equal(got, torch.full((2, 3), keep))
        law = Bernoulli("bernoulli", 1 - keep, rescaled=False, adjustable=False)
        assert calls == ([(law, (2, 3))] if keep < 1 else [])
