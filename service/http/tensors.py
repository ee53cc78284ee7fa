"""Tensors of the Open Inference Protocol, in JSON or as binary data, from and to arrays.

Binary data follows the JSON header of a message; integers and floats are little-endian, an element
of BYTES is its length (4 bytes) and then its bytes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dropserve.service.errors import InvalidRequest, MalformedRequest
from dropserve.service.http.body import (
    NUMBERS,
    BodyLimits,
    check_count,
    check_encoded,
    from_base64,
    from_pixels,
    read_each,
    to_pixels,
)
from dropserve.service.http.images import ImageSource, check_size, encoded
from dropserve.service.http.protocol import InputTensor
from dropserve.service.inference.decoder import Pixels

Pictures = Pixels | Sequence[bytes]
"""Pixels [B, H, W] or [B, H, W, C], or encoded pictures."""
Values = npt.NDArray[Any] | Sequence[str]
"""Of an output: float32 or int64 of any shape, or strings."""
_WHOLE = frozenset((int,))
HEADER = "Inference-Header-Content-Length"


def split(body: bytes, lengths: Sequence[bytes]) -> tuple[bytes, memoryview | None]:
    """Part the JSON of a message from its binary data.

    Args:
        body: all of it.
        lengths: values of the header that says how long the JSON is; none: all of the body.

    Raises:
        MalformedRequest: the header is there twice, no number, or more than there is.
    """
    if not lengths:
        return body, None
    (length, *more) = lengths
    if more or not length.isdigit() or len(length) > 18:
        raise MalformedRequest(f"{HEADER} must be a number, once")
    end = int(length)
    if not 0 < end <= len(body):
        raise MalformedRequest(f"{HEADER} must be from 1 to the bytes of the body")
    return body[:end], memoryview(body)[end:]


def read(
    tensor: InputTensor, binary: memoryview | None, limits: BodyLimits, scale: int
) -> Pictures:
    """Read the pictures of an input.

    Args:
        tensor: the input.
        binary: what followed the JSON, if the message had a header for it.
        limits: of number and size.
        scale: the number that is white.

    Raises:
        RequestError: shape, size and data do not agree, or are out of bounds.
    """
    shape = _check_shape(tensor, limits)
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise InvalidRequest("the input needs either `data` or the parameter binary_data_size")
    if tensor.datatype == "BYTES":
        check_encoded(scale)
    if size is None:
        if binary:
            raise MalformedRequest("there is binary data that no input names")
        return _from_json(tensor, shape, scale)
    if binary is None:
        raise MalformedRequest(f"binary data needs the header {HEADER}")
    if size != len(binary):
        raise MalformedRequest("binary_data_size is not the size of the binary data")
    return _from_binary(tensor, shape, binary, scale)


def pictures(found: Pictures, limits: BodyLimits) -> list[ImageSource]:
    """Make pictures of what `read` found."""
    if isinstance(found, np.ndarray):
        return from_pixels(found)
    return read_each(found, lambda data: encoded(data, None, limits.image))


def write(name: str, values: Values, *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """Write an output: its part of the JSON, and its binary data, if any.

    Args:
        name: the output's.
        values: its elements.
        binary: whether values go into binary data.
    """
    tensor: dict[str, Any] = {"name": name}
    if isinstance(values, np.ndarray):
        kind = "FP32" if values.dtype == np.float32 else "INT64"
        tensor |= {"datatype": kind, "shape": list(values.shape)}
    else:
        tensor |= {"datatype": "BYTES", "shape": [len(values)]}
    if not binary:
        return tensor | {"data": values.ravel() if isinstance(values, np.ndarray) else values}, b""
    if isinstance(values, np.ndarray):
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    else:
        data = b"".join(map(_counted, values))
    return tensor | {"parameters": {"binary_data_size": len(data)}}, data


def _check_shape(tensor: InputTensor, limits: BodyLimits) -> tuple[int, ...]:
    """Return the shape, if it is one that pictures have and within limits."""
    shape = tuple(tensor.shape)
    count, sides, channels = shape[:1], shape[1:3], shape[3:]
    if tensor.datatype == "BYTES":
        if not count or shape[1:] not in ((), (1,)):
            raise InvalidRequest("the shape of encoded pictures must be [B] or [B, 1]")
    elif len(sides) != 2 or channels not in ((), (1,), (3,)):
        raise InvalidRequest("the shape of pixels must be [B, H, W] or [B, H, W, C], C 1 or 3")
    check_count(count[0], limits)
    if tensor.datatype != "BYTES":
        check_size((sides[1], sides[0]), limits.image)
    return shape


def _from_json(tensor: InputTensor, shape: tuple[int, ...], scale: int) -> Pictures:
    unlike = InvalidRequest("the data does not fit the shape")
    try:
        items = np.array(tensor.data, dtype=object)
    except ValueError as error:  # lists of different lengths
        raise unlike from error
    if items.shape not in (shape, (math.prod(shape),)):
        raise unlike
    if tensor.datatype == "BYTES":
        return [from_base64(item) for item in items.flat]
    items = items.reshape(shape)
    return to_pixels(items, scale, _WHOLE if tensor.datatype == "UINT8" else NUMBERS)


def _from_binary(
    tensor: InputTensor, shape: tuple[int, ...], data: memoryview, scale: int
) -> Pictures:
    if tensor.datatype == "BYTES":
        return list(_elements(data, shape[0]))
    size = 1 if tensor.datatype == "UINT8" else 4
    if size * math.prod(shape) != len(data):
        raise MalformedRequest("the size of the binary data does not fit the shape")
    numbers = np.frombuffer(data, np.uint8 if size == 1 else "<f4").reshape(shape)
    return numbers if size == 1 and scale == 255 else to_pixels(numbers, scale)


def _elements(data: memoryview, count: int) -> Iterator[bytes]:
    """Cut BYTES into elements: exactly as many, and nothing left over."""
    wrong = MalformedRequest("the binary data is not as many elements as the shape says")
    start = 0
    for _ in range(count):
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if start + 4 > len(data) or end > len(data):
            raise wrong
        yield bytes(data[start + 4 : end])
        start = end
    if start != len(data):
        raise wrong


def _counted(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "little") + data
