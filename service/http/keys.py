"""API keys: a file of them, and the door that opens to who has one.

The keys themselves are not kept, their SHA-256 digests are. What a client sends is digested too and
compared with all of them, so that the time taken tells nothing of any.
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
_EVERY = 1.0
"""Seconds between looks whether the file has changed."""
_KEY = re.compile(rb"[!-~]+")  # what a header can carry
_CHALLENGE = 'Basic realm="dropserve", charset="UTF-8", Bearer'
_log = logging.getLogger("dropserve.keys")


class KeysError(OSError):
    """There are no keys in the file, or something else is."""


class Keys:
    """The keys in a file.

    Args:
        path: of the file: a key a line; empty lines and those that begin with # are left out.
        kept: file for the digests of the last good keys, shared with other workers: one that takes
            a dead one's place starts from it when the keys have been spoilt meanwhile.

    Raises:
        OSError: it cannot be read.
        KeysError: there is no key in it, or a line that is none.
    """

    def __init__(self, path: Path, kept: Path | None = None) -> None:
        self._path = path
        self._kept = kept
        self._mark = self._look()
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
        """Say if a request's headers bring one of the keys."""
        admitted = False
        for key in _offered(headers):
            digest = sha256(key).digest()
            for known in self._digests:
                admitted |= hmac.compare_digest(digest, known)
        return admitted

    async def keep_up(self) -> None:
        """Read the file again when it has changed, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_EVERY)
            await loop.run_in_executor(None, self.refresh)

    def refresh(self) -> None:
        """Read the file again if it has changed; if it is no good, the keys stay as they were."""
        mark = self._look()
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._use(_read(self._path))
        except OSError as error:
            _log.error(f"the API keys stay as they were: {error}")
        else:
            _log.info("API keys read", extra={FIELDS: {"keys": len(self._digests)}})

    def _look(self) -> tuple[int, ...]:
        """Return what changes when the file does."""
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


class KeyCheck:
    """ASGI middleware: refuses with 401, before anything is read, a request without a key.

    Args:
        app: answers requests with a key.
        keys: any of them is enough.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        checked = scope["type"] == "http" and scope["path"] not in OPEN
        if checked and not self._keys.admit(scope["headers"]):
            headers = {"WWW-Authenticate": _CHALLENGE}
            if any(n in (b"content-length", b"transfer-encoding") for n, _ in scope["headers"]):
                headers["Connection"] = "close"  # its body is not read
            raise Unauthorized(
                "an API key is needed: as Authorization: Bearer, as X-API-Key or as the password",
                headers=headers,
            )
        await self._app(scope, receive, send)


def _offered(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    for name, value in headers:
        if name == b"x-api-key":
            yield value.strip()
        elif name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield rest.strip()
            elif scheme.lower() == b"basic":
                yield _password(rest.strip())


def _password(encoded: bytes) -> bytes:
    try:
        return b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _read(path: Path) -> tuple[bytes, ...]:
    """Return the digests of a file's keys."""
    if path.exists() and not path.is_file():  # a pipe would keep us waiting
        raise KeysError(f"{path}: no file of API keys")
    lines = [line.strip() for line in path.read_bytes().splitlines()]
    keys = {n: line for n, line in enumerate(lines, 1) if line and not line.startswith(b"#")}
    for number, key in keys.items():
        if not _KEY.fullmatch(key):
            raise KeysError(f"{path}: line {number} is no key: visible ASCII, and no spaces")
    if not keys:
        raise KeysError(f"{path}: no API key in it; write one a line")
    return tuple(sha256(key).digest() for key in keys.values())
