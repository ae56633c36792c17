"""Processor time: what a way costs, also on a machine that others keep busy, where seconds by the clock say little."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil


def cpu_seconds(pids: Collection[int]) -> float:
    """User and system time of these processes so far."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


@dataclass
class Spent:
    """Seconds by the clock, and core-seconds."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


@contextmanager
def spending(pids: Collection[int]) -> Iterator[Spent]:
    """What the block takes of these processes' time; known when it has ended."""
    spent, cpu, began = Spent(), cpu_seconds(pids), time.perf_counter()
    yield spent
    spent.wall_s, spent.cpu_s = time.perf_counter() - began, cpu_seconds(pids) - cpu
