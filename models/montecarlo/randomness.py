"""Refuses random numbers that no mask can replace: of PyTorch, of Python and of NumPy."""

import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from dropserve.models.errors import UnsupportedModule
from dropserve.models.montecarlo import references

Running = Callable[[], str]
"""Names the module whose forward is running."""
NumPyGenerator = np.random.Generator | np.random.RandomState


class RefuseRandomness:
    """Inside `with`, code of this thread that draws random numbers raises UnsupportedModule.

    PyTorch's operations that draw are tagged, and dropout that is intercepted runs none. Python's
    generators, of whatever instance, draw by functions in C, which a profile function sees. Of
    NumPy's the global one and those that the code refers to are watched, from one module of the
    network to the next.

    Args:
        running: to say who has drawn.
        generators: of NumPy, that the code refers to.
    """

    def __init__(self, running: Running, generators: Sequence[NumPyGenerator] = ()) -> None:
        self._running = running
        self._generators = generators
        self._operations = _RefuseOperations(running)
        self._drawn: list[UnsupportedModule] = []
        self._numpy = self._numpy_states()
        self._outer = sys.getprofile()

    def __enter__(self) -> Self:
        self._operations.__enter__()  # type: ignore[no-untyped-call]  # PyTorch's is untyped
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401  as for every context manager
        sys.setprofile(self._outer)
        self._operations.__exit__(*error)  # type: ignore[no-untyped-call]  # likewise
        if self._drawn:
            raise self._drawn[0]

    def check_numpy(self) -> None:
        """Note if the running module has drawn by NumPy; to be called before another one runs."""
        states = self._numpy_states()
        if states != self._numpy:
            self._drawn.append(_refusal(self._running(), "a generator of NumPy"))
        self._numpy = states

    def _numpy_states(self) -> list[object]:
        states = [_comparable(_state(generator)) for generator in self._generators]
        return [_comparable(np.random.get_state(legacy=False)), *states]

    def _note(self, frame: FrameType, event: str, function: object) -> None:
        if event != "c_call":
            return
        own = isinstance(getattr(function, "__self__", None), random.Random)
        if not own and function is not os.urandom:  # of SystemRandom, and the seed of new ones
            return
        if not any(name.startswith("torch._dynamo") for name in _callers(frame)):
            self._drawn.append(_refusal(self._running(), "a generator of Python's random"))


def _callers(frame: FrameType | None) -> Iterator[str]:
    """Name the Python modules whose code is running; PyTorch's compiler draws for itself."""
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


class _RefuseOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's is untyped
    """Refuses operations of PyTorch that draw random numbers."""

    def __init__(self, running: Running) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._running = running

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out a wrapper for `torch.compile`: its import takes a second and 30 MB."""
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  whatever the operation returns
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            raise _refusal(self._running(), f"PyTorch's {func}")
        return func(*args, **kwargs)


def _draws(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Say if an operation that can draw random numbers does: attention, say, without dropout."""
    names = [argument.name for argument in func._schema.arguments]  # noqa: SLF001  no public name
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    rates = [given.get(name, 0.0) for name in ("dropout_p", "dropout") if name in names]
    return any(rates) or not rates


def numpy_generators(module: nn.Module) -> list[NumPyGenerator]:
    """List the generators of NumPy that a module holds, or its code reads."""
    values = (value for *_, value in references.of_module(module))
    found = references.reachable(values)
    return [value for value in found if isinstance(value, NumPyGenerator)]


def _state(generator: NumPyGenerator) -> Any:  # noqa: ANN401  what its bit generator's is made of
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _comparable(value: Any) -> object:  # noqa: ANN401  what a bit generator's state is made of
    if isinstance(value, dict):
        return [_comparable(part) for part in value.values()]
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _refusal(where: str, source: str) -> UnsupportedModule:
    return UnsupportedModule(
        f"{where or 'the module'}: draws from {source}, which no mask can replace: use dropout "
        f"(torch.nn or torch.nn.functional), or multiply by a mask that a floating-point tensor "
        f"draws by bernoulli_(keep_probability)"
    )
