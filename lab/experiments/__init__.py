"""The experiments, a file each: what varies, what is measured, and the answer."""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from dropserve.lab.experiment import Experiment

NAMES = (
    "accuracy", "rates", "stability", "penalties", "weights", "noises", "averaging", "rescaling",
    "ensemble", "data", "architectures", "recurrent", "uncertainty", "masks",
)  # fmt: skip
"""In the order of docs/results.md."""


def load(name: str) -> Experiment:
    """Return an experiment by its name."""
    found: Experiment = _module(name).EXPERIMENT
    return found


def functions(name: str) -> list[Callable[..., Any]]:
    """Return the functions of an experiment's own file."""
    module = _module(name)
    own = vars(module).values()
    return [f for f in own if inspect.isfunction(f) and f.__module__ == module.__name__]


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
