"""The experiments, a file each: what varies, what is measured, and the answer."""

import inspect
from importlib import import_module
from types import ModuleType

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


def source(name: str) -> str:
    """Return the code of an experiment's file, up to its text."""
    code, _, _ = inspect.getsource(_module(name)).partition("\nEXPERIMENT = ")
    return code


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
