"""Request and response schemas, shared by service and client. No torch, no NumPy."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dropserve.models.defaults import DEFAULT_SAMPLES, MaskKind

MEASURES = ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio")
"""Figures of an image's uncertainty, one number each."""
MAX_SAMPLES = 1000
SCALES = (255, 1)
"""Values that may mean white."""
Probabilities = list[float]
"""One number per class, in the order of the model's classes."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1, description="Seed of the dropout masks.")]
_SAFE_NAME = re.compile(r"[a-zA-Z_]{1,32}")
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
        """Name an unknown parameter in the error, and leave out members that are null."""
        if not isinstance(values, dict):
            return values
        for name in values:
            if name not in cls.model_fields:
                named = f" {name}" if _SAFE_NAME.fullmatch(name) else ""
                allowed = ", ".join(cls.model_fields) or "none"
                raise PydanticCustomError(
                    "unknown_name",
                    "unknown parameter{named}; allowed: {allowed}",
                    {"named": named, "allowed": allowed},
                )
        return {name: value for name, value in values.items() if value is not None}


def _check_scale(value: int) -> int:
    if value not in SCALES:
        raise PydanticCustomError("scale", "must be 255 or 1")
    return value


class ImageOptions(Sent):
    """How numbers are read; encoded images accept only 255."""

    scale: Annotated[
        int,
        AfterValidator(_check_scale),
        Field(
            description="Value of white in `instances` and tensors; 1 if they are scaled.",
            json_schema_extra={"enum": list(SCALES)},
        ),
    ] = 255


class PredictOptions(ImageOptions):
    """How `/predict` answers: no options of its own."""


class SamplingOptions(ImageOptions):
    """How thinned networks are sampled."""

    samples: Annotated[
        int, Field(ge=1, le=MAX_SAMPLES, description="Number of thinned networks, T.")
    ] = DEFAULT_SAMPLES
    seed: Seed = 0
    masks: Annotated[MaskKind, Field(description="How masks are drawn.")] = "stratified"
    level: Annotated[float, Field(gt=0, lt=1, description="Level of the sample interval.")] = 0.9


class UncertaintyOptions(SamplingOptions):
    """How `/uncertainty` samples, and what of it is returned."""

    include_samples: Annotated[bool, Field(description="Return all T x C probabilities.")] = False


class CompareOptions(ImageOptions):
    """How `/compare` runs train mode."""

    passes: Annotated[int, Field(ge=1, le=32, description="Train-mode passes, k.")] = 8
    seed: Seed = 0
    p: Annotated[float | None, Field(ge=0, lt=1, description="Rate of every dropout.")] = None


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
    """Statistics of T thinned networks for one image; entropies in nats."""

    label: str
    index: int
    mean: Probabilities
    variance: Probabilities | None = Field(description="Sample variance (T-1); null at T = 1.")
    standard_error: Probabilities | None = Field(
        description="Of the mean; null where it cannot be estimated."
    )
    degrees_of_freedom: int | None = Field(
        None, description="Of the standard error, for Student's t quantiles; null if that is null."
    )
    predictive_entropy: float = Field(description="H[mean]: total uncertainty.")
    expected_entropy: float = Field(description="Mean of H[p_t]: aleatoric.")
    mutual_information: float = Field(description="Difference of the entropies: epistemic (BALD).")
    variation_ratio: float = Field(description="Share of samples not voting for the modal class.")
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
    """One image in both modes."""

    eval: list[Probabilities] = Field(description="Two passes in eval mode: identical.")
    train: list[Probabilities] = Field(description="k passes with dropout on: different.")
    train_mean: Probabilities
    distance: float = Field(description="Total variation between train_mean and eval, 0 to 1.")


class Moments(Answer):
    """Moments of a layer's activations, over units and images (and passes)."""

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
    p: float | None = Field(None, description="Dropout rate in train mode, if the request set one.")
    predictions: list[ComparedPrediction]
    layers: list[ComparedLayer]


class DropoutSite(Answer):
    """One place where the network draws noise, to which that of a sample is applied."""

    name: str = Field(description="Module of the network.")
    kind: str = Field(description="Method: dropout, vanilla, gaussian, dropconnect, ...")
    p: float | None = Field(description="Rate; null where the method has none.")
    shape: list[int] = Field(
        description="What is covered: units, channels, weights [out, in + 1], or steps and units."
    )
    units: int | None = Field(None, description="Numbers drawn a sample.")
    distribution: Literal["bernoulli", "gaussian"] = "bernoulli"
    mean: float | None = Field(None, description="Of the noise.")
    std: float | None = Field(None, description="Of the noise.")


class StreamInput(Answer):
    """The image as the network sees it, before its numbers are normalised."""

    height: int
    width: int
    channels: int
    pixels: str = Field(description="Base64 of height x width x channels bytes.")


class StreamSite(DropoutSite):
    """A place where the network draws noise, which is in each sample."""

    units: int = Field(description="Numbers drawn a sample, one bit or byte each.")


class StreamStart(Sampled):
    """Event `start` of `/uncertainty/stream`: what will be sampled, and how."""

    level: float
    classes: list[str]
    eval: Probabilities = Field(description="Probabilities in eval mode.")
    input: StreamInput
    sites: list[StreamSite]


class StreamSample(Answer):
    """Event `sample`: the probabilities of thinned network t, and statistics of the first t."""

    t: int = Field(description="Number of the sample, from 1.")
    probabilities: Probabilities
    mean: Probabilities
    standard_error: Probabilities | None
    degrees_of_freedom: int | None = Field(None, description="Of the standard error.")
    predictive_entropy: float
    expected_entropy: float
    mutual_information: float
    kept: list[str] = Field(
        description="Noise in base64, one string per site. Of a mask a bit per unit, most "
        "significant first, 1 = kept; of Gaussian noise a byte per unit, its quantile in 256ths."
    )


class StreamEnd(UncertaintyResponse):
    """Event `end`: what `/uncertainty` would have answered."""


StreamEvent = StreamStart | StreamSample | StreamEnd
EVENTS: Mapping[str, type[StreamEvent]] = {
    "start": StreamStart,
    "sample": StreamSample,
    "end": StreamEnd,
}
"""Events by name: one start, one sample per thinned network, one end. `error` is a `Problem`."""


class Input(Answer):
    """What an image is converted to before the network sees it."""

    height: int
    width: int
    channels: int
    mean: list[float]
    std: list[float]
    invert: bool
    fit: Literal["stretch", "crop", "pad"] = Field(
        "stretch", description="How images of another aspect ratio get this size."
    )


class Precision(Answer):
    """What Monte Carlo samples are computed in."""

    dtype: Literal["float32", "bfloat16"]
    speedup: float | None = Field(description="Of bfloat16 over float32; null: not measured.")
    error: float | None = Field(description="Largest change of a mean by bfloat16 on the probe.")


class Refused(Answer):
    """A version that cannot be loaded; it is tried again when its files change."""

    version: int
    reason: str


class ModelState(Answer):
    """Which versions of a model are served, and why others are not."""

    version: int | None = Field(None, description="Version for requests that name none.")
    versions: list[int]
    on_request: list[int] = Field(
        [], description="Versions of a model that is loaded when it is asked for, and is not now."
    )
    refused: list[Refused] = Field([], description="Versions that cannot be served, and why.")
    changed: list[Refused] = Field(
        [],
        description="Versions served from memory, and why their files cannot be loaded any more.",
    )
    pinned: int | None = Field(None, description="Pinned version; null: the latest answers.")
    pin_problem: str | None = Field(None, description="Why the pinned version does not answer.")


class ModelSummary(ModelState):
    """A model in the list of models."""

    name: str
    default: bool = Field(description="Whether /predict uses this model.")
    manifest_sha256: str | None = Field(
        None, description="Digest of manifest.json, hence of all files; null: no manifest."
    )


class ModelList(Answer):
    """All models that are served."""

    models: list[ModelSummary]


class ModelDetails(ModelSummary):
    """One version of a model."""

    version: int = Field(description="This version.")
    classes: list[str]
    input: Input
    training: Literal[False] = Field(description="Always false: the module is served in eval mode.")
    parameters: int
    sites: list[DropoutSite]
    device: str = Field("cpu", description="Where it runs: cpu, or cuda and the GPU's name.")
    path: Literal["folded", "vmap", "loop"] | None = Field(
        description="How Monte Carlo samples are run; folded is the fastest. Null: no noise."
    )
    precision: Precision | None
    network: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    sha256: str
    torch_version: str


class Example(Answer):
    """An image from the test set that the model was scored on."""

    label: str
    index: int = Field(description="Index of its class.")
    url: str = Field(description="Path of the PNG.")


class ExampleList(Answer):
    """Test images that are stored with a version; empty if none are."""

    model: str
    version: int
    examples: list[Example]


class Health(Answer):
    """Answer of `/livez`."""

    status: Literal["ok"]


class Readiness(Answer):
    """Answer of `/readyz` and `/healthz`."""

    status: Literal["ready"]
    models: dict[str, ModelState]
    problem: str | None = Field(
        None, description="Why new versions cannot be found now; what is served stays served."
    )


class Problem(BaseModel):
    """An error as RFC 9457 has it: `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
