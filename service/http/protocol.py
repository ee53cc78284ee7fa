"""Open Inference Protocol, version 2: its messages, as this service speaks it over HTTP.

https://github.com/kserve/open-inference-protocol, and Triton's extensions for binary tensor data
and model repositories. What is sent is read strictly: an unknown name is an error.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from dropserve.service.schemas import SamplingOptions, Sent

Datatype = Literal["UINT8", "FP32", "BYTES"]
"""Of the input: pixels 0 to 255, the same as numbers to be rounded, encoded pictures."""
Plain = Literal["probabilities", "index", "label"]
"""Outputs of eval mode."""
Sampled = Literal[
    "mean",
    "variance",
    "standard_error",
    "degrees_of_freedom",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "variation_ratio",
    "lower",
    "upper",
]
"""Outputs of Monte Carlo dropout; `lower` and `upper` bound the interval."""
PLAIN: tuple[str, ...] = get_args(Plain)
SAMPLED: tuple[str, ...] = get_args(Sampled)
Output = Literal[Plain, Sampled]
ROWS = ("probabilities", "mean", "variance", "standard_error", "lower", "upper")
"""Outputs that have a figure a class."""
INTEGERS = ("index", "degrees_of_freedom")
"""Outputs that are whole numbers."""


_ABOUT = ("title", "description", "default")
"""What a schema says of a member beside its type."""


def _sound(text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half a surrogate pair is no text")
    return text


class Strict(Sent):
    """Part of a message: JSON's types are not converted, and null is a member that is left out."""

    model_config = ConfigDict(strict=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Let the schema say so."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        for name, found in schema["properties"].items():
            if name not in schema.get("required", ()) and "null" not in str(found):
                about = {key: found.pop(key) for key in _ABOUT if key in found}
                schema["properties"][name] = {"anyOf": [found, {"type": "null"}], **about}
        return reference


Ignored = Annotated[
    str | int | float | bool | None,
    Field(description="Accepted, because clients send it, and ignored."),
]


class InferParameters(Strict, SamplingOptions):
    """How to answer."""

    mode: Annotated[
        Literal["predict", "uncertainty"] | None,
        Field(description="uncertainty adds the outputs of Monte Carlo dropout."),
    ] = None
    binary_data_output: Annotated[bool, Field(description="All outputs as binary data.")] = False
    timeout: Annotated[
        int,
        Field(
            ge=0,
            le=2**63 - 1,
            description="Microseconds to wait in the queue at most; what has not begun to run by "
            "then never does, and is 503. 0: no limit.",
        ),
    ] = 0
    priority: Ignored = None
    content_type: Ignored = None
    sequence_id: Ignored = None
    sequence_start: Ignored = None
    sequence_end: Ignored = None


class InputParameters(Strict):
    """Of the input."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    content_type: Ignored = None


class InputTensor(Strict):
    """Pictures: [B, H, W] or [B, H, W, C] pixels, C 1 or 3; or [B] or [B, 1] encoded ones."""

    name: Literal["image"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=4)]
    datatype: Datatype
    parameters: InputParameters = Field(default_factory=InputParameters)
    data: Annotated[
        list[Any] | None,
        Field(description="Row-major, nested or flat; BYTES are base64 strings."),
    ] = None


class OutputParameters(Strict):
    """Of a requested output."""

    binary_data: bool | None = None


class RequestedOutput(Strict):
    """An output to return."""

    name: Output
    parameters: OutputParameters = Field(default_factory=OutputParameters)


class InferRequest(Strict):
    """Body of `infer`, or the part of it before binary data."""

    id: Annotated[str, AfterValidator(_sound)] | None = None
    model_name: Annotated[
        str | None, Field(description="Must be the path's; KServe's client sends it.")
    ] = None
    model_version: Annotated[
        str | None, Field(description="Must be the one that answers, or empty.")
    ] = None
    parameters: InferParameters = Field(default_factory=InferParameters)
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[
        list[RequestedOutput],
        Field(
            default_factory=list,
            max_length=len(get_args(Output)),
            description="Left out, or empty: all that the mode has.",
        ),
    ]


class OutputTensor(BaseModel):
    """An output: `data`, or `binary_data_size` in its parameters."""

    name: str
    shape: list[int]
    datatype: Literal["FP32", "INT64", "BYTES"]
    parameters: dict[str, int] | None = None
    data: list[float | int | str] | None = Field(None, description="Row-major and flat.")


class InferResponse(BaseModel):
    """Answer of `infer`."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="How was sampled.")
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """Name, type and shape of a tensor; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model's versions and tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """The server lives."""

    live: bool


class Ready(BaseModel):
    """The server is ready."""

    ready: bool


class ModelReady(Ready):
    """A model is ready."""

    name: str


class IndexRequest(Strict):
    """Which models to list."""

    ready: Annotated[bool, Field(description="Only those that are ready.")] = False


class LoadParameters(Strict):
    """None of Triton's, which bring a configuration or files along."""


class LoadRequest(Strict):
    """Body of `load`."""

    parameters: LoadParameters = Field(default_factory=LoadParameters)


class UnloadParameters(Strict):
    """Of `unload`."""

    unload_dependents: Annotated[bool, Field(description="Ignored: no model has dependents.")] = (
        False
    )


class UnloadRequest(Strict):
    """Body of `unload`."""

    parameters: UnloadParameters = Field(default_factory=UnloadParameters)


class IndexEntry(BaseModel):
    """A version in the repository."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class ProtocolError(BaseModel):
    """Any failure under /v2."""

    error: str
