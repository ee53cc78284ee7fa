"""What a training run must remember between two epochs to go on as if it had never stopped."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from models.errors import CheckpointRefused, ConfigError
from models.storage import MAX_HEADER_BYTES, parse_json, parse_tensors, read_once, replace_durably

_MAX_BYTES = 32 * 2**30


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
        self._best_score = -1.0
        self._best_epoch = 0
        self._best: dict[str, Tensor] = {}

    def finish_epoch(self, score: float) -> bool:
        """Count an epoch and keep its weights if none had a better score; says if it did."""
        self.epoch += 1
        if score <= self._best_score:
            return False
        self._best_score, self._best_epoch = score, self.epoch
        self._best = {n: t.detach().cpu().clone() for n, t in self._module.state_dict().items()}
        return True

    def exhausted(self, patience: int) -> bool:
        """Say if `patience` epochs have passed without a better score."""
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
            "best_score": repr(self._best_score),
            "best_epoch": str(self._best_epoch),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        replace_durably(path, safetensors.torch.save(contiguous, metadata))

    def restore(self, path: Path) -> None:
        """Continue from a state written by `write()`.

        Raises:
            CheckpointRefused: the file is damaged.
            ConfigError: it belongs to another run.
        """
        raw = read_once(path, _MAX_BYTES)
        tensors = parse_tensors(path, raw)
        size = min(int.from_bytes(raw[:8], "little"), MAX_HEADER_BYTES)
        metadata = parse_json(path, raw[8 : 8 + size]).get("__metadata__", {})
        if metadata.get("fingerprint") != self._fingerprint:
            raise ConfigError(
                f"{path} holds a run with another recipe or other data; resume it with the options "
                f"it was started with, or start anew without --resume"
            )
        try:
            self._restore(tensors, metadata)
        except (KeyError, ValueError, RuntimeError) as error:
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
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self._best = parts["best"]
        self.epoch = int(metadata["epoch"])
        self._best_score = float(metadata["best_score"])
        self._best_epoch = int(metadata["best_epoch"])
