"""A private copy of a module in training mode, which shares its weights.

Code may switch its noise by `self.training`: `if self.training: x = F.dropout(x)`, or
`dropout_p=self.p if self.training else 0.0`. In the copy that noise runs, and can be intercepted;
the served module stays in eval mode. While user code first runs in training mode, the copy has
parameters of its own: code may change them there, and the served ones must not change.
"""

import copy
import dis
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from dropserve.models.errors import UnsupportedModule, unsupported_if_it_fails

NumPyGenerator = np.random.Generator | np.random.RandomState

_ATTRIBUTES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (MethodType, ("__self__", "__func__")),
    (staticmethod, ("__func__",)),
    (classmethod, ("__func__",)),
    (property, ("fget", "fset")),
    (partial, ("func", "args", "keywords")),
)
"""Where objects hold others."""
_GLOBALS = (nn.Module, weakref.ref, *weakref.ProxyTypes, dict, list, tuple, set, frozenset)
"""Of global variables, what is searched beside functions, classes and NumPy's generators.

Other objects are left out: a logger, for one, leads to everything in the process.
"""


def training_copy(module: nn.Module) -> nn.Module:
    """Copy a module, with parameters and buffers of its own, into training mode.

    Normalisation layers stay in eval mode: they keep to their running statistics. Raises
    UnsupportedModule if the module cannot be copied or put into training mode, or code that it runs
    refers to the module itself in a way that a copy cannot follow.
    """
    originals = {id(child): child for child in module.modules()}
    copied = _copy(module, originals)
    with unsupported_if_it_fails(
        "the module cannot be put into training mode, where its dropout is looked for"
    ):
        copied.train()
        for child in copied.modules():
            hooks = child._forward_pre_hooks.values()  # noqa: SLF001  no other way
            by_hook = any(isinstance(hook, SpectralNorm) for hook in hooks)
            if by_hook or isinstance(child, _NormBase | _SpectralNorm):
                child.eval()
        _refuse_references(copied, originals)
    return copied


def share_parameters(copied: nn.Module, module: nn.Module) -> None:
    """Free the copy's own parameters where they have the module's values: both then use those."""
    originals = dict(module.named_parameters())
    for name, own in copied.named_parameters():
        if name in originals and torch.equal(own, originals[name]):
            own.data = originals[name].data


def numpy_generators(module: nn.Module) -> list[NumPyGenerator]:
    """List the generators of NumPy that a module holds, or its code reads."""
    found = _reachable((value for *_, value in _references(module)), set())
    return [value for value in found if isinstance(value, NumPyGenerator)]


def _copy(module: nn.Module, originals: Mapping[int, nn.Module]) -> nn.Module:
    """Copy deeply, with functions and weak references that hold the module rebuilt for the copy."""
    shared: dict[int, object] = {}
    for value in (value for child in originals.values() for value in vars(child).values()):
        if isinstance(value, weakref.ProxyTypes):  # deepcopy would copy what it refers to
            shared[id(value)] = value
        elif isinstance(value, Tensor) and not value.is_leaf:  # which deepcopy refuses
            shared[id(value)] = value.detach().clone()
    with unsupported_if_it_fails("the module cannot be copied, as Monte Carlo dropout needs it"):
        memo = dict(shared)
        try:
            copied = copy.deepcopy(module, memo)
        except Exception:
            _share_uncopyable(module, shared)
            memo = shared
            copied = copy.deepcopy(module, memo)
        for child in copied.modules():
            _rebind(child, memo, originals)
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
        held = vars(value) if isinstance(value, nn.Module) else value
        if isinstance(held, dict | list | tuple):
            for part in held.values() if isinstance(held, dict) else held:
                _share_uncopyable(part, memo)
        else:
            memo[id(value)] = value


def _rebind(child: nn.Module, memo: dict[int, object], originals: Mapping[int, nn.Module]) -> None:
    """Let functions and weak references among attributes and hooks refer to the copy.

    `copy.deepcopy` shares both, so `self.drop = lambda x: F.dropout(x, 0.5, self.training)` would
    read the flag of the module that was copied.
    """
    for table in (vars(child), *(v for v in vars(child).values() if isinstance(v, dict))):
        for key, value in table.items():
            if isinstance(value, FunctionType) and _reaches(_closure(value), originals, set()):
                table[key] = _rebound(value, memo)
            elif (referent := _referent(value)) is not None and id(referent) in originals:
                weak = weakref.ref if isinstance(value, weakref.ref) else weakref.proxy
                table[key] = weak(memo[id(referent)])


def _rebound(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """Copy a function, what it holds by `copy.deepcopy`, and functions that it holds as itself."""
    held = list(_closure(function))
    cells = tuple(CellType() for _ in held)
    defaults = copy.deepcopy(function.__defaults__, memo)
    rebound = FunctionType(function.__code__, function.__globals__, None, defaults, cells)
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
    seen: set[int] = set()  # what they share is searched once
    for name, attribute, value in _references(copied):
        if _reaches([value], originals, seen):
            raise UnsupportedModule(
                f"{name or 'the module'}: {attribute} refers to a module by a closure, a global "
                f"variable or the like, which a copy in training mode cannot follow: make that "
                f"module an attribute of the module that uses it"
            )


def _references(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """List what modules within hold and their classes define: (module, attribute, value)."""
    searched: set[type] = set()
    for name, child in module.named_modules():
        tables = [{key: value for key, value in vars(child).items() if key != "_modules"}]
        classes = {kind for kind in type(child).__mro__ if _is_searched(kind)} - searched
        tables += (dict(vars(kind)) for kind in classes)
        searched |= classes
        for table in tables:
            for key, value in table.items():
                yield name, key, value


def _reaches(values: Iterable[object], originals: Mapping[int, nn.Module], seen: set[int]) -> bool:
    """Say if one of some objects is or holds one of the modules, directly or through others."""
    return any(id(value) in originals for value in _reachable(values, seen))


def _reachable(values: Iterable[object], seen: set[int]) -> Iterator[object]:
    """Yield some objects, and what they hold, directly or through others, that were not `seen`."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        yield value
        if id(value) not in seen and not isinstance(value, ModuleType | Tensor):
            seen.add(id(value))
            waiting += _held(value)


def _held(value: object) -> Iterable[object]:
    for kind, names in _ATTRIBUTES:
        if isinstance(value, kind):
            return [getattr(value, name) for name in names]
    if isinstance(value, FunctionType):
        defaults = value.__defaults__, value.__kwdefaults__
        return *_closure(value), *defaults, *_read_globals(value)
    if isinstance(value, weakref.ReferenceType | weakref.ProxyType):
        return (_referent(value),)
    if isinstance(value, type):
        return vars(value).values() if _is_searched(value) else ()
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    return (getattr(value, "__dict__", None),)


def _is_searched(code: FunctionType | type) -> bool:
    """Say if a function or class is neither PyTorch's, NumPy's nor Python's own."""
    package = (code.__module__ or "").partition(".")[0]
    return package not in ("torch", "numpy") and package not in sys.stdlib_module_names


def _referent(value: object) -> object:
    """Return what a weak reference, or a weak proxy of a module, refers to; None: it is neither."""
    if isinstance(value, weakref.ref):
        return value()
    if isinstance(value, weakref.ProxyTypes):
        return getattr(getattr(value, "modules", None), "__self__", None)
    return None


def _closure(function: FunctionType) -> Iterator[object]:
    """List the variables of enclosing functions that a function uses."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that was never assigned
            yield None


def _read_globals(function: FunctionType) -> Iterator[object]:
    """List what a function, and those within it, read from global variables."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += (constant for constant in code.co_consts if isinstance(constant, CodeType))
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                value = function.__globals__.get(instruction.argval)
                by_code = isinstance(value, FunctionType | type) and _is_searched(value)
                if by_code or isinstance(value, (*_GLOBALS, NumPyGenerator)):
                    yield value
