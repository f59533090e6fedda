"""How much memory may be taken for what only saves time."""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 8  # a kept activation may take this part of what is free


def free_bytes() -> int:
    """Bytes of memory that this process can still take: of the machine, or of its control group where that is less."""
    free = [_machine()]
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free.append(int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or one without a limit (`max`)
        pass
    return max(0, min(free))


def _machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: a quarter of all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def default_limit() -> int:
    """Bytes for kept activations when nobody says otherwise."""
    return free_bytes() // SHARE
