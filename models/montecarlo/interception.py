"""Catches every dropout call of one forward pass, in one thread, and puts a given mask there.

Functional dropout, with `training=False` too, is caught like the modules; so are the dropout inside
attention and the masks of stochastic depth. Batch normalisation keeps to its running statistics.
"""

from collections.abc import Callable, Iterable, Mapping
from math import nan, sqrt
from types import FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.dropout import inverted_dropout, spatial_dropout, vanilla_dropout

Kind = Literal["dropout", "vanilla", "spatial", "alpha", "feature_alpha", "attention", "bernoulli"]
"""`bernoulli` is a mask that the network's own code draws by `Tensor.bernoulli_` and scales itself,
as stochastic depth does (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016)."""

ScaleFor = Callable[[Kind, float, torch.Size], Tensor | None]
"""`(kind, p, mask shape) -> what to multiply by`, zero where a unit is dropped; None: as eval mode
has it, without noise."""

ALPHA = 1.7580993408473766
"""SELU's scale times alpha: minus the value that alpha dropout sets dropped units to."""


class Interception(TorchFunctionMode):
    """Inside `with Interception(scale_for):` dropout multiplies by what `scale_for` returns.

    Attributes:
        widest: elements of the largest tensor that any call returned from the first dropout on:
            what comes before runs once, whatever the number of samples.
    """

    def __init__(self, scale_for: ScaleFor) -> None:
        super().__init__()
        self._scale_for = scale_for
        self._masked = False
        self.widest = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever the intercepted function returns
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention_forward(*args, **{**kwargs, "training": True})
        func = _REPLACED.get(func, func)
        dropout = _DROPOUTS.get(func)
        result = dropout(self._scale_for, *args, **kwargs) if dropout else func(*args, **kwargs)
        self._masked = self._masked or dropout is not None
        if self._masked and isinstance(result, Tensor):
            self.widest = max(self.widest, result.numel())
        return result


def _elementwise(kind: Kind) -> Callable[..., Tensor]:
    def dropout(scale_for: ScaleFor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  any of torch's
        x, p = _input_and_rate(*args, **kwargs)
        return _drop(x, kind, p, x.shape, scale_for)

    return dropout


def _channelwise(kind: Kind) -> Callable[..., Tensor]:
    def dropout(scale_for: ScaleFor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  any of torch's
        x, p = _input_and_rate(*args, **kwargs)
        channels = torch.Size((*x.shape[:2], *(1 for _ in x.shape[2:])))
        return _drop(x, kind, p, channels, scale_for)

    return dropout


def _input_and_rate(
    input: Tensor,  # noqa: A002  torch's name for it
    p: float = 0.5,
    *_: object,
    **__: object,
) -> tuple[Tensor, float]:
    """Pick what matters of a dropout function's arguments, however they were passed."""
    return input, p


def _drop(x: Tensor, kind: Kind, p: float, shape: torch.Size, scale_for: ScaleFor) -> Tensor:
    scale = scale_for(kind, float(p), shape) if p > 0 else None
    if scale is None:
        return x * (1 - p) if kind == "vanilla" else x
    scale = scale.to(x.dtype)
    if kind not in ("alpha", "feature_alpha"):
        return x * scale
    # Klambauer et al., "Self-Normalizing Neural Networks" (2017): dropped units take the value
    # -ALPHA, then an affine map restores mean 0 and variance 1.
    a = 1 / sqrt((ALPHA**2 * p + 1) * (1 - p))
    return x * scale * a + (scale - 1 + p) * (ALPHA * a)


def _bernoulli(
    scale_for: ScaleFor,
    x: Tensor,
    p: float | Tensor = 0.5,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`Tensor.bernoulli_`, which sets elements to one with probability `p`: here, of keeping.

    Without noise each element is its mean. The result is a tensor of its own, because under `vmap`
    `x` may have no dimension for the samples; `x` becomes NaN, so that its use does not go unseen.
    """
    if isinstance(p, Tensor) or not x.is_floating_point():
        return x.bernoulli_(p, generator=generator)
    x.fill_(nan)
    keep = scale_for("bernoulli", 1 - p, x.shape) if p < 1 else None
    if keep is None:
        return torch.full_like(x, p)
    return keep.to(x.dtype).expand(x.shape).clone()


def _attention(
    scale_for: ScaleFor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, written out, with a given mask on its weights.

    Shapes: query [..., L, E], key [..., S, E], value [..., S, V]; returns [..., L, V].
    """
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    weights = query @ key.transpose(-2, -1) * (scale or 1 / sqrt(query.shape[-1]))
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        weights = weights + attn_mask
    weights = weights.softmax(-1)
    return _drop(weights, "attention", dropout_p, weights.shape, scale_for) @ value


def _linear(
    input: Tensor,  # noqa: A002  torch's name for it
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`F.linear` with all leading dimensions as rows of one product.

    Under vmap, tokens that do not lie together would otherwise become a product each.
    """
    rows = input.reshape(-1, input.shape[-1]) if input.dim() > 2 else input
    return F.linear(rows, weight, bias).reshape(*input.shape[:-1], weight.shape[0])


def _batch_norm(
    input: Tensor,  # noqa: A002  torch's name for it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,  # noqa: ARG001  as `F.batch_norm` has it
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` by the running statistics, where there are any, which stay as they are."""
    of_batch = running_mean is None
    return F.batch_norm(input, running_mean, running_var, weight, bias, of_batch, momentum, eps)


def _unguarded(function: FunctionType) -> FunctionType:
    """Copy a function of `torch.nn.functional`, less its own check for overrides.

    With that check, its body could never run under the mode that has just intercepted it, and the
    dropout call inside would stay hidden. The copy shares nothing with the original but code.
    """
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda _: False},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_attention_forward = _unguarded(F.multi_head_attention_forward)  # type: ignore[arg-type]  # it is one

_DROPOUTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.dropout: _elementwise("dropout"),
    torch.dropout: _elementwise("dropout"),
    inverted_dropout: _elementwise("dropout"),
    vanilla_dropout: _elementwise("vanilla"),
    F.dropout1d: _channelwise("spatial"),
    F.dropout2d: _channelwise("spatial"),
    F.dropout3d: _channelwise("spatial"),
    torch.feature_dropout: _channelwise("spatial"),
    spatial_dropout: _channelwise("spatial"),
    F.alpha_dropout: _elementwise("alpha"),
    torch.alpha_dropout: _elementwise("alpha"),
    F.feature_alpha_dropout: _channelwise("feature_alpha"),
    torch.feature_alpha_dropout: _channelwise("feature_alpha"),
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.bernoulli_: _bernoulli,
}

_REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
}
