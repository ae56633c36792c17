"""Whether the kernel killed a process of this container for want of memory: its cgroup counts such kills."""

from __future__ import annotations

import math
from pathlib import Path

from outlast.cgroups import CGROUPS, read
from outlast.quantities import format_bytes

_COUNTS = ("memory.events", "memory/memory.oom_control")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
SAME_S = 5.0
"""Seconds after a kill was noticed in which other deaths by SIGKILL are taken for the kernel's too."""
_NO_LIMIT = 1 << 60
"""cgroup v1 writes a number of this size where there is no limit."""


class MemoryKills:
    """The kernel's kills in this process' cgroup (v2, else v1), as far as it can be read. Not thread-safe."""

    def __init__(self, root: Path = CGROUPS) -> None:
        self._root = root
        self._seen = self._count()
        self._fresh_until = -math.inf

    def begin(self) -> None:
        """Ranks are about to be made, and none is there: what was killed before is not what will end them."""
        self._seen = self._count()

    def why(self, now: float) -> str:
        """What to say of a process that was killed, if one was; "" when the kernel has killed none at this time. To be
        asked at every end: kills that are new explain the deaths of this moment, and none that come later."""
        count = self._count()
        if count > self._seen:
            self._seen, self._fresh_until = count, now + SAME_S
        if now >= self._fresh_until:
            return ""
        limit = self._limit()
        text = f" of {format_bytes(limit)}" if limit is not None else ""
        return f"out of memory: raise its container's memory limit{text}, or lower what it uses"

    def _count(self) -> int:
        for name in _COUNTS:
            for line in read(self._root / name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.strip().isdigit():
                    return int(value)
        return 0

    def _limit(self) -> int | None:
        for name in _LIMITS:
            value = read(self._root / name)
            if value.isdigit() and int(value) < _NO_LIMIT:
                return int(value)
        return None
