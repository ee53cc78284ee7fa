"""A private copy of a module in training mode, which shares its weights.

Code may switch its noise by `self.training`: `if self.training: x = F.dropout(x)`, or
`dropout_p=self.p if self.training else 0.0`. In the copy that noise runs, and can be intercepted;
the served module stays in eval mode, and its flags and buffers are never written.
"""

import copy
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from models.errors import UnsupportedModule

_NORMALISATIONS = (_NormBase, _SpectralNorm)
"""Modules that normalise by statistics of the batch, and update their own, in training mode."""
_OPAQUE = (type, ModuleType, Tensor)
"""What is not searched for references: shared by all, or without any."""


def training_copy(module: nn.Module) -> nn.Module:
    """Copy a module, with buffers of its own and the same parameters, into training mode.

    Normalisation layers stay in eval mode: they keep to their running statistics.

    Raises:
        UnsupportedModule: it cannot be copied or put into training mode, or code that it runs
            refers to the module itself in a way that a copy cannot follow.
    """
    originals = {id(child) for child in module.modules()}
    memo: dict[int, object] = {id(p): p for p in module.parameters()}
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, Tensor):  # deepcopy refuses one that was computed
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(module, memo)
        for child in copied.modules():
            _rebind_functions(child, memo, originals)
        copied.train()
    except Exception as error:  # somebody's own module may fail in any way
        raise UnsupportedModule(
            f"the module cannot be copied into training mode, where its dropout is looked for: "
            f"{type(error).__name__}: {error}"
        ) from error
    for name, child in copied.named_modules():
        if isinstance(child, _NORMALISATIONS):
            child.eval()
        _refuse_reference(name, child, originals)
    return copied


def _rebind_functions(child: nn.Module, memo: dict[int, object], originals: set[int]) -> None:
    """Give functions among a module's attributes and hooks closures over the copy.

    `copy.deepcopy` shares functions, so `self.drop = lambda x: F.dropout(x, 0.5, self.training)`
    would look at the flag of the module that was copied.
    """
    for table in (vars(child), *(v for v in vars(child).values() if isinstance(v, dict))):
        for key, value in table.items():
            if isinstance(value, FunctionType) and _reaches(value, originals):
                table[key] = _rebound(value, memo)


def _rebound(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """Copy a function whose closure and default arguments are copied by `copy.deepcopy`."""
    cells = tuple(CellType(copy.deepcopy(held, memo)) for held in _closure(function))
    rebound = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        copy.deepcopy(function.__defaults__, memo),
        cells,
    )
    rebound.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    return rebound


def _refuse_reference(name: str, child: nn.Module, originals: set[int]) -> None:
    """Refuse a copy that still refers to a module that was copied."""
    methods = (f for kind in type(child).__mro__ for f in vars(kind).values())
    own = (v for key, v in vars(child).items() if key != "_modules")  # those are looked at alone
    for value in (*own, *(f for f in methods if isinstance(f, FunctionType))):
        if _reaches(value, originals):
            raise UnsupportedModule(
                f"{name or 'the module'}: {getattr(value, '__qualname__', type(value).__name__)} "
                f"refers to a module by a closure, which a copy in training mode cannot follow: "
                f"make that module an attribute of the module that uses it"
            )


def _reaches(value: object, originals: set[int]) -> bool:
    """Say if an object holds one of the modules with these ids, directly or through others."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in originals:
            return True
        if id(value) not in seen and not isinstance(value, _OPAQUE):
            seen.add(id(value))
            waiting += _held(value)
    return False


def _held(value: object) -> Iterator[object]:
    """List what an object holds."""
    if isinstance(value, FunctionType):
        yield from (*_closure(value), value.__defaults__, value.__kwdefaults__)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    else:
        yield getattr(value, "__dict__", None)


def _closure(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that was never assigned
            yield None
