"""How a network is trained, and what we suggest where nobody says otherwise; loads no PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dropserve.models.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: at most so many.
        batch_size: images a step.
        optimizer: "adamw" (Loshchilov and Hutter, 2019) or "sgd" with momentum .9 (Nesterov).
        learning_rate: at the peak; warmed up over the first 5% of steps, then a half cosine to 0.
        weight_decay: on weight matrices and kernels; never on biases and norms.
        label_smoothing: share of the target spread over all classes (Szegedy et al., 2016).
        shift: augmentation: at most so many pixels up, down, left, right.
        flip: augmentation: mirror half of the images left to right.
        patience: stop after so many epochs that were not the best; 0: never.
        validation_share: part of the training images held out to choose the best epoch.
        seed: of everything random.
        threads: CPU threads; another number rounds differently and ends with other weights. None:
            as many as PyTorch is set to.

    Raises:
        ConfigError: a value makes no sense.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.0
    shift: int = 0
    flip: bool = False
    patience: int = 0
    validation_share: float = 0.1
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.patience < 0 or self.shift < 0:
            raise ConfigError("epochs must be at least 1, batch_size 2, patience and shift 0")
        if not 0 < self.learning_rate < 100 or not 0 <= self.weight_decay < 100:
            raise ConfigError("learning_rate must be in (0, 100), weight_decay in [0, 100)")
        if not 0 <= self.label_smoothing < 1 or not 0 < self.validation_share < 1:
            raise ConfigError("label_smoothing must be in [0, 1), validation_share in (0, 1)")
        if self.optimizer not in ("adamw", "sgd"):
            raise ConfigError(f"optimizer must be adamw or sgd, not {self.optimizer!r}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed must be 0 to 2^63-1")
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise ConfigError("threads must be 1 to 256")


_SUGGESTED: Mapping[str, Mapping[str, Any]] = {
    "digits": {"epochs": 60, "batch_size": 32, "learning_rate": 1e-3},
    "fashion-mnist mlp": {"epochs": 30, "learning_rate": 1e-3},
    "fashion-mnist cnn": {
        "epochs": 14, "learning_rate": 3e-3, "weight_decay": 0.05, "shift": 1, "flip": True,
    },
}  # fmt: skip
"""What differs from a recipe's own defaults, by dataset, or by dataset and network."""


_STEPS = 20
"""An epoch should have so many at least: few images are no reason for few steps."""


def default_recipe(dataset: str, network: str, images: int) -> Recipe:
    """Suggest how to train.

    Args:
        dataset: as `dropserve.models.data.load_dataset` takes it.
        network: as `dropserve.models.networks.NetworkConfig.kind`.
        images: to train on; few are trained in small batches.
    """
    suggestion = _SUGGESTED.get(dataset, _SUGGESTED.get(f"{dataset} {network}"))
    if suggestion is not None:
        return Recipe(**suggestion)
    power = 2 ** max(3, (images // _STEPS).bit_length() - 1)
    return Recipe(batch_size=min(power, Recipe.batch_size))


def suggested(field: str) -> str:
    """Say what a field of a recipe is where nobody chooses: "20; digits 60", for example."""
    values = {"": getattr(Recipe, field)} | {
        where: changes[field] for where, changes in _SUGGESTED.items() if field in changes
    }
    said = {True: "on", False: "off"}
    listed = [
        f"{where} {said[v] if isinstance(v, bool) else v}".strip() for where, v in values.items()
    ]
    if field == "batch_size":
        listed.append(f"below {_STEPS * Recipe.batch_size} images 8 to 64")
    return "; ".join(listed)
