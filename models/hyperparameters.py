"""Training hyperparameters and their defaults by dataset; loads no PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dropserve.models.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How to train; ConfigError where a value makes no sense."""

    epochs: int = 20  # at most
    batch_size: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"  # Loshchilov and Hutter, 2019; Nesterov's
    learning_rate: float = 2e-3  # at the peak of the schedule
    weight_decay: float = 0.02  # of weight matrices and kernels
    label_smoothing: float = 0.0  # share spread over all classes (Szegedy et al., 2016)
    shift: int = 0  # augmentation: at most so many pixels up, down, left, right
    flip: bool = False  # augmentation: mirror half of the images left to right
    patience: int = 0  # stop after so many epochs that were not the best; 0: never
    validation_share: float = 0.1  # of the training images, held out to choose the best epoch
    seed: int = 0
    decay_biases: bool = False  # weight decay of biases and norms too
    l1: float = 0.0  # penalty on the absolute values of weight matrices and kernels, summed
    max_norm: float | None = None  # of each unit's incoming weights, after every step
    schedule: Literal["cosine", "constant"] = "cosine"  # warm-up over 5%, half cosine
    threads: int | None = None  # of the CPU; another number rounds differently. None: PyTorch's

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.patience < 0 or self.shift < 0:
            raise ConfigError("epochs must be at least 1, batch_size 2, patience and shift 0")
        if not 0 < self.learning_rate < 100 or not 0 <= self.weight_decay < 100:
            raise ConfigError("learning_rate must be in (0, 100), weight_decay in [0, 100)")
        if not 0 <= self.l1 < 1 or not (self.max_norm is None or 0 < self.max_norm < 1e6):
            raise ConfigError("l1 must be in [0, 1), max_norm in (0, 1000000)")
        if self.decay_biases and not self.weight_decay:
            raise ConfigError("decay_biases needs a weight_decay above 0")
        if not 0 <= self.label_smoothing < 1 or not 0 < self.validation_share < 1:
            raise ConfigError("label_smoothing must be in [0, 1), validation_share in (0, 1)")
        if self.optimizer not in ("adamw", "sgd"):
            raise ConfigError(f"optimizer must be adamw or sgd, not {self.optimizer!r}")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule must be cosine or constant, not {self.schedule!r}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed must be 0 to 2^63-1")
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise ConfigError("threads must be 1 to 256")


_SUGGESTED: Mapping[str, Mapping[str, Any]] = {
    "digits": {"epochs": 60, "batch_size": 32, "learning_rate": 1e-3},
    "fashion-mnist mlp": {"epochs": 30, "learning_rate": 1e-3},
    "fashion-mnist cnn": {
        "epochs": 24, "learning_rate": 3e-3, "weight_decay": 0.05, "shift": 1, "flip": True,
    },
    "fashion-mnist gru": {"epochs": 20, "learning_rate": 3e-3},
    "fashion-mnist wrn": {
        "epochs": 24, "learning_rate": 3e-3, "weight_decay": 0.05, "shift": 2, "flip": True,
    },
    "fashion-mnist vit": {
        "epochs": 15, "learning_rate": 1e-3, "weight_decay": 0.05, "shift": 2, "flip": True,
    },
}  # fmt: skip
"""What differs from a recipe's own defaults, by dataset, or by dataset and network."""
_STEPS = 20
"""Least steps of an epoch: with few images the batches are smaller."""


def default_recipe(dataset: str, network: str, images: int) -> Recipe:
    """Return the default recipe for so many images."""
    suggestion = _SUGGESTED.get(dataset, _SUGGESTED.get(f"{dataset} {network}"))
    if suggestion is not None:
        return Recipe(**suggestion)
    power = 2 ** max(3, (images // _STEPS).bit_length() - 1)
    return Recipe(batch_size=min(power, Recipe.batch_size))


def suggested(field: str) -> str:
    """Describe the defaults of a recipe's field, as in "20; digits 60"."""
    values = {"": getattr(Recipe, field)}
    values |= {where: fields[field] for where, fields in _SUGGESTED.items() if field in fields}
    words = {True: "on", False: "off"}
    listed = [
        f"{where} {words[v] if isinstance(v, bool) else v}".strip() for where, v in values.items()
    ]
    if field == "batch_size":
        listed.append(f"below {_STEPS * Recipe.batch_size} images 8 to 64")
    return "; ".join(listed)
