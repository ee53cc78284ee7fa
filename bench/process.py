"""What the kernel says of a process."""

import re
from pathlib import Path


def peak_memory(process: int | None = None) -> int:
    """Return the most bytes that a process, by default this one, has held. Linux alone.

    It is the kernel's own count, VmHWM, which psutil does not give.
    """
    status = Path(f"/proc/{process or 'self'}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc has no VmHWM: the process has ended, or this is not Linux")
    return 1024 * int(found[1])
