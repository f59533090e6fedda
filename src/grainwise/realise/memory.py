"""How much memory may be taken for what only saves time, and what is forgotten beyond that."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

Made = TypeVar("Made")

SHARE = 8  # each kind of what is kept may take this part of what is free


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


def limit(given: int | None) -> int:
    """Bytes for one kind of what is kept: those given, or a share of what is free now. Of many processes each one keeps
    less the more the others have taken, so together they never take all.
    """
    return free_bytes() // SHARE if given is None else given


class Recent:
    """Values by key, within a limit of memory: beyond it those that were not asked for longest are forgotten.

    tensors_of: what a value holds. limit_bytes: as in `limit`.
    """

    def __init__(self, tensors_of: Callable[[Any], Iterable[Tensor]], limit_bytes: int | None = None) -> None:
        self._tensors_of = tensors_of
        self.limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The value under `key`, made when it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
        else:
            made = make()
            size = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in self._tensors_of(made)}.values())
            self._values[key] = made, size
            self.kept_bytes += size
            most = limit(self.limit_bytes)
            while self.kept_bytes > most and len(self._values) > 1:
                self.kept_bytes -= self._values.popitem(last=False)[1][1]
        found: Made = self._values[key][0]
        return found
