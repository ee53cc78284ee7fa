"""What a model can be asked to do; requests of equal tasks run together."""

from dataclasses import dataclass

from dropserve.service.schemas import MaskKind


@dataclass(frozen=True)
class Predict:
    """Eval mode."""


@dataclass(frozen=True)
class Uncertainty:
    """Monte Carlo dropout."""

    samples: int = 100
    seed: int = 0
    masks: MaskKind = "stratified"
    level: float = 0.9
    include_samples: bool = False


@dataclass(frozen=True)
class Stream(Uncertainty):
    """Monte Carlo dropout over one image, told sample by sample."""


@dataclass(frozen=True)
class Compare:
    """Train mode beside eval mode."""

    passes: int = 8
    seed: int = 0
    p: float | None = None


Task = Predict | Uncertainty | Compare
