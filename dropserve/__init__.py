"""Image classifiers with dropout: `dropserve.models` trains them, `dropserve.service` serves them.

`DropserveClient` and `AsyncDropserveClient` are loaded when they are asked for, without PyTorch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dropserve.service.client import AsyncDropserveClient, DropserveClient

__all__ = ["AsyncDropserveClient", "DropserveClient"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dropserve.service import client

    return getattr(client, name)
