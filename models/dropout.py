"""The dropout layers under the name that networks of one's own import them by."""

from dropserve.models.regularizers.dropout import (
    InvertedDropout,
    SpatialDropout,
    VanillaDropout,
    inverted_dropout,
    spatial_dropout,
    vanilla_dropout,
)

__all__ = [
    "InvertedDropout",
    "SpatialDropout",
    "VanillaDropout",
    "inverted_dropout",
    "spatial_dropout",
    "vanilla_dropout",
]
