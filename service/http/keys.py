"""API keys: the file that lists them, and the middleware that asks for one.

Only SHA-256 digests of keys are kept. What a client sends is digested too and compared with all of
them, so that the time taken says nothing about any.
"""

import asyncio
import binascii
import hmac
import logging
import os
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from dropserve.service.errors import Unauthorized
from dropserve.service.observability.logs import FIELDS

OPEN = {"/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"}
"""Paths of the probes, which need no key."""
OPERATIONS = {*OPEN, "/metrics"}
"""Paths that machines ask all the time: no part of the traffic."""
_POLL_SECONDS = 1.0
_KEY = re.compile(rb"[!-~]+")  # what a header can carry
_log = logging.getLogger("dropserve.keys")


class KeysError(OSError):
    """The file has no keys, or a line that is not a key."""


class Keys:
    """The keys in a file: one a line; empty lines and those that begin with # are ignored.

    Args:
        path: of the file.
        kept: file for the digests of the last valid keys, shared with other workers: one that
            replaces a dead worker starts from it if the keys have become invalid meanwhile.

    Raises:
        OSError: the file cannot be read, or (KeysError) is invalid.
    """

    def __init__(self, path: Path, kept: Path | None = None) -> None:
        self._path, self._kept = path, kept
        self._mark = self._stat()
        try:
            self._use(_read(path))
        except OSError as error:
            if kept is None or not kept.exists():
                raise
            self._digests = tuple(map(bytes.fromhex, kept.read_text().split()))
            _log.error(f"the API keys stay as they were: {error}")

    def _use(self, digests: tuple[bytes, ...]) -> None:
        self._digests = digests
        if self._kept is not None:
            new = self._kept.with_suffix(f".{os.getpid()}")
            new.write_text("\n".join(digest.hex() for digest in digests))
            new.replace(self._kept)

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Say if a request's headers contain one of the keys."""
        admitted = False
        for key in _offered(headers):
            digest = sha256(key).digest()
            for known in self._digests:
                admitted |= hmac.compare_digest(digest, known)
        return admitted

    async def watch(self) -> None:
        """Read the file again whenever it has changed, until cancelled."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await asyncio.get_running_loop().run_in_executor(None, self.refresh)

    def refresh(self) -> None:
        """Read the file again if it has changed; if it is invalid, the keys stay as they were."""
        mark = self._stat()
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._use(_read(self._path))
        except OSError as error:
            _log.error(f"the API keys stay as they were: {error}")
        else:
            _log.info("API keys read", extra={FIELDS: {"keys": len(self._digests)}})

    def _stat(self) -> tuple[int, ...]:
        """Return what changes when the file does."""
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


class KeyCheck:
    """ASGI middleware: refuses a request without a key with 401, before its body is read."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        checked = scope["type"] == "http" and scope["path"] not in OPEN
        if checked and not self._keys.admit(scope["headers"]):
            headers = {"WWW-Authenticate": 'Basic realm="dropserve", charset="UTF-8", Bearer'}
            if any(n in (b"content-length", b"transfer-encoding") for n, _ in scope["headers"]):
                headers["Connection"] = "close"  # instead of reading the body
            raise Unauthorized(
                "an API key is needed: as Authorization: Bearer, as X-API-Key or as the password",
                headers=headers,
            )
        await self._app(scope, receive, send)


def _offered(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    for name, value in headers:
        scheme, _, rest = value.partition(b" ")
        if name == b"x-api-key":
            yield value.strip()
        elif name == b"authorization" and scheme.lower() == b"bearer":
            yield rest.strip()
        elif name == b"authorization" and scheme.lower() == b"basic":
            try:
                yield b64decode(rest.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                continue


def _read(path: Path) -> tuple[bytes, ...]:
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise KeysError(f"{path}: no file of API keys")
    lines = [line.strip() for line in path.read_bytes().splitlines()]
    keys = {n: line for n, line in enumerate(lines, 1) if line and not line.startswith(b"#")}
    for number, key in keys.items():
        if not _KEY.fullmatch(key):
            raise KeysError(f"{path}: line {number} is no key: visible ASCII, and no spaces")
    if not keys:
        raise KeysError(f"{path}: no API key in it; write one a line")
    return tuple(sha256(key).digest() for key in keys.values())
