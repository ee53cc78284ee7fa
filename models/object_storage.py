"""Object storage by its URL."""

from typing import Any

from dropserve.models.errors import ConfigError


def open_store(url: str) -> Any:  # noqa: ANN401  obstore's stores have no common class
    """Open a bucket, container or folder, and a prefix in it: s3://, gs://, az:// or file://.

    Credentials, region and endpoint are read from the environment, as the providers name them.
    ConfigError: obstore is not installed, or the URL is none of its.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise ConfigError(
            "install dropserve[ray] for obstore, which reads object storage"
        ) from error
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise ConfigError(f"{url}: no object storage: {error}") from error
