"""A private copy of a module in training mode, which shares its weights.

Code may switch its noise by `self.training`: `if self.training: x = F.dropout(x)`, or
`dropout_p=self.p if self.training else 0.0`. In the copy that noise runs, and can be intercepted;
the served module stays in eval mode. While user code first runs in training mode, the copy has
parameters of its own: code may change them there, and the served ones must not change.
"""

import copy
import dis
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from models.errors import UnsupportedModule

_SHARED = (type, ModuleType, Tensor)
"""What is not searched for references: the same for all, or without any."""


def training_copy(module: nn.Module) -> nn.Module:
    """Copy a module, with parameters and buffers of its own, into training mode.

    Normalisation layers stay in eval mode: they keep to their running statistics.

    Raises:
        UnsupportedModule: it cannot be copied or put into training mode, or code that it runs
            refers to the module itself in a way that a copy cannot follow.
    """
    originals = {id(child): child for child in module.modules()}
    copied = _copy(module, originals)
    try:
        copied.train()
        for child in copied.modules():
            if _normalises(child):
                child.eval()
        _refuse_references(copied, originals)
    except UnsupportedModule:
        raise
    except Exception as error:  # somebody's own module may fail in any way
        raise UnsupportedModule(
            f"the module cannot be put into training mode, where its dropout is looked for: "
            f"{type(error).__name__}: {error}"
        ) from error
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
    try:
        _share_uncopyable(module, memo)
        copied = copy.deepcopy(module, memo)
        for child in copied.modules():
            _rebind(child, memo, originals)
    except Exception as error:  # somebody's own module may fail in any way
        raise UnsupportedModule(
            f"the module cannot be copied, as Monte Carlo dropout needs it: "
            f"{type(error).__name__}: {error}"
        ) from error
    if any(id(child) in originals for child in copied.modules()):
        raise UnsupportedModule(
            "a deep copy of the module holds parts of the module itself: let __deepcopy__ copy them"
        )
    return copied


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
            if isinstance(value, FunctionType) and _reaches(_closure(value), originals):
                table[key] = _rebound(value, memo)
            elif (referent := _referent(value)) is not None and id(referent) in originals:
                weak = weakref.ref if isinstance(value, weakref.ref) else weakref.proxy
                table[key] = weak(memo[id(referent)])


def _rebound(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """Copy a function, what it holds by `copy.deepcopy`, and functions that it holds as itself."""
    held = list(_closure(function))
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
    searched: set[type] = set()
    for name, child in copied.named_modules():
        kinds = [kind for kind in type(child).__mro__ if kind not in searched and _is_foreign(kind)]
        searched.update(kinds)
        methods = (f for kind in kinds for f in vars(kind).values() if isinstance(f, FunctionType))
        attributes = (v for key, v in vars(child).items() if key != "_modules")
        for value in (*attributes, *methods):
            if _reaches([value], originals):
                what = getattr(value, "__qualname__", type(value).__name__)
                raise UnsupportedModule(
                    f"{name or 'the module'}: {what} refers to a module by a closure, a global "
                    f"variable or the like, which a copy in training mode cannot follow: make that "
                    f"module an attribute of the module that uses it"
                )


def _is_foreign(kind: type) -> bool:
    """Say if a class is not PyTorch's: its methods may refer to anything."""
    return kind is not object and not kind.__module__.startswith("torch.")


def _reaches(values: Iterable[object], originals: Mapping[int, nn.Module]) -> bool:
    """Say if one of some objects is or holds one of the modules, directly or through others."""
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in originals:
            return True
        if id(value) not in seen and not isinstance(value, _SHARED):
            seen.add(id(value))
            waiting += _held(value)
    return False


def _held(value: object) -> Iterator[object]:
    """List what an object holds."""
    if isinstance(value, FunctionType):
        yield from (*_closure(value), value.__defaults__, value.__kwdefaults__)
        yield from _globals(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ReferenceType | weakref.ProxyType):
        yield _referent(value)
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    else:
        yield getattr(value, "__dict__", None)


def _referent(value: object) -> object:
    """Return what a weak reference, or a weak proxy of a module, refers to; None: it is neither."""
    if isinstance(value, weakref.ref):
        return value()
    if isinstance(value, weakref.ProxyTypes):
        return getattr(getattr(value, "modules", None), "__self__", None)
    return None


def _closure(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that was never assigned
            yield None


def _globals(function: FunctionType) -> Iterator[object]:
    """List the modules and functions that a function reads from global variables."""
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        own = isinstance(value, FunctionType) and not value.__module__.startswith("torch.")
        if own or isinstance(value, nn.Module | weakref.ref | weakref.ProxyType):
            yield value


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function within
            yield from _global_names(constant)
