"""API keys: the file that lists them, their limits, and the middleware that asks for one.

Only SHA-256 digests of keys are kept. What a client sends is digested too and compared with all of
them, so that the time taken says nothing about any.
"""

import asyncio
import binascii
import hmac
import logging
import math
import os
import re
import time
from base64 import b64decode
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.service.errors import TooManyRequests, Unauthorized
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


class KeyOptions(BaseModel):
    """What may stand behind a key on its line; a limit that does not is the service's."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    rate: float | None = Field(None, ge=0, allow_inf_nan=False)
    concurrency: int | None = Field(None, ge=0)


Lines = dict[str, KeyOptions]
"""The lines of a file, by the digest of their key in hexadecimal."""
_LINES: TypeAdapter[Lines] = TypeAdapter(Lines)


@dataclass(slots=True, eq=False)
class ApiKey:
    """One key: its limits, and what is used of them.

    Attributes:
        digest: SHA-256 of the key.
        name: for the log and the metrics.
        rate: requests per second, of which one second's worth may come at once; 0: no limit.
        concurrency: requests in flight; 0: no limit.
        in_flight: requests that have begun and not ended.
    """

    digest: bytes
    name: str
    rate: float
    concurrency: int
    in_flight: int = 0
    _tokens: float = math.inf  # requests that may begin now, as of `_counted`
    _counted: float = 0.0

    @property
    def is_limited(self) -> bool:
        """Whether it has limits."""
        return bool(self.rate or self.concurrency)

    def enter(self) -> None:
        """Count a request that begins, or raise TooManyRequests."""
        if self.concurrency and self.in_flight >= self.concurrency:
            raise TooManyRequests(
                f"this API key has {self.in_flight} requests in flight, and may have no more"
            )
        if self.rate:
            self._take_token()
        self.in_flight += 1

    def leave(self, *, counted: bool = True) -> None:
        """Count a request that ends; not `counted`: as if it had never begun."""
        self.in_flight -= 1
        if not counted:
            self._tokens += 1

    def _take_token(self) -> None:
        now = time.monotonic()
        added = (now - self._counted) * self.rate
        self._tokens = min(max(1.0, self.rate), self._tokens + added)
        self._counted = now
        if self._tokens < 1:
            seconds = math.ceil((1 - self._tokens) / self.rate)
            text = f"this API key may send {self.rate:g} requests per second, and has sent more"
            raise TooManyRequests(text, seconds)
        self._tokens -= 1


class Keys:
    """The keys in a file: one a line; empty lines and those that begin with # are ignored.

    Args:
        path: of the file.
        kept: file for the digests and options of the last valid keys, shared with other workers:
            one that replaces a dead worker starts from it if the keys have become invalid
            meanwhile.
        rate, concurrency: limits of keys whose line has none.

    Raises:
        OSError: the file cannot be read, or (KeysError) is invalid.
    """

    def __init__(
        self, path: Path, kept: Path | None = None, rate: float = 0.0, concurrency: int = 0
    ) -> None:
        self._path, self._kept = path, kept
        self._rate, self._concurrency = rate, concurrency
        self._keys: tuple[ApiKey, ...] = ()
        self._mark = self._stat()
        try:
            self._use(_read(path))
        except OSError as error:
            if kept is None or not kept.exists():
                raise
            self._take_over(_LINES.validate_json(kept.read_bytes()))
            _log.error(f"the API keys stay as they were: {error}")

    def _use(self, lines: Lines) -> None:
        self._take_over(lines)
        if self._kept is None:
            return
        new = self._kept.with_suffix(f".{os.getpid()}")
        try:
            new.write_bytes(_LINES.dump_json(lines))
            new.replace(self._kept)
        except OSError as error:
            _log.error(f"the API keys are not kept for workers that start later: {error}")

    def _take_over(self, lines: Lines) -> None:
        """Replace the keys; one that stays keeps what is used of its limits."""
        known = {key.digest: key for key in self._keys}
        keys = []
        for digest, options in lines.items():
            rate = self._rate if options.rate is None else options.rate
            most = self._concurrency if options.concurrency is None else options.concurrency
            key = known.get(bytes.fromhex(digest))
            if key is None:
                key = ApiKey(bytes.fromhex(digest), options.name, rate, most)
            key.name, key.rate, key.concurrency = options.name, rate, most
            keys.append(key)
        self._keys = tuple(keys)

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> ApiKey | None:
        """Return the first key that a request's headers contain, if they contain one."""
        found = None
        for offered in _offered(headers):
            digest = sha256(offered).digest()
            for key in self._keys:
                if hmac.compare_digest(digest, key.digest):
                    found = found or key
        return found

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
            _log.info("API keys read", extra={FIELDS: {"keys": len(self._keys)}})

    def _stat(self) -> tuple[int, ...]:
        """Return what changes when the file does."""
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


class KeyCheck:
    """ASGI middleware: refuses a request before its body is read.

    One without a key gets 401, one beyond the limits of its key 429.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        key = self._keys.find(scope["headers"])
        if key is None:
            raise _unauthorized(scope["headers"])
        scope["state"]["log"]["key"] = key.name
        key.enter()
        with ExitStack() as entered:
            entered.callback(key.leave)

            async def send_and_leave(message: Message) -> None:
                # a client that has read its answer may ask again, before this task has ended
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    entered.close()
                await send(message)

            await self._app(scope, receive, send_and_leave)


def _unauthorized(headers: Iterable[tuple[bytes, bytes]]) -> Unauthorized:
    # without a parameter of Bearer, browsers take it for one of Basic, and do not ask
    challenge = 'Basic realm="dropserve", charset="UTF-8", Bearer realm="dropserve"'
    sent = {"WWW-Authenticate": challenge}
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in headers):
        sent["Connection"] = "close"  # instead of reading the body
    text = "an API key is needed: as Authorization: Bearer, as X-API-Key or as the password"
    return Unauthorized(text, headers=sent)


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


def _read(path: Path) -> Lines:
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise KeysError(f"{path}: no file of API keys")
    lines: Lines = {}
    names: set[str] = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        try:
            options = _options(number, words)
        except ValueError:
            raise KeysError(
                f"{path}: line {number} is no key: visible ASCII without spaces, and after it "
                f"nothing but name=, rate= and concurrency="
            ) from None
        digest = sha256(words[0]).hexdigest()
        if digest in lines:
            raise KeysError(f"{path}: line {number} has a key that an earlier line has")
        if options.name in names:
            raise KeysError(f"{path}: line {number} has a name that an earlier line has")
        lines[digest] = options
        names.add(options.name)
    if not lines:
        raise KeysError(f"{path}: no API key in it; write one a line")
    return lines


def _options(number: int, words: list[bytes]) -> KeyOptions:
    """Read a line's words; a ValueError, which may contain the key, if they are invalid."""
    key, *rest = words
    if not _KEY.fullmatch(key):
        raise ValueError
    given = dict(word.decode("ascii").split("=", 1) for word in rest)
    return KeyOptions.model_validate({"name": f"line-{number}", **given})
