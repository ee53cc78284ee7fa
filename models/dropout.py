"""The dropout layers under the name that networks of one's own import them by."""

from dropserve.models.regularizers.dropout import *  # noqa: F403
from dropserve.models.regularizers.noise import Elementwise as Dropout  # noqa: F401
