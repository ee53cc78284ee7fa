"""From an image to a network's input; saved in the checkpoint and the same to train and serve."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor

from dropserve.models.errors import ConfigError
from dropserve.models.storage import parse_dataclass

Pixels = npt.NDArray[np.uint8]
Fit = Literal["stretch", "crop", "pad"]
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright (Exif 3.0, tag 0x0112)."""


@dataclass(frozen=True)
class Preprocessing:
    """Size, channels and scale of a network's input; ConfigError if a value is invalid.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: of each channel, in units of 0 to 1, subtracted.
        std: of each channel, in units of 0 to 1, divided by.
        invert: turn dark into light first, for networks trained on light strokes on black.
        fit: how an image of other proportions gets the size: "stretch" changes its proportions,
            "crop" scales its shorter side and cuts off the ends of the longer one, "pad" scales its
            longer side and fills the rest with what the network sees as 0.
        draft: decode large JPEGs at 1/2, 1/4 or 1/8 of their size. Checkpoints of earlier releases
            lack the field: they were trained on JPEGs decoded in full, and are served so.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    invert: bool = False
    fit: Fit = "stretch"
    draft: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"channels must be 1 or 3, not {self.channels!r}")
        if len(self.size) != 2 or not all(0 < side <= 4096 for side in self.size):
            raise ConfigError(f"size must be (height, width), 1 to 4096 pixels, not {self.size!r}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError("mean and std need one value a channel")
        if not all(np.isfinite((*self.mean, *self.std))) or not all(s > 0 for s in self.std):
            raise ConfigError("mean and std must be finite, std above 0")
        if self.fit not in get_args(Fit):
            raise ConfigError(f"fit must be stretch, crop or pad, not {self.fit!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Input shape of the network: (channels, height, width)."""
        return (self.channels, *self.size)

    def set_scale(self, image: Image.Image) -> None:
        """Have an open JPEG decoded at the smallest scale of at least twice the network's size.

        To that size `prepare` averages before it interpolates. Without `draft`: in full.
        """
        if self.draft:
            height, width = 2 * self.size[0], 2 * self.size[1]
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            image.draft(None, (height, width) if turned else (width, height))

    def prepare(self, image: Image.Image) -> Pixels:
        """Turn an image of any size and mode into the network's pixels, uint8 [C, H, W].

        EXIF orientation is applied, transparency becomes white, colour profiles are ignored.
        """
        mode = "L" if self.channels == 1 else "RGB"
        if image.mode != mode or image.info:  # where orientation and transparency would be
            # not ImageOps.exif_transpose: it writes EXIF anew, in a hundred times the memory
            transposed = _TRANSPOSED.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            image = image if transposed is None else image.transpose(transposed)
            image = _flatten(image, mode)
        height, width = self.size
        if image.size != (width, height):
            image = self._fitted(image)
        image.load()
        # what image.tobytes() does, in half the time; a bytearray, so that it may be written to
        encoder = Image.core.raw_encoder(mode, mode, 0, 1)  # type: ignore[attr-defined]
        encoder.setimage(image.im, (0, 0, width, height))
        raw = bytearray(encoder.encode(width * height * self.channels)[2])
        pixels = np.frombuffer(raw, np.uint8).reshape(height, width, self.channels)
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return 255 - pixels if self.invert else pixels

    def _fitted(self, image: Image.Image) -> Image.Image:
        (height, width), (w, h) = self.size, image.size
        scales = width / w, height / h
        box = (0.0, 0.0, float(w), float(h))  # the part of the image that is used
        inner = width, height  # what it fills of the network's input
        if self.fit == "crop":
            used = min(width / max(scales), w), min(height / max(scales), h)
            left, top = (w - used[0]) / 2, (h - used[1]) / 2
            box = left, top, min(left + used[0], w), min(top + used[1], h)
        elif self.fit == "pad":
            inner = (max(round(w * min(scales)), 1), max(round(h * min(scales)), 1))
        image = image.resize(inner, Image.Resampling.BILINEAR, box, reducing_gap=2.0)
        if inner == (width, height):
            return image
        padded = Image.new(image.mode, (width, height), "white" if self.invert else "black")
        padded.paste(image, (round((width - inner[0]) / 2), round((height - inner[1]) / 2)))
        return padded

    def normalize(self, pixels: Tensor) -> Tensor:
        """Map uint8 [B, C, H, W] to float32 by mean and std."""
        scale, shift = _affine(self, pixels.device)
        return pixels.float().mul_(scale).add_(shift)  # a third of the time of addcmul over uint8

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json()`; ConfigError if a value is missing or invalid."""
        return parse_dataclass("preprocessing", cls, values, optional=("fit", "draft"))

    @classmethod
    def measured(cls, batches: Iterable[Tensor]) -> Self:
        """Take size, channels, mean and std from training images, uint8 [B, C, H, W] each.

        They are counted by grey value, so that the result is exact however they are batched.
        """
        counts = torch.zeros(0)
        for pixels in batches:
            size = int(pixels.shape[2]), int(pixels.shape[3])
            channels = pixels.transpose(0, 1).flatten(1)  # [C, B * H * W]
            here = torch.stack([torch.bincount(x, minlength=256) for x in channels])
            counts = counts + here if counts.numel() else here
        values, total = torch.arange(256).double() / 255, counts.sum(1, keepdim=True)
        mean = (counts * values).sum(1, keepdim=True) / total
        squares = (counts * (values - mean).square()).sum(1, keepdim=True)
        std = (squares / (total - 1)).sqrt()
        means = tuple(round(v, 4) for v in mean.flatten().tolist())
        stds = tuple(max(round(v, 4), 1e-3) for v in std.flatten().tolist())
        return cls(size, len(means), means, stds)


@lru_cache(maxsize=64)
def _affine(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what pixels are multiplied by, and what is then added: [C, 1, 1] each."""
    with torch.inference_mode(mode=False):  # training uses them too
        std = torch.tensor(preprocessing.std, device=device).view(-1, 1, 1)
        mean = torch.tensor(preprocessing.mean, device=device).view(-1, 1, 1)
        return 1 / (255 * std), -mean / std


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Composite transparent pixels over white, and convert to `mode`."""
    if not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    flat = Image.new(mode, image.size, None)
    rows = max(1, 2**18 // image.width)  # all at once would take five times the image's memory
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        part = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        flat.paste(Image.alpha_composite(white, part).convert("RGB").convert(mode), box)
    return flat
