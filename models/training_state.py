"""What a training run must remember between two epochs to go on as if it had never stopped."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropserve.models.errors import CheckpointRefused, ConfigError
from dropserve.models.storage import (
    alone_in,
    check_header,
    dump_tensors,
    parse_tensors,
    read_once,
    replace_durably,
)

_MAX_BYTES = 32 * 2**30
_PARTS = {"module": "network", "from": "version to start from", "on": "precision or devices"}
"""What the parts of a fingerprint are called, where it is not by their names."""
_BLANK = "0" * 64
_CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
"""The file's own SHA-256 in its header: of all bytes, with `_BLANK` in the digest's place."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder of a run's state, so that no other run of the model takes it over.

    Raises:
        ConfigError: another run has it.
    """
    with ExitStack() as held:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # else a further process of the same run
            try:
                held.enter_context(alone_in(folder))
            except BlockingIOError as error:
                raise ConfigError(f"{folder}: another run of this model is going on") from error
        yield


def earlier_run(state: Path, *, resume: bool, restart: bool) -> int:
    """Say how many epochs of an interrupted run will be continued; none is lost unasked.

    Args:
        state: the file that the run wrote; removed if it is not to be continued.
        resume: continue it.
        restart: discard it.

    Raises:
        ConfigError: there is one, and it was not said what to do with it.
        CheckpointRefused: the file is damaged.
    """
    if restart:
        state.unlink(missing_ok=True)
    if not state.exists():
        return 0
    finished = _finished_epochs(state)
    if not resume:
        raise ConfigError(
            f"{state}: a run was interrupted after epoch {finished}; "
            f"continue it with --resume, or discard it with --restart"
        )
    return finished


class State:
    """Weights, best weights, the optimizer's tensors, and how far the run is.

    Args:
        module: trained in place.
        optimizer: of the module's parameters.
        fingerprint: what the run was made with; a state of another one is not continued.

    Attributes:
        epoch: epochs finished.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str
    ) -> None:
        self.optimizer = optimizer
        self.epoch = 0
        self._module = module
        self._fingerprint = fingerprint
        self._best_score = (-1.0, 0.0)
        self._best_epoch = 0
        self._best: dict[str, Tensor] = {}

    def finish_epoch(self, accuracy: float, loss: float) -> bool:
        """Count an epoch; say if it is the best, whose weights are kept.

        Among epochs of the same accuracy, of which small sets have many, the lowest loss is best.
        """
        self.epoch += 1
        score = (accuracy, -loss)
        if score <= self._best_score:
            return False
        self._best_score, self._best_epoch = score, self.epoch
        self._best = {n: t.detach().cpu().clone() for n, t in self._module.state_dict().items()}
        return True

    def exhausted(self, patience: int) -> bool:
        """Say if `patience` epochs have passed since the best one."""
        return patience > 0 and self.epoch - self._best_epoch >= patience

    def load_best(self) -> None:
        """Put the best weights into the module."""
        if self._best:
            self._module.load_state_dict(self._best)

    def write(self, path: Path) -> None:
        """Put the state in place of the last one, whole or not at all."""
        tensors = {f"module.{n}": t for n, t in self._module.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self._best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{n}": t for n, t in slots.items() if t is not None}
        metadata = {
            "fingerprint": self._fingerprint,
            "epoch": str(self.epoch),
            "best_score": json.dumps(self._best_score),
            "best_epoch": str(self._best_epoch),
            "sha256": _BLANK,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, _with_checksum(dump_tensors(path, tensors, metadata)))

    def restore(self, path: Path) -> None:
        """Continue from a state written by `write()`.

        Raises:
            CheckpointRefused: the file is damaged.
            ConfigError: it belongs to another run.
        """
        tensors, metadata = _read(path)
        held = metadata.get("fingerprint", "{}")
        if held != self._fingerprint:
            raise ConfigError(
                f"{path} holds a run of another network, recipe or data "
                f"({'; '.join(_differences(held, self._fingerprint))}); resume it with the "
                f"options it was started with, or discard it with --restart"
            )
        try:
            self._restore(tensors, metadata)
        except (LookupError, ValueError, RuntimeError) as error:
            raise CheckpointRefused(path, f"not this network's state: {error}") from error

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self._module.load_state_dict(parts["module"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = tensor
        self._check_slots(slots)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self._best = parts["best"]
        self.epoch = int(metadata["epoch"])
        if self.epoch < 1 or self._best.keys() != parts["module"].keys():
            raise ValueError("no finished epoch, or not all of its best weights")
        accuracy, loss = json.loads(metadata["best_score"])
        self._best_score = (float(accuracy), float(loss))
        self._best_epoch = int(metadata["best_epoch"])

    def _check_slots(self, slots: dict[int, dict[str, Tensor]]) -> None:
        """Raise if the optimizer would miss something, or take what is not a parameter's."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = next(iter(slots.values()), {}).keys()
        for index, tensors in slots.items():  # an unused parameter has none
            shape = parameters[index].shape
            fits = all(t.dim() == 0 or t.shape == shape for t in tensors.values())
            if not fits or tensors.keys() != names:
                raise ValueError(f"the optimizer's state of parameter {index} does not fit")


def _differences(held: str, asked: str) -> Iterator[str]:
    """Say where two fingerprints differ: a recipe field by field, all else by its name."""
    then, now = _parts(held), _parts(asked)
    recipe = then.get("recipe", {}), now.get("recipe", {})
    for field in sorted(recipe[0].keys() | recipe[1].keys()):
        before, after = (part.get(field) for part in recipe)
        if before != after:
            yield f"{field} was {before}, now is {after}"
    for name in sorted((then.keys() | now.keys()) - {"recipe"}):
        if then.get(name) != now.get(name):
            yield f"another {_PARTS.get(name, name)}"


def _parts(fingerprint: str) -> dict[str, Any]:
    """Read a fingerprint; one that is damaged or of an earlier release is like no other."""
    with suppress(ValueError):
        parts = json.loads(fingerprint)
        if isinstance(parts, dict) and isinstance(parts.get("recipe", {}), dict):
            return parts
    return {}


def _finished_epochs(state: Path) -> int:
    try:
        return int(_read(state)[1]["epoch"])
    except (LookupError, ValueError) as error:
        raise CheckpointRefused(state, f"no state of a run ({error}): give --restart") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a state file and the strings of its header."""
    raw = read_once(path, _MAX_BYTES)
    found = _CHECKSUM.search(raw)
    if found is None:
        raise CheckpointRefused(
            path,
            "without a checksum: damaged, or written by an earlier release of Dropserve, which "
            "can finish the run; --restart discards it",
        )
    if (got := _digest(raw, found)) != (told := found[1].decode()):
        raise CheckpointRefused(
            path, f"damaged: its SHA-256 is {got}, it says {told}; --restart discards it"
        )
    tensors = parse_tensors(path, raw)
    return tensors, check_header(path, raw).get("__metadata__", {})


def _with_checksum(raw: bytes) -> bytes:
    """Write the SHA-256 of a state file into its header, where `_BLANK` is now."""
    found = _CHECKSUM.search(raw)
    if found is None:
        raise ValueError("a state file has no place for its checksum")
    view = memoryview(raw)
    return b"".join([view[: found.start(1)], _digest(raw, found).encode(), view[found.end(1) :]])


def _digest(raw: bytes, found: re.Match[bytes]) -> str:
    view = memoryview(raw)
    digest = hashlib.sha256(view[: found.start(1)])
    digest.update(_BLANK.encode())
    digest.update(view[found.end(1) :])
    return digest.hexdigest()
