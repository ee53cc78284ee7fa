"""Defaults of models and service alike; it loads nothing, because the client imports it."""

from typing import Literal

DEFAULT_SAMPLES = 100
"""T where nobody says otherwise."""
MaskKind = Literal["stratified", "independent"]
