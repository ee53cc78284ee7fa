"""The errors that `models` raises on purpose: each class below its base class."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModelsError(Exception):
    """Base class of all of them."""


class ConfigError(ModelsError, ValueError):
    """A network, recipe or dropout rate is invalid; says which, and what is allowed."""


class TrainingDiverged(ModelsError):
    """The loss is not finite; says in which epoch, and what to change."""


class ProcessLost(ModelsError):
    """One of several processes of a training was killed or cannot be reached; says how to go on."""


class DataError(ModelsError):
    """A dataset is missing, damaged or empty; says where it was looked for and how to get it."""


class CheckpointError(ModelsError):
    """A checkpoint could not be written or read."""


class CheckpointNotFound(CheckpointError):
    """There is no such checkpoint."""


class CheckpointNotWritten(CheckpointError):
    """The disk or its permissions do not allow a change; says what to do."""


class StorageUnavailable(CheckpointError):
    """Object storage does not answer, or refuses the request; says why, and what to check."""


class CheckpointRefused(CheckpointError):
    """The file, folder or object `path` is invalid; `reason` says why, and what was expected."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class CheckpointIncomplete(CheckpointRefused):
    """The version is being uploaded, or its upload was interrupted."""


class SamplingError(ModelsError):
    """Monte Carlo dropout cannot be run with these arguments."""


class UnsupportedModule(SamplingError):
    """Monte Carlo dropout cannot be run on this module, whatever the input; says what to change."""


class NoDropout(UnsupportedModule):
    """The module drops nothing, so every Monte Carlo sample would be the same."""


@contextmanager
def unsupported_if_it_fails(what: str, remedy: str = "") -> Iterator[None]:
    """Raise UnsupportedModule, `what: the error remedy`, for whatever a user's module raises."""
    try:
        yield
    except UnsupportedModule:
        raise
    except Exception as error:
        raise UnsupportedModule(f"{what}: {type(error).__name__}: {error}{remedy}") from error
