"""A private copy of a module in training mode, which shares its weights.

Code may switch its noise by `self.training`: `if self.training: x = F.dropout(x)`, or
`dropout_p=self.p if self.training else 0.0`. In the copy that noise runs, and can be intercepted;
the served module stays in eval mode. While user code first runs in training mode, the copy has
parameters of its own: code may change them there, and the served ones must not change.
"""

import copy
import weakref
from collections.abc import Iterable, Mapping
from types import CellType, FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from dropserve.models.errors import UnsupportedModule, unsupported_if_it_fails
from dropserve.models.montecarlo import references


def training_copy(module: nn.Module) -> nn.Module:
    """Copy a module, with parameters and buffers of its own, into training mode.

    Normalisation layers stay in eval mode: they keep to their running statistics.

    Raises:
        UnsupportedModule: it cannot be copied or put into training mode, or code that it runs
            refers to the module itself in a way that a copy cannot follow.
    """
    originals = {id(child): child for child in module.modules()}
    copied = _copy(module, originals)
    with unsupported_if_it_fails(
        "the module cannot be put into training mode, where its dropout is looked for"
    ):
        copied.train()
        for child in copied.modules():
            if _normalises(child):
                child.eval()
        _refuse_references(copied, originals)
    return copied


def share_parameters(copied: nn.Module, module: nn.Module) -> None:
    """Free the copy's own parameters where they have the module's values: both then use those."""
    originals = dict(module.named_parameters())
    for name, own in copied.named_parameters():
        if name in originals and torch.equal(own, originals[name]):
            own.data = originals[name].data


def _normalises(child: nn.Module) -> bool:
    """Say if a module normalises by statistics that it would update in training mode."""
    hooks = child._forward_pre_hooks.values()  # noqa: SLF001  no other way
    by_hook = any(isinstance(hook, SpectralNorm) for hook in hooks)
    return by_hook or isinstance(child, _NormBase | _SpectralNorm)


def _copy(module: nn.Module, originals: Mapping[int, nn.Module]) -> nn.Module:
    """Copy deeply, with functions and weak references that hold the module rebuilt for the copy."""
    memo: dict[int, object] = {}
    for child in originals.values():
        for value in vars(child).values():
            if isinstance(value, weakref.ProxyTypes):  # deepcopy would copy what it refers to
                memo[id(value)] = value
            elif isinstance(value, Tensor) and not value.is_leaf:  # which deepcopy refuses
                memo[id(value)] = value.detach().clone()
    with unsupported_if_it_fails("the module cannot be copied, as Monte Carlo dropout needs it"):
        copied, memo = _deep_copy(module, memo)
        for child in copied.modules():
            _rebind(child, memo, originals)
    if any(id(child) in originals for child in copied.modules()):
        raise UnsupportedModule(
            "a deep copy of the module holds parts of the module itself: let __deepcopy__ copy them"
        )
    return copied


def _deep_copy(module: nn.Module, memo: dict[int, object]) -> tuple[nn.Module, dict[int, object]]:
    """Copy a module; return the memo of the copies that it is made of, too."""
    attempt = dict(memo)
    try:
        return copy.deepcopy(module, attempt), attempt
    except Exception:
        _share_uncopyable(module, memo)
        return copy.deepcopy(module, memo), memo


def _share_uncopyable(value: object, memo: dict[int, object]) -> None:
    """Let a copy share what cannot be copied, such as locks and open files."""
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        parts = _parts(value)
        for part in parts:
            _share_uncopyable(part, memo)
        if not parts:
            memo[id(value)] = value


def _parts(value: object) -> list[object]:
    if isinstance(value, nn.Module):
        return list(vars(value).values())
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _rebind(child: nn.Module, memo: dict[int, object], originals: Mapping[int, nn.Module]) -> None:
    """Let functions and weak references among attributes and hooks refer to the copy.

    `copy.deepcopy` shares both, so `self.drop = lambda x: F.dropout(x, 0.5, self.training)` would
    look at the flag of the module that was copied.
    """
    for table in (vars(child), *(v for v in vars(child).values() if isinstance(v, dict))):
        for key, value in table.items():
            if isinstance(value, FunctionType) and _reaches(references.closure(value), originals):
                table[key] = _rebound(value, memo)
            elif (referent := references.referent(value)) is not None and id(referent) in originals:
                weak = weakref.ref if isinstance(value, weakref.ref) else weakref.proxy
                table[key] = weak(memo[id(referent)])


def _rebound(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """Copy a function, what it holds by `copy.deepcopy`, and functions that it holds as itself."""
    held = list(references.closure(function))
    cells = tuple(CellType() for _ in held)
    defaults = copy.deepcopy(function.__defaults__, memo)
    rebound = FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults, cells
    )
    rebound.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    memo[id(function)] = rebound  # it may hold itself
    for cell, value in zip(cells, held, strict=True):
        if isinstance(value, FunctionType):  # which deepcopy would share
            cell.cell_contents = memo.get(id(value)) or _rebound(value, memo)
        else:
            cell.cell_contents = copy.deepcopy(value, memo)
    return rebound


def _refuse_references(copied: nn.Module, originals: Mapping[int, nn.Module]) -> None:
    """Refuse a copy that still refers to a module that was copied."""
    found = list(references.of_module(copied))
    if not _reaches((value for *_, value in found), originals):  # once over what they share
        return
    for name, attribute, value in found:
        if _reaches([value], originals):
            raise UnsupportedModule(
                f"{name or 'the module'}: {attribute} refers to a module by a closure, a global "
                f"variable or the like, which a copy in training mode cannot follow: make that "
                f"module an attribute of the module that uses it"
            )


def _reaches(values: Iterable[object], originals: Mapping[int, nn.Module]) -> bool:
    """Say if one of some objects is or holds one of the modules, directly or through others."""
    return any(id(value) in originals for value in references.reachable(values))
