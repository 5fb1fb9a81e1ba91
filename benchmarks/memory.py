"""Memory of a process and its limit: both sides of a benchmark are measured and bounded by the same means."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident set this process has had, from its start.

    On Linux VmHWM and not ru_maxrss, which a process inherits from the one that started it.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_bytes(size: int) -> None:
    """From here on an allocation that takes this process over ``size`` fails, before the machine runs out."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
