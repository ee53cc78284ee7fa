"""What is known of tensors while code holds them: a dictionary by identity, not by value."""

import weakref
from typing import Any, Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class TensorTable(Generic[Value]):
    """Maps tensors to values; an entry goes when its tensor does."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        key = id(tensor)
        reference = weakref.ref(tensor, lambda _: self._found.pop(key, None))
        self._found[key] = reference, value

    def __getitem__(self, tensor: Tensor) -> Value:
        return self._found[id(tensor)][1]

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._found

    def __bool__(self) -> bool:
        return bool(self._found)

    def replaced(self, values: Any) -> Any:  # noqa: ANN401  whatever a function is given
        """Put the values of this table in the place of its tensors, in nested containers too."""
        if id(values) in self._found:
            return self._found[id(values)][1]
        if type(values) in (list, tuple):
            return type(values)(map(self.replaced, values))
        if isinstance(values, dict):
            return {key: self.replaced(value) for key, value in values.items()}
        return values
