"""The dropout layers under the name that networks of one's own import them by."""

from dropserve.models.regularizers.dropout import (  # noqa: F401
    InvertedDropout,
    SpatialDropout,
    VanillaDropout,
    inverted_dropout,
    spatial_dropout,
    vanilla_dropout,
)
