"""Runs wrk, and reads what `post.lua` prints at its end."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel

SCRIPT = Path(__file__).parent / "post.lua"


class Load(BaseModel):
    """What wrk saw: requests in a time, latencies, answers that were refusals, broken sockets."""

    requests: int
    microseconds: int
    p50_us: int
    p99_us: int
    refused: int
    broken: int

    @property
    def requests_per_second(self) -> float:
        """Answered requests a second."""
        return self.requests / self.microseconds * 1e6

    @property
    def errors(self) -> int:
        """Requests that got no answer, or a status above 399."""
        return self.refused + self.broken

    def to_json(self) -> dict[str, Any]:
        """Return the figures of a row."""
        return {
            "requests_per_second": round(self.requests_per_second, 1),
            "p50_ms": self.p50_us / 1000,
            "p99_ms": self.p99_us / 1000,
            "errors": self.errors,
        }


class WrkMissing(Exception):
    """There is no wrk on this machine."""


def wrk_version() -> str:
    """Return the version of wrk.

    Raises:
        WrkMissing: install it first.
    """
    if not (wrk := shutil.which("wrk")):
        raise WrkMissing("wrk is needed: apt-get install wrk, or brew install wrk")
    return subprocess.run([wrk, "-v"], capture_output=True, text=True, check=False).stdout.split()[
        1
    ]


def run(
    url: str,
    bodies: Path,
    content_type: str,
    connections: int,
    seconds: float,
    header: tuple[str, ...] = (),
) -> Load:
    """POST the bodies in turn from one thread, as fast as `connections` are answered.

    A `header` is the name and value of one that is sent besides the content type.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency"]
    count = str(len(list(bodies.iterdir())))
    command += [
        "--timeout",
        "10s",
        "-s",
        str(SCRIPT),
        url,
        "--",
        count,
        content_type,
        str(bodies),
        *header,
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Load.model_validate(json.loads(out.strip().splitlines()[-1]))
