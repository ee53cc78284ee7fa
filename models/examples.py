"""Pictures of a test set that are saved with the model, to try it with."""

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dropserve.models.data import Split
from dropserve.models.errors import ConfigError
from dropserve.models.preprocessing import Pixels, Preprocessing

COUNT = 24
"""Most pictures that are saved."""
_MAX_BYTES = 2**19
"""Of all pictures of a model, as text: half of what `model.json` may have."""


@dataclass(frozen=True)
class Example:
    """One picture.

    Attributes:
        index: of its class.
        png: a PNG file in base64: `Preprocessing.prepare` makes of it what is in the test set.
    """

    index: int
    png: str

    @property
    def file(self) -> bytes:
        """The PNG file."""
        return base64.b64decode(self.png)


def choose(test: Split, classes: int, preprocessing: Preprocessing) -> tuple[Example, ...]:
    """Take the first pictures of each class, as many of one as of another, at most `COUNT`.

    Args:
        test: pixels as the network sees them.
        classes: how many there are; where they are more than `COUNT`, the last have none.
        preprocessing: by which pictures become pixels.
    """
    members = [(test.labels == k).nonzero().flatten().tolist() for k in range(classes)]
    each = max(1, COUNT // classes)
    turns = [
        (k, found[turn])
        for turn in range(each)
        for k, found in enumerate(members)
        if turn < len(found)
    ]
    chosen: list[Example] = []
    room = _MAX_BYTES
    for k, row in turns[:COUNT]:
        example = Example(k, _encode(test.images[row].numpy(), preprocessing))
        room -= len(example.png)
        if room < 0:
            break
        chosen.append(example)
    return tuple(chosen)


def examples_from_json(
    values: object, classes: Sequence[str], preprocessing: Preprocessing
) -> tuple[Example, ...]:
    """Rebuild examples from JSON, and look at each: a file may say anything.

    Raises:
        ConfigError: one is not a picture of the network's size, or of no class.
    """
    if not isinstance(values, list) or len(values) > COUNT:
        raise ConfigError(f"examples: a list of at most {COUNT} is needed")
    return tuple(
        _read(f"examples[{i}]", value, classes, preprocessing) for i, value in enumerate(values)
    )


def _read(
    where: str, value: object, classes: Sequence[str], preprocessing: Preprocessing
) -> Example:
    if not isinstance(value, dict) or value.keys() != {"index", "png"}:
        raise ConfigError(f"{where}: `index` and `png` are needed, and nothing else")
    index = value["index"]
    if type(index) is not int or not 0 <= index < len(classes):
        raise ConfigError(f"{where}.index: a whole number from 0 to {len(classes) - 1} is needed")
    try:
        _check(base64.b64decode(value["png"], validate=True), preprocessing)
    except Exception as error:  # Pillow's parsers raise whatever a bad file makes them
        raise ConfigError(f"{where}.png: {error}") from error
    return Example(index, value["png"])


def _check(file: bytes, preprocessing: Preprocessing) -> None:
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


def _encode(pixels: Pixels, preprocessing: Preprocessing) -> str:
    """Write pixels [C, H, W] as a picture of which `preprocessing` makes the same pixels."""
    seen = 255 - pixels if preprocessing.invert else pixels
    seen = np.ascontiguousarray(seen.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(seen[..., 0] if preprocessing.channels == 1 else seen).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
