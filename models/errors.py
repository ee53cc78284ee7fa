"""Everything that `models` raises on purpose.

ModelsError
├── ConfigError             a network, recipe or rate that makes no sense
├── TrainingDiverged        the loss is no number any more
├── DataError               a dataset that is missing, damaged or empty
├── CheckpointError
│   ├── CheckpointNotFound  nothing there
│   └── CheckpointRefused   there, but not to be trusted
└── SamplingError           Monte Carlo dropout cannot be run
    └── UnsupportedModule   ... on this module, whatever the input
        └── NoDropout           ... because it has none
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModelsError(Exception):
    """The root: catch it to catch all that `models` raises on purpose."""


class ConfigError(ModelsError, ValueError):
    """A network, recipe or dropout rate makes no sense; says which, and what is allowed."""


class TrainingDiverged(ModelsError):
    """The loss is not finite; says in which epoch, and what to change."""


class DataError(ModelsError):
    """A dataset is missing, damaged or empty; says where it was looked for and how to get it."""


class CheckpointError(ModelsError):
    """A checkpoint could not be written or read."""


class CheckpointNotFound(CheckpointError):
    """There is no such checkpoint."""


class CheckpointRefused(CheckpointError):
    """A checkpoint is there but is not to be trusted.

    Attributes:
        path: the file or folder that is wrong.
        reason: what is wrong with it, and what was expected.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class SamplingError(ModelsError):
    """Monte Carlo dropout cannot be run with these arguments."""


class UnsupportedModule(SamplingError):
    """Monte Carlo dropout cannot be run on this module, whatever the input; says what to change."""


@contextmanager
def unsupported_if_it_fails(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever somebody's own module raises into UnsupportedModule: `what: the error remedy`.

    UnsupportedModule itself passes.
    """
    try:
        yield
    except UnsupportedModule:
        raise
    except Exception as error:
        raise UnsupportedModule(f"{what}: {type(error).__name__}: {error}{remedy}") from error


class NoDropout(UnsupportedModule):
    """The module drops nothing, so every Monte Carlo sample would be the same."""
