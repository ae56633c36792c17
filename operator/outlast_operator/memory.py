"""What a node Pod's memory-backed volume takes, and whether the container's memory limit can bear it. Pure.

The volume at ``/dev/shm`` holds images and parity; what is in it counts against the memory limit of the container that
writes it. ``maxMemory`` + 256 MiB for Ray, else half of the limit, else no limit; the ranks and the processes beside
them need 1 GiB at least.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from outlast.quantities import format_bytes

RAY_BYTES = 256 << 20
"""Of the volume, for Ray's own shared memory."""
PROCESS_BYTES = 1 << 30
"""Beside the volume, at least, for the ranks, the keeper, the agent and the raylet."""

_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([KMGTPE]i|[numkMGTPE])|[eE]([+-]?\d{1,3}))?")
_UNITS: Mapping[str, Fraction] = {
    **{
        unit: Fraction(10) ** (3 * power)
        for power, unit in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), -3)
    },
    **{f"{unit}i": Fraction(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
}


def parse_quantity(value: object) -> Fraction:
    """A Kubernetes quantity (``8Gi``, ``1500m``, ``1e3``, ``0.5``, 2), exactly.

    Raises ValueError. Source: Kubernetes, apimachinery, resource.Quantity.
    """
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f'"{value}" is no quantity: write 8Gi, 512Mi or 8G')
    exponent = Fraction(10) ** int(match[3]) if match[3] else Fraction(1)
    return Fraction(match[1]) * _UNITS[match[2] or ""] * exponent


def parse_memory(value: object) -> int:
    """Bytes; a part of one is rounded up, as Kubernetes does. Raises ValueError."""
    count = math.ceil(parse_quantity(value))
    if count <= 0:
        raise ValueError(f'"{value}" is no amount of memory: write 8Gi, 512Mi or 8G')
    return count


@dataclass(frozen=True)
class MemorySum:
    """``volume``: bytes of the volume, None: not limited; ``limit``: the container's, None: none; ``problem``: why
    they do not fit, with the sum; "" when they do."""

    volume: int | None
    limit: int | None
    problem: str = ""


def memory_sum(max_memory: int | None, resources: Mapping[str, Any]) -> MemorySum:
    """The sum for ``snapshot.maxMemory`` (bytes) and a container's ``resources``. Raises ValueError when the memory
    limit is no quantity."""
    given = (resources.get("limits") or {}).get("memory")
    limit = None if given is None else parse_memory(given)
    if max_memory is not None:
        volume = max_memory + RAY_BYTES
        return MemorySum(volume, limit, "" if limit is None else _problem(max_memory, volume, limit))
    if limit is None:
        return MemorySum(None, None)
    return MemorySum(limit // 2, limit, _problem(None, limit // 2, limit))


def _problem(max_memory: int | None, volume: int, limit: int) -> str:
    if volume + PROCESS_BYTES <= limit:
        return ""
    if max_memory is None:
        return (
            f"the memory limit of {shown(limit)} is too small: half of it, {shown(volume)}, is for snapshots, and "
            f"{shown(PROCESS_BYTES)} at least must be left for the ranks; raise it to {shown(2 * PROCESS_BYTES)} or "
            "more, or set spec.snapshot.maxMemory"
        )
    need = volume + PROCESS_BYTES
    return (
        f"the memory limit of {shown(limit)} is too small: {shown(max_memory)} of snapshots (spec.snapshot.maxMemory) "
        f"+ {shown(RAY_BYTES)} for Ray + {shown(PROCESS_BYTES)} at least for the ranks = {shown(need)}; raise the "
        f"limit by {shown(need - limit)} or more, or lower maxMemory"
    )


def shown(count: int) -> str:
    """Bytes in the largest unit that keeps them exact, else with two digits: ``1.25Gi``."""
    exact = format_bytes(count)
    if not exact.isdigit() or count < 1024:
        return exact
    power = min(4, int(math.log2(count)) // 10)
    return f"{count / 1024**power:.2f}{'BKMGT'[power]}i"
