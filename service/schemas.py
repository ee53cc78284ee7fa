"""What goes over the wire, as the service writes it and the client reads it. No torch, no NumPy.

The events of `/uncertainty/stream` are in `dropserve.service.events`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MaskKind = Literal["stratified", "independent"]
Probabilities = list[float]
"""One number a class, in the order of the model's classes."""
DEFAULT_SAMPLES = 100
"""Thinned networks where a request does not say how many."""
SCALES = (255, 1)
"""Numbers that white may be."""
_REPEATED = re.compile(r"[a-zA-Z_]{1,32}")
"""Names of unknown parameters that an error repeats."""


class Answer(BaseModel):
    """A field that a newer service adds is ignored by an older client."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Sent(BaseModel):
    """What a client sends; an unknown name is refused, so that a misspelt one is not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: object) -> object:
        """Refuse an unknown name, and say which it is: the one thing that errors repeat.

        A member that is null is left out.
        """
        known = cls.model_fields
        for name in values if isinstance(values, dict) else ():
            if name not in known:
                named = f" {name}" if _REPEATED.fullmatch(name) else ""
                allowed = ", ".join(known) or "none"
                raise PydanticCustomError(
                    "unknown_name",
                    "unknown parameter{named}; allowed: {allowed}",
                    {"named": named, "allowed": allowed},
                )
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None}
        return values


def _check_scale(value: int) -> int:
    if value not in SCALES:
        raise PydanticCustomError("scale", "must be 255 or 1")
    return value


class PredictOptions(Sent):
    """How numbers are read; encoded pictures take no scale but 255."""

    scale: Annotated[
        int,
        AfterValidator(_check_scale),
        Field(
            description="Number that is white in `instances` and tensors; 1 if they are scaled.",
            json_schema_extra={"enum": list(SCALES)},
        ),
    ] = 255


class SamplingOptions(PredictOptions):
    """How thinned networks are sampled."""

    samples: Annotated[int, Field(ge=1, le=1000, description="Thinned networks, T.")] = (
        DEFAULT_SAMPLES
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, description="Decides the masks.")] = 0
    masks: Annotated[MaskKind, Field(description="How masks are drawn.")] = "stratified"
    level: Annotated[float, Field(gt=0, lt=1, description="Of the sample interval.")] = 0.9


class UncertaintyOptions(SamplingOptions):
    """How `/uncertainty` samples, and what of it is returned."""

    include_samples: Annotated[bool, Field(description="Return all T x C probabilities.")] = False


class CompareOptions(PredictOptions):
    """How `/compare` runs train mode."""

    passes: Annotated[int, Field(ge=1, le=32, description="Train-mode passes, k.")] = 8
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, description="Decides the masks.")] = 0
    p: Annotated[float | None, Field(ge=0, lt=1, description="Every dropout's rate.")] = None


class Prediction(Answer):
    """The answer for one image in eval mode."""

    label: str
    index: int
    probability: float
    probabilities: Probabilities


class PredictResponse(Answer):
    """Answers in the order of the images."""

    model: str
    version: int
    predictions: list[Prediction]


class Interval(Answer):
    """Sample quantiles of each class's probability: mask randomness, not the label's."""

    level: float
    lower: Probabilities
    upper: Probabilities


class UncertainPrediction(Answer):
    """What T thinned networks say of one image; entropies in nats."""

    label: str
    index: int
    mean: Probabilities
    variance: Probabilities | None = Field(description="With T-1; null at T = 1.")
    standard_error: Probabilities | None = Field(
        description="Of the mean; null where it cannot be estimated."
    )
    degrees_of_freedom: int | None = Field(
        None, description="Of the standard error, for Student's quantiles; null likewise."
    )
    predictive_entropy: float = Field(description="H[mean]: total uncertainty.")
    expected_entropy: float = Field(description="Mean of H[p_t]: aleatoric.")
    mutual_information: float = Field(description="Their difference: epistemic (BALD).")
    variation_ratio: float = Field(description="Share of samples off the modal class.")
    interval: Interval
    sample_probabilities: list[Probabilities] | None = Field(
        None, description="T rows; only with include_samples=true."
    )


class Sampled(Answer):
    """Which model was sampled, and how."""

    model: str
    version: int
    method: Literal["dropout"]
    samples: int
    seed: int
    masks: MaskKind
    log_base: Literal["e"]


class UncertaintyResponse(Sampled):
    """Answers in the order of the images, and how they were sampled."""

    predictions: list[UncertainPrediction]


class ComparedPrediction(Answer):
    """One image through both modes."""

    eval: list[Probabilities] = Field(description="Two passes in eval mode: identical.")
    train: list[Probabilities] = Field(description="k passes with dropout on: different.")
    train_mean: Probabilities
    distance: float = Field(description="Total variation between train_mean and eval, 0 to 1.")


class Moments(Answer):
    """Of a layer's activations, over units and images (and passes)."""

    mean: float
    variance: float


class ComparedLayer(Answer):
    """One call of a layer in a forward pass."""

    name: str
    kind: str
    p: float | None = Field(description="Rate, where the layer is a dropout.")
    eval: Moments
    train: Moments


class CompareResponse(Answer):
    """Train and eval side by side."""

    model: str
    version: int
    passes: int
    seed: int
    p: float | None = Field(None, description="Of every dropout in train mode; where asked for.")
    predictions: list[ComparedPrediction]
    layers: list[ComparedLayer]


class DropoutSite(Answer):
    """One dropout call of the network: where masks go."""

    name: str
    kind: str
    p: float
    shape: list[int]
    units: int | None = Field(None, description="How many are kept or dropped, each as one.")


class Input(Answer):
    """What a picture is made into before the network sees it."""

    height: int
    width: int
    channels: int
    mean: list[float]
    std: list[float]
    invert: bool
    fit: Literal["stretch", "crop", "pad"] = Field(
        "stretch", description="How images of other proportions get this height and width."
    )


class Precision(Answer):
    """What Monte Carlo samples are computed in."""

    dtype: Literal["float32", "bfloat16"]
    speedup: float | None = Field(description="Of bfloat16 here; null: not measured.")
    error: float | None = Field(description="Most that bfloat16 moved a mean on the probe.")


class Refused(Answer):
    """A version that cannot be loaded; it is tried again when its files change."""

    version: int
    reason: str


class ModelState(Answer):
    """The versions of a model that are ready, and what keeps others from it."""

    version: int | None = Field(None, description="The one that answers where none is named.")
    versions: list[int]
    refused: list[Refused] = Field([], description="Versions that cannot be served, and why.")
    changed: list[Refused] = Field(
        [],
        description="Versions that are served from memory: why their files could not be any more.",
    )
    pinned: int | None = Field(None, description="To answer; null: the latest does.")
    pin_problem: str | None = Field(None, description="Why another than the pinned one answers.")


class ModelSummary(ModelState):
    """A model in the list of models."""

    name: str
    version: int = Field(description="The one that answers where none is named.")
    default: bool = Field(description="Whether /predict means this model.")
    manifest_sha256: str | None = Field(
        None, description="Of manifest.json, hence of all files; null: the version has none."
    )


class ModelList(Answer):
    """All models that are served."""

    models: list[ModelSummary]


class ModelDetails(ModelSummary):
    """One version of a model."""

    classes: list[str]
    input: Input
    training: Literal[False] = Field(description="Always: the module is served in eval mode.")
    parameters: int
    sites: list[DropoutSite]
    path: Literal["folded", "vmap", "loop"] = Field(
        description="How Monte Carlo samples are run; folded is the fastest."
    )
    precision: Precision
    network: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    sha256: str
    torch_version: str


class Example(Answer):
    """A picture from the test set that the model was scored on."""

    label: str
    index: int = Field(description="Of the class that it is of.")
    url: str = Field(description="Where it is, as a PNG.")


class ExampleList(Answer):
    """Pictures to try a version of a model with; none where it was saved without."""

    model: str
    version: int
    examples: list[Example]


class Health(Answer):
    """`/livez`."""

    status: Literal["ok"]


class Readiness(Answer):
    """`/readyz`, `/healthz`."""

    status: Literal["ready"]
    models: dict[str, ModelState]


class Problem(BaseModel):
    """An error as RFC 9457 has it: `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
