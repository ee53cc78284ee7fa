"""Images of a test set that are saved with the model, to try it with."""

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dropserve.models.data import Split
from dropserve.models.errors import ConfigError
from dropserve.models.preprocessing import Pixels, Preprocessing

COUNT = 24
"""Examples of a model, at most."""
_MAX_BYTES = 2**19
"""Of all examples of a model, as text: half of what `model.json` may have."""


@dataclass(frozen=True)
class Example:
    """A PNG in base64, which `prepare` maps to the test set's pixels, and its class's index."""

    index: int
    png: str

    @property
    def file(self) -> bytes:
        """The PNG file."""
        return base64.b64decode(self.png)


def choose(test: Split, classes: int, preprocessing: Preprocessing) -> tuple[Example, ...]:
    """Take the first images of each class, as many of each, at most `COUNT` and `_MAX_BYTES`."""
    members = [(test.labels == k).nonzero().flatten().tolist() for k in range(classes)]
    candidates = [
        (k, rows[i])
        for i in range(max(1, COUNT // classes))
        for k, rows in enumerate(members)
        if i < len(rows)
    ]
    chosen: list[Example] = []
    images = test.take(
        torch.tensor([row for _, row in candidates[:COUNT]], dtype=torch.int64)
    ).images
    for (k, _), pixels in zip(candidates, images, strict=False):
        chosen.append(Example(k, _encode(pixels.numpy(), preprocessing)))
        if sum(len(example.png) for example in chosen) > _MAX_BYTES:
            return tuple(chosen[:-1])
    return tuple(chosen)


def _encode(pixels: Pixels, preprocessing: Preprocessing) -> str:
    """Write pixels [C, H, W] as an image that `preprocessing` maps to the same pixels."""
    seen = 255 - pixels if preprocessing.invert else pixels
    seen = np.ascontiguousarray(seen.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(seen[..., 0] if preprocessing.channels == 1 else seen).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def examples_from_json(
    values: object, classes: Sequence[str], preprocessing: Preprocessing
) -> tuple[Example, ...]:
    """Rebuild examples from untrusted JSON; ConfigError names the invalid one."""
    if not isinstance(values, list) or len(values) > COUNT:
        raise ConfigError(f"examples: a list of at most {COUNT} is needed")
    for i, value in enumerate(values):
        where = f"examples[{i}]"
        if not isinstance(value, dict) or value.keys() != {"index", "png"}:
            raise ConfigError(f"{where}: `index` and `png` are needed, and nothing else")
        if type(value["index"]) is not int or not 0 <= value["index"] < len(classes):
            raise ConfigError(f"{where}.index: an integer from 0 to {len(classes) - 1} is needed")
        try:
            _check_png(base64.b64decode(value["png"], validate=True), preprocessing)
        except Exception as error:  # Pillow's parsers raise anything for a bad file
            raise ConfigError(f"{where}.png: {error}") from error
    return tuple(Example(**value) for value in values)


def _check_png(file: bytes, preprocessing: Preprocessing) -> None:
    """Raise an error if a file is not a plain PNG of the network's size and channels."""
    height, width = preprocessing.size
    kind = b"\x08\0" if preprocessing.channels == 1 else b"\x08\2"  # bit depth, colour type
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + kind
    if not file.startswith(head):
        raise ValueError(f"not a PNG of {width} x {height} pixels as the network sees them")
    with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
        image.load()
        if image.info or getattr(image, "is_animated", False):
            raise ValueError("it holds more than pixels")
