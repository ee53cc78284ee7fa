"""What `/uncertainty/stream` sends: one start, a sample a thinned network, one end. Wire types."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.schemas import MaskKind, Probabilities, UncertaintyResponse


class _Event(BaseModel):
    """A field that a newer service adds is ignored by an older client."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class StreamInput(_Event):
    """The picture as the network sees it, before its numbers are normalised."""

    height: int
    width: int
    channels: int
    pixels: str = Field(description="Base64 of height x width x channels bytes.")


class StreamSite(_Event):
    """A dropout of the network, whose mask each sample tells."""

    name: str
    kind: str
    p: float
    shape: list[int]
    units: int = Field(description="Bits of its mask: what is kept or dropped as one.")


class StreamStart(_Event):
    """Event `start` of `/uncertainty/stream`: what will be sampled, and how."""

    model: str
    version: int
    method: Literal["dropout"]
    samples: int
    seed: int
    masks: MaskKind
    log_base: Literal["e"]
    level: float
    classes: list[str]
    eval: Probabilities = Field(description="Of eval mode, to compare with.")
    input: StreamInput
    sites: list[StreamSite]


class StreamSample(_Event):
    """Event `sample`: what thinned network t says, and all up to it together."""

    t: int = Field(description="From 1.")
    probabilities: Probabilities
    mean: Probabilities
    standard_error: Probabilities | None
    predictive_entropy: float
    expected_entropy: float
    mutual_information: float
    kept: list[str] = Field(
        description="Base64 of a mask a site: one bit a unit, the most significant first, 1 = kept."
    )


class StreamEnd(UncertaintyResponse):
    """Event `end`: what `/uncertainty` would have answered."""


StreamEvent = StreamStart | StreamSample | StreamEnd
