"""Has a node died, or is it only late? Judged from its heartbeats, in constant time for each. Pure.

A node is given as long as its own history allows: a smoothed interval plus a multiple of its smoothed deviation, as TCP
estimates its retransmission time (Jacobson and Karels, Congestion Avoidance and Control, 1988), with a floor. Like the
phi accrual detector (Hayashibara et al., 2004) it adapts to jitter, but needs no window of samples: at 10,000 nodes a
heartbeat costs three multiplications. A deviation is learned quickly and forgotten slowly, so that one late heartbeat
on a busy machine makes the next one harmless.

Times are those of an ``AwakeClock``: a controller that was itself stopped or starved heard nobody, which says nothing
about anybody.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DetectorConfig:
    """Seconds, but for ``deviations``. ``interval_s`` is what agents aim at; a node is silent for ``base_s`` at least
    and ``most_s`` at most before it counts as lost; ``stall_s`` is the longest time between two events of the
    controller that counts in full.
    """

    interval_s: float = 0.25
    base_s: float = 1.5
    most_s: float = 10.0
    deviations: float = 8.0
    stall_s: float = 0.4


_MEAN_GAIN = 1 / 8
_LEARN = 1 / 4
_FORGET = 1 / 64


class Heartbeats:
    """One node's heartbeats: when the last one came and how long to wait for the next."""

    __slots__ = ("_config", "_deviation", "_interval", "last")

    def __init__(self, config: DetectorConfig, now: float) -> None:
        self._config = config
        self._interval = config.interval_s
        self._deviation = 0.0
        self.last = now

    def beat(self, now: float) -> None:
        """A heartbeat came."""
        gap = now - self.last
        error = gap - self._interval
        self._interval += _MEAN_GAIN * error
        surprise = abs(error) - self._deviation
        self._deviation += (_LEARN if surprise > 0 else _FORGET) * surprise
        self.last = now

    @property
    def patience_s(self) -> float:
        """Seconds of silence that are still no loss."""
        expected = self._interval + self._config.deviations * self._deviation
        return min(self._config.most_s, max(self._config.base_s, expected))

    @property
    def deadline(self) -> float:
        """When the node counts as lost unless another heartbeat comes."""
        return self.last + self.patience_s


class AwakeClock:
    """Time in which the controller could hear: gaps between its own events count for ``stall_s`` at most."""

    __slots__ = ("_last", "_stall_s", "now")

    def __init__(self, config: DetectorConfig, now: float) -> None:
        self._stall_s = config.stall_s
        self._last = now
        self.now = now

    def observe(self, now: float) -> float:
        """The controller handles something at ``now``; returns the awake time."""
        gap = now - self._last
        if gap > 0:
            self.now += min(gap, self._stall_s)
            self._last = now
        return self.now


class Watch:
    """Which of many nodes are overdue, without looking at all: a heap of deadlines, corrected as they come up.

    Each watched name has one entry; a heartbeat does not touch the heap.
    """

    def __init__(self, config: DetectorConfig) -> None:
        self._config = config
        self._beats: dict[str, Heartbeats] = {}
        self._heap: list[tuple[float, str]] = []
        self._queued: set[str] = set()

    def add(self, name: str, now: float) -> None:
        """Watch a node from now on, with no history."""
        self._beats[name] = beats = Heartbeats(self._config, now)
        if name not in self._queued:
            self._queued.add(name)
            heapq.heappush(self._heap, (beats.deadline, name))

    def remove(self, name: str) -> None:
        """Watch it no longer."""
        self._beats.pop(name, None)

    def beat(self, name: str, now: float) -> None:
        """A heartbeat of a watched node came."""
        beats = self._beats.get(name)
        if beats is not None:
            beats.beat(now)

    def silence(self, name: str, now: float) -> float | None:
        """Seconds since the last heartbeat of a watched node; None when it is not watched."""
        beats = self._beats.get(name)
        return None if beats is None else max(0.0, now - beats.last)

    def overdue(self, now: float) -> list[tuple[str, float]]:
        """Nodes past their deadline, with the seconds since their last heartbeat; they are watched no longer."""
        lost = []
        while self._heap and self._heap[0][0] <= now:
            _, name = heapq.heappop(self._heap)
            beats = self._beats.get(name)
            if beats is None:
                self._queued.discard(name)
            elif beats.deadline <= now:
                lost.append((name, now - beats.last))
                self._queued.discard(name)
                del self._beats[name]
            else:
                heapq.heappush(self._heap, (beats.deadline, name))
        return lost
