"""What a benchmark ran on."""

import os
import platform
import re
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Describe this machine, for a benchmark's JSON."""
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()}


def peak_memory(process: int | None = None) -> int:
    """Return the most bytes that a process, by default this one, has held. Linux alone.

    It is the kernel's own count, VmHWM, which psutil does not give.
    """
    status = Path(f"/proc/{process or 'self'}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc has no VmHWM: the process has ended, or this is not Linux")
    return 1024 * int(found[1])
