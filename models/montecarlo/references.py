"""What a module's code refers to: objects that it holds, and that its functions read."""

import dis
import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType

import numpy as np
from torch import Tensor, nn

_LEAVES = (ModuleType, Tensor)
"""What is not searched: the same for all, or without references."""
_READ = (
    *(nn.Module, weakref.ref, *weakref.ProxyTypes, dict, list, tuple, set, frozenset),
    *(np.random.Generator, np.random.RandomState),
)
"""Of global variables, those that are searched beside functions and classes.

Other objects are left out: a logger, for one, leads to everything in the process.
"""


def of_module(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """List what the modules of a module hold, and what their classes define.

    Yields:
        The name of the module within, the name of the attribute, and its value.
    """
    searched: set[type] = set()
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if key != "_modules":
                yield name, key, value
        for kind in type(child).__mro__:
            if kind not in searched and is_searched(kind):
                searched.add(kind)
                for key, value in vars(kind).items():
                    yield name, key, value


def is_searched(code: FunctionType | type) -> bool:
    """Say if a function or class is neither PyTorch's, NumPy's nor Python's own."""
    package = (code.__module__ or "").partition(".")[0]
    return package not in ("torch", "numpy") and package not in sys.stdlib_module_names


def reachable(values: Iterable[object]) -> Iterator[object]:
    """Yield some objects, and what they hold, directly or through others."""
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        yield value
        if id(value) not in seen and not isinstance(value, _LEAVES):
            seen.add(id(value))
            waiting += _held(value)


def _held(value: object) -> Iterator[object]:
    """List what an object holds."""
    if isinstance(value, FunctionType):
        yield from (*closure(value), value.__defaults__, value.__kwdefaults__)
        yield from _globals(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ReferenceType | weakref.ProxyType):
        yield referent(value)
    elif isinstance(value, type):
        yield from vars(value).values() if is_searched(value) else ()
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    else:
        yield getattr(value, "__dict__", None)


def referent(value: object) -> object:
    """Return what a weak reference, or a weak proxy of a module, refers to; None: it is neither."""
    if isinstance(value, weakref.ref):
        return value()
    if isinstance(value, weakref.ProxyTypes):
        return getattr(getattr(value, "modules", None), "__self__", None)
    return None


def closure(function: FunctionType) -> Iterator[object]:
    """List the variables of enclosing functions that a function uses."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that was never assigned
            yield None


def _globals(function: FunctionType) -> Iterator[object]:
    """List what a function reads from global variables, as far as that is searched."""
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        code = isinstance(value, FunctionType | type) and is_searched(value)
        if code or isinstance(value, _READ):
            yield value


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function within
            yield from _global_names(constant)
