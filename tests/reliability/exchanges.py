"""Load from raw sockets that knows which requests the server's kernel has received in full.

A request counts as received once the other side has acknowledged all of its bytes (TIOCOUTQ is 0);
it is lost if no complete answer follows.
"""

import asyncio
import json
import socket
import sys
import termios
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from fcntl import ioctl

from tests.helpers import PNG
from tests.reliability.messages import first_answer, request

JSON = json.dumps({"instances": [[[7] * 8] * 8]}).encode()


FAST = request("/predict", PNG, "image/png")
SLOW = request("/uncertainty?samples=200&seed=1", JSON, "application/json")  # by way of ASGI
CLIENTS = {
    "kept": ([FAST], True),
    "kept, by ASGI": ([SLOW], True),
    "fresh": ([FAST], False),
    "fresh, by ASGI": ([SLOW], False),
    "pipelined": ([FAST, SLOW, SLOW], True),
}
"""What a client sends at once, and whether it keeps its connection."""


@dataclass
class Tally:
    """What became of the requests that were received in full."""

    statuses: Counter = field(default_factory=Counter)
    lost: list = field(default_factory=list)
    """Of those without a complete answer: the client's port, and what it was."""
    refused: bool = False
    """Whether a connection was refused: the port is closed."""

    @property
    def answered(self):
        return self.statuses.total()


class Load:
    """Clients of each kind, from entry to exit; exit waits until they have their answers."""

    def __init__(self, port, each=3):
        self.port, self.each, self.tally = port, each, Tally()
        self._stop = False

    async def __aenter__(self):
        kinds = [kind for kind in CLIENTS for _ in range(self.each)]
        self._clients = [asyncio.create_task(self._client(kind)) for kind in kinds]
        return self

    async def __aexit__(self, *_error):
        self._stop = True
        async with asyncio.timeout(60):
            await asyncio.gather(*self._clients)

    async def refused(self, seconds=30):
        """Wait until the port is closed."""
        async with asyncio.timeout(seconds):
            while not self.tally.refused:  # noqa: ASYNC110  clients set it
                await asyncio.sleep(0.002)

    async def answers(self, more, seconds=30):
        """Wait for so many more answers."""
        enough = self.tally.answered + more
        async with asyncio.timeout(seconds):
            while self.tally.answered < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def _client(self, kind):
        requests, keeps = CLIENTS[kind]
        while not self._stop and not self.tally.refused:
            connection = socket.socket()
            connection.setblocking(False)
            with connection:
                try:
                    await asyncio.get_running_loop().sock_connect(
                        connection, ("127.0.0.1", self.port)
                    )
                except ConnectionRefusedError:
                    self.tally.refused = True
                    return
                except OSError:
                    continue
                while await self._exchange(connection, kind, requests) and keeps:
                    if self._stop:
                        break

    async def _exchange(self, connection, kind, requests):
        """Send requests and count their answers; return whether the connection stays open."""
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            await loop.sock_sendall(connection, b"".join(requests))
        received, stays = b"", True
        for number in range(len(requests)):
            status, received, closes = await read_answer(connection, received)
            if status:
                self.tally.statuses[status] += 1
            elif unacknowledged(connection) <= sum(map(len, requests[number + 1 :])):
                self.tally.lost.append((connection.getsockname()[1], f"{kind}, number {number}"))
            stays = stays and bool(status) and not closes
        return stays


async def read_answer(connection, received=b""):
    """Read an answer: its status, what was received behind it, and whether the connection closes.

    The status is 0 if the connection ended before the answer did.
    """
    loop = asyncio.get_running_loop()
    while True:
        if (first := first_answer(received)) is not None:
            answer, size = first
            return answer.status, received[size:], answer.headers.get("connection") == "close"
        chunk = b""
        with suppress(OSError):
            chunk = await loop.sock_recv(connection, 65_536)
        if not chunk:
            return 0, received, True
        received += chunk


def unacknowledged(connection):
    """Bytes that were sent and that the other side's kernel has not received."""
    return int.from_bytes(ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
