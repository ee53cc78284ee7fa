"""Object storage: S3, Google Cloud Storage, Azure Blob Storage, and what speaks their protocols.

By obstore, the bindings of the object_store crate: one wheel without dependencies for all of them,
with conditional writes, retries and time limits. Credentials, endpoints, regions and limits of time
come from its environment variables, AWS_*, GOOGLE_* and AZURE_*.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from dropserve.models.errors import StorageUnavailable

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_RETRIES = 3
_RETRY_SECONDS = 20
"""Seconds after which a request is not sent again."""
_REMEDIES = {
    "AccessDenied": "check what the credentials allow",
    "ExpiredToken": "renew the credentials",
    "InvalidAccessKeyId": "check the credentials",
    "InvalidToken": "renew the credentials",
    "NoSuchBucket": "check the bucket's name",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "check the credentials",
}
_CAUSES = {
    "TimedOut|timed out": "no answer in time",
    "dns error|[Cc]onnection refused|ConnectError": "no connection: check the network and endpoint",
    "IncompleteMessage|UnexpectedEof|reset|ConnectionAborted": "the connection broke",
}
"""By what their libraries call them, in the text of an error."""
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")


def open_store(url: str) -> "ObjectStore":
    """Open what lies under a URL, scheme://bucket/prefix; StorageUnavailable: it cannot be.

    It needs no connection yet.
    """
    from obstore import store
    from obstore.exceptions import BaseError

    limits = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)}
    try:
        return store.from_url(url, retry_config=limits)  # type: ignore[call-overload,no-any-return]
    except (BaseError, ValueError) as error:
        raise StorageUnavailable(f"{url}: {_reason(error)}") from error


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Raise StorageUnavailable, `what` could not be done and why, for errors of the storage.

    FileNotFoundError and obstore's AlreadyExistsError are the caller's.
    """
    from obstore import exceptions

    try:
        yield
    except exceptions.AlreadyExistsError:
        raise
    except exceptions.BaseError as error:
        raise StorageUnavailable(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Shorten an error, which lists its causes over many lines, to what an operator can act on."""
    text = str(error)
    if found := _CODE.search(text):
        code = found[1]
        return f"{code}: {_REMEDIES[code]}" if code in _REMEDIES else code
    for signs, reason in _CAUSES.items():
        if re.search(signs, text):
            return reason
    return " ".join(text.partition("\n")[0].split())[:300]
