"""Catches every draw of noise in one forward pass, in one thread, and puts a given one there.

Our layers draw by `regularizers.noise`. PyTorch's functional dropout is caught like its modules; so
are the dropout inside attention and masks that code draws by `Tensor.bernoulli_` and scales itself,
as stochastic depth does (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016). Batch
normalisation keeps to its running statistics.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from math import nan, sqrt
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dropserve.models.regularizers import Bernoulli, Law, noise

NoiseFor = Callable[[Law, torch.Size], Tensor | None]
"""`(law, shape) -> noise`, for a mask zero where a unit is dropped; None: its mean, as eval mode
has it."""


class Interception(TorchFunctionMode):
    """Runs a module with what `noise_for` returns as its noise, where that is switched on.

    `sizes` has the number of elements of every tensor that a call returned from the first draw on:
    what comes before runs once, whatever the number of samples.
    """

    def __init__(self, noise_for: NoiseFor, *, running_statistics: bool = True) -> None:
        super().__init__()
        self._noise_for = noise_for
        self._running_statistics = running_statistics  # of batch normalisation
        self._overwritten = WeakTensorKeyDictionary()  # with what takes their place
        self._uniforms = WeakTensorKeyDictionary()  # with what was added to them
        self._masked = False
        self.sizes: list[int] = []

    def run(self, module: Callable[[Tensor], Any], x: Tensor) -> Any:  # noqa: ANN401  the module's
        """Run a module under the interception, on a copy of `x`, which it may overwrite."""
        with self:
            result = module(x.clone())
        return self._current(result)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever the intercepted function returns
        kwargs = kwargs or {}
        if self._overwritten:
            args, kwargs = self._current(args), self._current(kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _attention_forward(*args, **kwargs)
        if func is torch.rand or func is torch.rand_like:
            return self._uniform(func, *args, **kwargs)
        if self._uniforms and any(isinstance(x, Tensor) and x in self._uniforms for x in args):
            return self._of_uniform(func, *args, **kwargs)
        if func is F.linear:
            func = _linear
        elif func is F.batch_norm and self._running_statistics:
            given = _BATCH_NORM.bind(*args, **kwargs).arguments
            args, kwargs = (), {**given, "training": given["running_mean"] is None}
        drawing = _REPLACEMENTS.get(func)
        if drawing is None:
            result = func(*args, **kwargs)
        else:
            result = drawing(self._noise_for, *args, **kwargs)
            self._masked = True
            x = args[0] if args else kwargs["input"]
            inplace = kwargs.get("inplace") is True or (len(args) > 3 and args[3] is True)
            if result is not x and (inplace or func is torch.Tensor.bernoulli_):
                self._overwritten[x] = result
        if self._masked and isinstance(result, Tensor):
            self.sizes.append(result.numel())
        return result

    def _current(self, values: Any) -> Any:  # noqa: ANN401  whatever a function is given
        """Put what was written into tensors in their place, in nested containers too."""
        if isinstance(values, Tensor):
            return self._overwritten.get(values, values)  # type: ignore[no-untyped-call]  # PyTorch's is
        if type(values) in (list, tuple):
            return type(values)(map(self._current, values))
        if isinstance(values, dict):
            return {key: self._current(value) for key, value in values.items()}
        return values

    def _uniform(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  of either
        """Return NaN for `torch.rand` and its like, until its use makes a mask of it."""
        kwargs.pop("generator", None)
        empty = torch.empty if func is torch.rand else torch.empty_like
        uniform = empty(*args, **kwargs).fill_(nan)
        self._uniforms[uniform] = 0.0
        return uniform

    def _of_uniform(self, func: Callable[..., Tensor], x: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  numbers, and tensors
        """Follow uniform numbers U to floor(keep + U), a mask (older timm, Hugging Face)."""
        if func in _ADDITIONS and len(args) == 1 and isinstance(args[0], int | float):
            result = func(x, *args, **kwargs)
            self._uniforms[result] = self._uniforms[x] + args[0]
            return result
        if func in _FLOORS:
            self._masked = True
            result = _bernoulli(self._noise_for, x, self._uniforms[x])
            if func is torch.Tensor.floor_:
                self._overwritten[x] = result
            return result
        if func.__name__ != "__get__":  # x.shape, say
            torch.rand(())  # which `RefuseRandomness` sees
        return func(x, *args, **kwargs)


@dataclass(frozen=True)
class _Dropout:
    """Takes the place of a dropout function of PyTorch's, which is given all arguments."""

    kind: str = "dropout"
    channelwise: bool = False
    is_alpha: bool = False
    unbatched: int | None = None  # dimensions of an input that is one image: its first are channels

    def __call__(
        self,
        noise_for: NoiseFor,
        input: Tensor,  # noqa: A002  torch's name for it
        p: float,
        training: bool | None = None,
        *_: object,
        train: bool | None = None,
        **__: object,
    ) -> Tensor:
        on = train if training is None else training
        if not on or p <= 0:
            return input
        shape = input.shape
        if self.channelwise:
            kept = 1 if input.dim() == self.unbatched else 2
            shape = torch.Size((*shape[:kept], *(1 for _ in shape[kept:])))
        scales = not self.is_alpha
        mask = noise_for(Bernoulli(self.kind, float(p), scales, scales), shape)
        if mask is None:
            return input
        mask = mask.to(input.dtype)
        return _alpha_dropout(input, mask, float(p)) if self.is_alpha else input * mask


def _alpha_dropout(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Klambauer et al., "Self-Normalizing Neural Networks" (NIPS 2017).

    Dropped units take the value -alpha (SELU's scale times its alpha), then an affine map restores
    mean 0 and variance 1.
    """
    alpha = 1.7580993408473766
    a = 1 / sqrt((alpha**2 * p + 1) * (1 - p))
    return x * keep * a + (keep - 1 + p) * (alpha * a)


def _noise(
    noise_for: NoiseFor, x: Tensor, law: Law, shape: torch.Size, *_: object, **__: object
) -> Tensor:
    drawn = noise_for(law, shape)
    if drawn is None:  # images share it, as they do what is drawn
        return x.new_full((), law.mean).expand(1, *shape[1:])
    return drawn.to(x.dtype)


def _bernoulli(
    noise_for: NoiseFor, x: Tensor, p: float | Tensor = 0.5, **generator: torch.Generator | None
) -> Tensor:
    """`Tensor.bernoulli_`, which sets elements to one with probability `p`: here, of keeping.

    Without noise each element is its mean. The result is a tensor of its own: under `vmap` a mask
    has a dimension for the samples that `x` may not have.
    """
    if isinstance(p, Tensor) and p.dim() == 0:
        p = float(p)
    if isinstance(p, Tensor) or not x.is_floating_point():
        return x.bernoulli_(p, **generator)
    law = Bernoulli("bernoulli", 1 - p, rescaled=False, adjustable=False)
    keep = noise_for(law, x.shape) if p < 1 else None
    if keep is None:
        return torch.full_like(x, p)
    return keep.to(x.dtype).expand(x.shape).clone()


def _attention(
    noise_for: NoiseFor,
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

    PyTorch's own kernels run image by image, sample by sample, under vmap.

    Shapes: query [..., L, E], key [..., S, E], value [..., S, V]; returns [..., L, V].
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    scale = 1 / sqrt(query.shape[-1]) if scale is None else scale
    weights = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        weights = weights + attn_mask
    weights = torch._safe_softmax(weights, -1)  # noqa: SLF001  0 where all is masked; no public name
    law = Bernoulli("attention", dropout_p)
    mask = noise_for(law, weights.shape) if dropout_p > 0 else None
    return (weights if mask is None else weights * mask.to(weights.dtype)) @ value


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  torch's
    """`F.linear` with all leading dimensions as rows of one product.

    Under vmap, tokens that do not lie together would otherwise become a product each.
    """
    rows = input.reshape(-1, input.shape[-1]) if input.dim() > 2 else input
    return F.linear(rows, weight, bias).reshape(*input.shape[:-1], weight.shape[0])


def _unguarded(function: FunctionType) -> FunctionType:
    """Copy a function of `torch.nn.functional`, less its own check for overrides.

    With that check, its body could never run under the mode that has just intercepted it, and the
    dropout call inside would stay hidden. The copy shares nothing with the original but code.
    """
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = FunctionType(function.__code__, names, None, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_BATCH_NORM = signature(F.batch_norm)
_attention_forward = _unguarded(F.multi_head_attention_forward)  # type: ignore[arg-type]  # it is one

_ADDITIONS = frozenset((torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__radd__))
_FLOORS = frozenset((torch.floor, torch.Tensor.floor, torch.Tensor.floor_))
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    noise: _noise,
    F.dropout: _Dropout(),
    torch.dropout: _Dropout(),
    F.dropout1d: _Dropout("spatial", channelwise=True, unbatched=2),
    F.dropout2d: _Dropout("spatial", channelwise=True),
    F.dropout3d: _Dropout("spatial", channelwise=True, unbatched=4),
    torch.feature_dropout: _Dropout("spatial", channelwise=True),
    F.alpha_dropout: _Dropout("alpha", is_alpha=True),
    torch.alpha_dropout: _Dropout("alpha", is_alpha=True),
    F.feature_alpha_dropout: _Dropout("feature_alpha", channelwise=True, is_alpha=True),
    torch.feature_alpha_dropout: _Dropout("feature_alpha", channelwise=True, is_alpha=True),
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.bernoulli_: _bernoulli,
}
