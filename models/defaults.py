"""Defaults of models and service alike, and names; it loads nothing: the client imports it."""

from typing import Literal

DEFAULT_SAMPLES = 100
"""T where nobody says otherwise."""
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "auto"]
MaskKind = Literal["stratified", "independent"]
