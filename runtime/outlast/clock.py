"""Time, injected: nothing but the edges of the program reads a clock of its own.

``Clock`` is the protocol, ``SystemClock`` the real one, ``ManualClock`` one that tests and simulations move by hand
(after trio's virtual clock). Monotonic seconds are for durations and deadlines, wall seconds for what people read.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What a component may ask about time."""

    def monotonic(self) -> float:
        """Seconds that never go back; comparable within one machine since its boot."""
        ...

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ManualClock:
    """A clock that stands still until ``advance`` is called."""

    def __init__(self, start: float = 0.0, wall_offset: float = 1_700_000_000.0) -> None:
        self._now = start
        self._wall_offset = wall_offset

    def monotonic(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now + self._wall_offset

    def advance(self, seconds: float) -> float:
        """Move forward by ``seconds`` (>= 0) and return the new monotonic time."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back ({seconds} s)")
        self._now += seconds
        return self._now
