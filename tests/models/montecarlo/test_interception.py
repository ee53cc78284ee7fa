"""What stands for attention, with every mask open, is PyTorch's attention without dropout."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.models.montecarlo.interception import Interception


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


@settings(max_examples=150)
@given(attentions())
def test_attention_with_all_kept_is_attention(arguments):
    tensors, given = arguments
    shapes = []

    def all_kept(kind, p, shape):
        shapes.append((kind, p, shape))
        return torch.ones(shape)

    with Interception(all_kept):
        got = F.scaled_dot_product_attention(*tensors, dropout_p=0.25, **given)
    expected = F.scaled_dot_product_attention(*tensors, **given)
    torch.testing.assert_close(got, expected)
    query, key, _ = tensors
    assert shapes == [("attention", 0.25, (*query.shape[:3], key.shape[2]))]
