"""Messages and tensors of the Open Inference Protocol, version 2, as this service speaks it.

https://github.com/kserve/open-inference-protocol, with Triton's extensions: binary data follows the
JSON of a message, numbers little-endian, an element of BYTES its length (4 bytes) and its bytes.
"""

import math
import struct
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dropserve.service.errors import InvalidRequest, MalformedRequest
from dropserve.service.http import body
from dropserve.service.http.decoding import Pixels
from dropserve.service.http.images import check_size
from dropserve.service.schemas import Answer, SamplingOptions, Sent

HEADER = "Inference-Header-Content-Length"
Output = StrEnum(
    "Output",
    "probabilities index label mean variance standard_error degrees_of_freedom predictive_entropy "
    "expected_entropy mutual_information variation_ratio lower upper",
)
PLAIN, SAMPLED = (*Output,)[:3], (*Output,)[3:]
"""Outputs of eval mode, and of Monte Carlo dropout; `lower` and `upper` bound the interval."""
ROWS = ("probabilities", "mean", "variance", "standard_error", "lower", "upper")
"""Outputs with one number per class."""
DATATYPES = {"index": "INT64", "degrees_of_freedom": "INT64", "label": "BYTES"}
"""Datatypes of outputs; the others are FP32."""
Ignored = Annotated[str | int | float | bool | None, Field(description="Accepted and ignored.")]


def _allow_null(schema: dict[str, Any]) -> None:
    """Say in a schema that null stands for a member that is left out."""
    for name, member in schema["properties"].items():
        if name not in schema.get("required", ()) and "null" not in str(member):
            about = {k: member.pop(k) for k in ("title", "description", "default") if k in member}
            schema["properties"][name] = {"anyOf": [member, {"type": "null"}], **about}


class Strict(Sent):
    """Part of a message: an unknown name is refused, and no type is converted."""

    model_config = ConfigDict(strict=True, json_schema_extra=_allow_null)


class InferParameters(Strict, SamplingOptions):
    """How to answer."""

    mode: Literal["predict", "uncertainty"] | None = Field(
        None, description="uncertainty adds the outputs of Monte Carlo dropout."
    )
    binary_data_output: bool = Field(False, description="All outputs as binary data.")
    timeout: int = Field(
        0, ge=0, lt=2**63, description="Microseconds in the queue, then 503; 0: no limit."
    )
    priority: Ignored = None
    content_type: Ignored = None
    sequence_id: Ignored = None
    sequence_start: Ignored = None
    sequence_end: Ignored = None


class InputParameters(Strict):
    """Parameters of the input."""

    binary_data_size: int | None = Field(None, ge=0)
    content_type: Ignored = None


class InputTensor(Strict):
    """Images: pixels [B, H, W] or [B, H, W, C], C 1 or 3; or encoded ones, [B] or [B, 1]."""

    name: Literal["image"]
    shape: list[Annotated[int, Field(ge=1)]] = Field(max_length=4)
    datatype: Literal["UINT8", "FP32", "BYTES"]
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = Field(None, description="Nested or flat; BYTES are base64 strings.")


class OutputParameters(Strict):
    """Parameters of a requested output."""

    binary_data: bool | None = None


class RequestedOutput(Strict):
    """An output to return."""

    name: Output = Field(strict=False)  # JSON's strings are no members of it yet
    parameters: OutputParameters = OutputParameters()


class InferRequest(Strict):
    """Body of `infer`, or the part of it before binary data."""

    # half a surrogate pair, which no answer could repeat, cannot be encoded
    id: Annotated[str, AfterValidator(lambda text: text.encode().decode())] | None = None
    model_name: str | None = Field(None, description="The path's; KServe's client sends it.")
    model_version: str | None = Field(None, description="The one that answers, or empty.")
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] = Field(
        [], max_length=len(Output), description="None: all that the mode has."
    )


class Tensor(Answer):
    """A tensor, or in metadata its type: no data, and -1 for any size."""

    name: str
    datatype: Literal["UINT8", "FP32", "INT64", "BYTES"]
    shape: list[int]
    parameters: dict[str, int] | None = Field(None, description="binary_data_size, or no member.")
    data: list[float | int | str] | None = Field(None, description="Row-major and flat.")


class InferResponse(Answer):
    """Answer of `infer`."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="How the model was sampled.")
    outputs: list[Tensor]


class ModelMetadata(Answer):
    """Versions and tensors of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class IndexRequest(Strict):
    """Which versions to list."""

    ready: bool = Field(False, description="Only those that are ready.")


class LoadRequest(Strict):
    """Body of `load`; none of Triton's parameters, which bring a configuration or files along."""

    parameters: Strict = Strict()


class UnloadParameters(Strict):
    """Parameters of `unload`."""

    unload_dependents: bool = Field(False, description="Ignored: no model has dependents.")


class UnloadRequest(Strict):
    """Body of `unload`."""

    parameters: UnloadParameters = UnloadParameters()


class ProtocolError(BaseModel):
    """Any failure under /v2."""

    error: str


def split(message: bytes, lengths: Sequence[str]) -> tuple[bytes, memoryview]:
    """Split a message into its JSON, as long as the header's values say, and its binary data."""
    if not lengths:
        return message, memoryview(b"")
    end = int(lengths[0]) if lengths[0].isdecimal() and len(lengths[0]) < 19 else 0
    if len(lengths) > 1 or not 0 < end <= len(message):
        raise MalformedRequest(f"{HEADER} must be there once, from 1 to the bytes of the body")
    return message[:end], memoryview(message)[end:]


def read(
    tensor: InputTensor, binary: memoryview, limits: body.BodyLimits, scale: int
) -> Pixels | list[bytes]:
    """Return the pixels [B, H, W] or [B, H, W, C] of an input, or its encoded images.

    Raises:
        RequestError: shape, size and data do not agree, or are out of bounds.
    """
    shape, size = tuple(tensor.shape), tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise InvalidRequest("the input needs either `data` or the parameter binary_data_size")
    if len(binary) != (size or 0):
        raise MalformedRequest(f"binary_data_size is not the bytes that follow the JSON ({HEADER})")
    encoded, whole = tensor.datatype == "BYTES", tensor.datatype == "UINT8"
    if encoded and (not shape or shape[1:] not in ((), (1,))):
        raise InvalidRequest("the shape of encoded images must be [B] or [B, 1]")
    if not encoded and (len(shape) < 3 or shape[3:] not in ((), (1,), (3,))):
        raise InvalidRequest("the shape of pixels must be [B, H, W] or [B, H, W, C], C 1 or 3")
    body.check_count(shape[0], limits)
    if encoded:
        body.check_encoded(scale)
        if size is not None:
            return _split_bytes(binary, shape[0])
        return [body.from_base64(item) for item in _elements(tensor).flat]
    check_size((shape[2], shape[1]), limits.image)
    if size is None:
        kinds = frozenset([int]) if whole else body.NUMBERS
        return body.to_pixels(_elements(tensor), scale, kinds)
    if size != (1 if whole else 4) * math.prod(shape):
        raise MalformedRequest("the size of the binary data does not fit the shape")
    numbers = np.frombuffer(binary, np.uint8 if whole else "<f4").reshape(shape)
    return numbers if whole and scale == 255 else body.to_pixels(numbers, scale)


def _elements(tensor: InputTensor) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Return the elements of a tensor's JSON in its shape."""
    try:
        elements = np.array(tensor.data, dtype=object)
    except ValueError:  # lists of different lengths
        elements = np.empty(0, object)
    if elements.shape not in (tuple(tensor.shape), (math.prod(tensor.shape),)):
        raise InvalidRequest("the data does not fit the shape")
    return elements.reshape(tensor.shape)


def _split_bytes(data: memoryview, count: int) -> list[bytes]:
    """Split BYTES into its elements: exactly as many, and nothing left over."""
    elements, end = [], 0
    for _ in range(count):
        start = end + 4
        end = start + int.from_bytes(data[end:start], "little")
        elements.append(bytes(data[start:end]))
    if end != len(data):
        raise MalformedRequest("the binary data is not as many elements as the shape says")
    return elements


def describe(name: str, classes: int) -> dict[str, Any]:
    """Return the metadata of an output."""
    shape = [-1, classes] if name in ROWS else [-1]
    return {"name": name, "datatype": DATATYPES.get(name, "FP32"), "shape": shape}


def write(name: str, values: Sequence[Any], *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """Return an output's part of the JSON, and its binary data: none unless `binary`."""
    datatype = DATATYPES.get(name, "FP32")
    if datatype == "BYTES":
        shape, data = (
            [len(values)],
            b"".join(struct.pack("<I", len(t)) + t for t in map(str.encode, values)),
        )
    else:
        array = np.array(values, "<i8" if datatype == "INT64" else "<f4")
        shape, values, data = list(array.shape), array.ravel(), array.tobytes()
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    if binary:
        return tensor | {"parameters": {"binary_data_size": len(data)}}, data
    return tensor | {"data": values}, b""
