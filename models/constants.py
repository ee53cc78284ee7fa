"""What models and service share; it loads nothing, because the client imports it."""

from typing import Literal

DEFAULT_SAMPLES = 100
"""T where nobody says otherwise."""
MaskKind = Literal["stratified", "independent"]
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of the formats that are read."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""How the names of such files end."""
