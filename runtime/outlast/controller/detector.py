"""Has a node died, or is it only late? Judged from its heartbeats, in constant time for each. Pure.

A node is given as long as its own history allows: a smoothed interval plus a multiple of its smoothed deviation, as TCP
estimates its retransmission time (Jacobson and Karels, Congestion Avoidance and Control, 1988), with a floor. Like the
phi accrual detector (Hayashibara et al., 2004) it adapts to jitter, but needs no window of samples: at 10,000 nodes a
heartbeat costs three multiplications. A deviation is learned quickly and forgotten slowly, so that one late heartbeat
on a busy machine makes the next one harmless.

Halfway to its end a node's keeper is asked, once in each silence: where it answers, the node lives and only its agent
is away, which Ray starts again; it is then waited for as long as that takes on a busy machine.

Times are those of an ``AwakeClock``: a controller that was itself stopped or starved heard nobody, which says nothing
about anybody.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class DetectorConfig:
    """Seconds, but for ``deviations``. ``interval_s`` is what agents aim at; a node is silent for ``base_s`` at least
    and ``most_s`` at most before it counts as lost, ``excused_s`` at least if its keeper answers; ``stall_s`` is the
    longest time between two events of the controller that counts in full.
    """

    interval_s: float = 0.25
    base_s: float = 1.5
    most_s: float = 10.0
    excused_s: float = 6.0
    deviations: float = 8.0
    stall_s: float = 0.4


_MEAN_GAIN = 1 / 8
_LEARN = 1 / 4
_FORGET = 1 / 64


class Heartbeats:
    """One node's heartbeats: when the last one came and how long to wait for the next. ``doubted``: in this silence its
    keeper has been asked for; ``excused``: and has answered; ``queued``: when its `Watch` looks at it next.
    """

    __slots__ = ("_config", "_deviation", "_interval", "doubted", "excused", "last", "queued")

    def __init__(self, config: DetectorConfig, now: float) -> None:
        self._config = config
        self._interval = config.interval_s
        self._deviation = 0.0
        self.last = self.queued = now
        self.doubted = self.excused = False

    def beat(self, now: float) -> None:
        """A heartbeat came."""
        gap = now - self.last
        error = gap - self._interval
        self._interval += _MEAN_GAIN * error
        surprise = abs(error) - self._deviation
        self._deviation += (_LEARN if surprise > 0 else _FORGET) * surprise
        self.last = now
        self.doubted = self.excused = False

    @property
    def patience_s(self) -> float:
        """Seconds of silence that are still no loss."""
        expected = self._interval + self._config.deviations * self._deviation
        return min(self._config.most_s, max(self._config.base_s, expected))

    @property
    def deadline(self) -> float:
        """When the node counts as lost unless another heartbeat comes."""
        patience = self.patience_s
        return self.last + (max(patience, self._config.excused_s) if self.excused else patience)

    @property
    def due(self) -> float:
        """When to look at it again: first to doubt it, then to give it up."""
        return self.deadline if self.doubted else self.last + self.patience_s / 2


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


class Judgement(NamedTuple):
    """``doubtful``: whose keepers to ask; ``overdue``: nodes past their deadline, with the seconds since their last
    heartbeat; they are watched no longer."""

    doubtful: list[str]
    overdue: list[tuple[str, float]]


class Watch:
    """Which of many nodes are overdue, without looking at all: a heap of when to look at whom.

    A heartbeat leaves the heap alone, unless its node was doubted and would be looked at too late. An entry that says
    another time than its node is an old one.
    """

    def __init__(self, config: DetectorConfig) -> None:
        self._config = config
        self._beats: dict[str, Heartbeats] = {}
        self._heap: list[tuple[float, int, str, Heartbeats]] = []
        self._numbers = itertools.count()

    def add(self, name: str, now: float) -> None:
        """Watch a node from now on, with no history."""
        self._beats[name] = beats = Heartbeats(self._config, now)
        self._queue(name, beats)

    def remove(self, name: str) -> None:
        """Watch it no longer."""
        self._beats.pop(name, None)

    def beat(self, name: str, now: float) -> None:
        """A heartbeat of a watched node came."""
        beats = self._beats.get(name)
        if beats is not None:
            doubted = beats.doubted
            beats.beat(now)
            if doubted:
                self._queue(name, beats)

    def excuse(self, name: str) -> None:
        """The keeper of a node that was doubted answers; one that was heard since needs no excuse."""
        beats = self._beats.get(name)
        if beats is not None and beats.doubted:
            beats.excused = True

    def silence(self, name: str, now: float) -> float | None:
        """Seconds since the last heartbeat of a watched node; None when it is not watched."""
        beats = self._beats.get(name)
        return None if beats is None else max(0.0, now - beats.last)

    def judge(self, now: float) -> Judgement:
        """Who is doubtful by now, each told once in each silence, and who is lost."""
        found = Judgement([], [])
        while self._heap and self._heap[0][0] <= now:
            when, _, name, beats = heapq.heappop(self._heap)
            if self._beats.get(name) is not beats or beats.queued != when:
                continue
            if beats.deadline <= now:
                found.overdue.append((name, now - beats.last))
                del self._beats[name]
                continue
            if not beats.doubted and beats.due <= now:
                beats.doubted = True
                found.doubtful.append(name)
            self._queue(name, beats)
        return found

    def _queue(self, name: str, beats: Heartbeats) -> None:
        beats.queued = beats.due
        heapq.heappush(self._heap, (beats.queued, next(self._numbers), name, beats))
