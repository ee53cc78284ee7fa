"""What `/uncertainty/stream` sends: one start, a sample a thinned network, one end. Wire types."""

from collections.abc import Mapping

from pydantic import Field

from dropserve.service.schemas import (
    Answer,
    DropoutSite,
    Probabilities,
    Sampled,
    UncertaintyResponse,
)


class StreamInput(Answer):
    """The picture as the network sees it, before its numbers are normalised."""

    height: int
    width: int
    channels: int
    pixels: str = Field(description="Base64 of height x width x channels bytes.")


class StreamSite(DropoutSite):
    """A dropout of the network, whose mask each sample tells."""

    units: int = Field(description="Bits of its mask: what is kept or dropped as one.")


class StreamStart(Sampled):
    """Event `start` of `/uncertainty/stream`: what will be sampled, and how."""

    level: float
    classes: list[str]
    eval: Probabilities = Field(description="Of eval mode, to compare with.")
    input: StreamInput
    sites: list[StreamSite]


class StreamSample(Answer):
    """Event `sample`: what thinned network t says, and all up to it together."""

    t: int = Field(description="From 1.")
    probabilities: Probabilities
    mean: Probabilities
    standard_error: Probabilities | None
    degrees_of_freedom: int | None = Field(None, description="Of the standard error.")
    predictive_entropy: float
    expected_entropy: float
    mutual_information: float
    kept: list[str] = Field(
        description="Base64 of a mask a site: one bit a unit, the most significant first, 1 = kept."
    )


class StreamEnd(UncertaintyResponse):
    """Event `end`: what `/uncertainty` would have answered."""


StreamEvent = StreamStart | StreamSample | StreamEnd
EVENTS: Mapping[str, type[StreamEvent]] = {
    "start": StreamStart,
    "sample": StreamSample,
    "end": StreamEnd,
}
"""By the name that they are sent under; `error` is a `dropserve.service.schemas.Problem`."""
