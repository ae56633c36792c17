"""How many threads a rank's kernels get: the container's CPU limit, shared by the node's ranks.

The number decides bits (sums are taken in another order), so it follows from the Pod alone and not from what else the
machine does.
"""

from __future__ import annotations

import os
from pathlib import Path

from outlast.cgroups import CGROUPS, read

_V1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


def rank_threads(procs: int, root: Path = CGROUPS) -> int:
    """Threads of each of ``procs`` ranks, at least one."""
    cores = float(len(os.sched_getaffinity(0)))
    return share(min(cpu_limit(root) or cores, cores), procs)


def share(cores: float, procs: int) -> int:
    """Whole threads for each."""
    return max(1, int(cores) // procs)


def cpu_limit(root: Path) -> float | None:
    """The container's limit in cores, of cgroup v2 (``cpu.max``) or v1; None: there is none, or it cannot be read."""
    unified = read(root / "cpu.max")
    quota, period = unified.split() if len(unified.split()) == 2 else tuple(read(root / name) for name in _V1)
    try:
        return float(quota) / float(period) if float(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None
