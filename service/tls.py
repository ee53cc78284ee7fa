"""HTTPS: the certificate, and how long a TLS connection may take to begin and to end."""

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from dropserve.service.settings import Settings

if TYPE_CHECKING:
    from uvicorn import Config

_HANDSHAKE_SECONDS = 5.0
_CLOSING_SECONDS = 60.0  # until an answer is sent; a connection without one has a deadline


class TlsError(OSError):
    """The certificate or its key cannot be used."""


class Loop(uvloop.Loop):
    """uvloop with deadlines of our own: uvicorn cannot set them.

    By default a connection may take a minute to begin, without being seen by the HTTP protocol, and
    an idle client that does not say goodbye keeps a closed one for 30 seconds, at shutdown as well.
    """

    async def create_server(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Listen."""
        return await super().create_server(*arguments, **_with_deadlines(options))

    async def connect_accepted_socket(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Serve a connection that was accepted elsewhere."""
        return await super().connect_accepted_socket(*arguments, **_with_deadlines(options))


def _with_deadlines(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("ssl") is None:
        return options
    return options | {
        "ssl_handshake_timeout": _HANDSHAKE_SECONDS,
        "ssl_shutdown_timeout": _CLOSING_SECONDS,
    }


def uvicorn_tls(settings: Settings) -> dict[str, Any]:
    """Return the options of uvicorn that are about TLS, if it is on."""
    if settings.tls_cert is None:
        return {}
    return {
        "ssl_certfile": settings.tls_cert,
        "ssl_keyfile": settings.tls_key,
        "ssl_context_factory": _context,
        "loop": f"{__name__}:{Loop.__name__}",
    }


def check(settings: Settings) -> None:
    """Raise a TlsError if the files of the settings, if there are any, cannot be used."""
    if settings.tls_cert is not None and settings.tls_key is not None:
        context(settings.tls_cert, settings.tls_key)


def context(cert: Path, key: Path) -> ssl.SSLContext:
    """Read a certificate chain and its key, for TLS 1.2 and later, or raise a TlsError."""
    for path in (cert, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise TlsError(f"{path}: cannot be read: {error.strerror}") from error
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        made.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        text = f"{cert} and {key}: no PEM certificate with its private key: {error}"
        raise TlsError(text) from error
    return made


def _context(config: "Config", _default: object) -> ssl.SSLContext:
    """Make a worker's context; a function of the module, as it is sent to other processes."""
    return context(Path(str(config.ssl_certfile)), Path(str(config.ssl_keyfile)))


def _no_password() -> str:
    """Keep OpenSSL from asking for a password on the terminal."""
    raise ValueError("the key is encrypted")
