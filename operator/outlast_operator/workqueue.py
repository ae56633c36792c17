"""Which job is looked at next: each waits at most once, is handled by one thread at a time, and later after failures.

A pass that failed holds its job for all of its back-off, also when something happens meanwhile. One that was refused
something is repeated with the same back-off, but what happens is looked at soon: a quota that is used up must not keep
a lost node from being replaced.

``Backlog`` is the whole of it, pure and with ``now`` (monotonic seconds) as an argument; ``WorkQueue`` adds the lock
that threads wait on.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Generic, TypeVar

from outlast.clock import Clock

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 300.0
LONGEST_WAIT_S = 3600.0
"""Of a thread, at a time: a job may be due in a thousand years, which the lock would not take."""
REFUSED_HOLD_S = 2.0
"""A job of which something was refused is not looked at again sooner, whatever happens."""


class Ended(Enum):
    """How the handling of a key ended."""

    WELL = "well"
    REFUSED = "refused"
    FAILED = "failed"


def backoff_s(failures: int, chance: Random) -> float:
    """How long to wait after so many failures in a row (>= 1): doubling, with jitter downwards by up to a half."""
    most = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30))
    return most * chance.uniform(0.5, 1.0)


@dataclass
class _Entry:
    """``ready_since``: waits for a thread; ``due``: will be ready then; ``held_until``: is not ready before."""

    ready_since: float | None = None
    due: float | None = None
    held_until: float = 0.0
    failures: int = 0
    busy: bool = False
    again: bool = False

    @property
    def idle(self) -> bool:
        return not (self.busy or self.again or self.failures) and self.ready_since is None and self.due is None


@dataclass
class Backlog(Generic[K]):
    """Keys in the order in which they became ready."""

    chance: Random
    _entries: dict[K, _Entry] = field(default_factory=dict)
    _ready: dict[K, None] = field(default_factory=dict)
    _due: list[tuple[float, int, K]] = field(default_factory=list)
    _count: int = 0

    def add(self, key: K, now: float) -> None:
        """Something changed: handle it as soon as its back-off is over; once more, if it is being handled."""
        entry = self._entries.setdefault(key, _Entry())
        if entry.busy:
            entry.again = True
        elif entry.held_until > now:
            self._at(key, entry, entry.held_until)
        else:
            self._make_ready(key, entry, now)

    def renew(self, key: K, now: float) -> None:
        """What is wanted changed: earlier failures say nothing about it."""
        entry = self._entries.setdefault(key, _Entry())
        entry.failures, entry.held_until = 0, 0.0
        self.add(key, now)

    def add_in(self, key: K, seconds: float, now: float) -> None:
        """Handle it then, if nothing makes it happen before."""
        entry = self._entries.setdefault(key, _Entry())
        self._at(key, entry, max(now + seconds, entry.held_until))

    def take(self, now: float) -> K | None:
        """The key to handle now, None when none is ready; ``done`` must follow."""
        self._promote(now)
        if not self._ready:
            return None
        key = next(iter(self._ready))
        del self._ready[key]
        entry = self._entries[key]
        entry.ready_since, entry.busy = None, True
        return key

    def done(self, key: K, now: float, ended: Ended, at_least_s: float = 0.0) -> None:
        """It was handled; unless that ended well it is again when its back-off, or ``at_least_s``, is over."""
        entry = self._entries[key]
        entry.busy = False
        if ended is Ended.WELL:
            entry.failures, entry.held_until = 0, 0.0
        else:
            entry.failures += 1
            wait_s = max(at_least_s, backoff_s(entry.failures, self.chance))
            entry.held_until = now + (min(wait_s, REFUSED_HOLD_S) if ended is Ended.REFUSED else wait_s)
            self._at(key, entry, now + wait_s)
        if entry.again:
            entry.again = False
            self.add(key, now)
        if entry.idle:
            del self._entries[key]

    def next_due(self) -> float | None:
        """When a key that waits for its time becomes ready; None when none waits."""
        while self._due and self._is_stale(self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def depth(self) -> int:
        """Keys that wait for a thread."""
        return len(self._ready)

    def oldest(self, now: float) -> float:
        """Seconds that the first of them has waited."""
        key = next(iter(self._ready), None)
        since = None if key is None else self._entries[key].ready_since
        return 0.0 if since is None else now - since

    def failures(self, key: K) -> int:
        """Failures in a row."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.failures

    def _make_ready(self, key: K, entry: _Entry, now: float) -> None:
        entry.due = None
        if entry.ready_since is None:
            entry.ready_since = now
            self._ready[key] = None

    def _at(self, key: K, entry: _Entry, when: float) -> None:
        if entry.ready_since is None and (entry.due is None or when < entry.due):
            entry.due = when
            self._count += 1
            heapq.heappush(self._due, (when, self._count, key))
            if len(self._due) > 2 * len(self._entries) + 64:  # times far away that nearer ones have replaced
                self._due = [item for item in self._due if not self._is_stale(item)]
                heapq.heapify(self._due)

    def _is_stale(self, item: tuple[float, int, K]) -> bool:
        entry = self._entries.get(item[2])
        return entry is None or entry.due != item[0]

    def _promote(self, now: float) -> None:
        while (due := self.next_due()) is not None and due <= now:
            key = heapq.heappop(self._due)[2]
            self._entries[key].due = None
            self.add(key, now)


class WorkQueue(Generic[K]):
    """A ``Backlog`` that threads share."""

    def __init__(self, clock: Clock, chance: Random) -> None:
        self._clock = clock
        self._backlog: Backlog[K] = Backlog(chance)
        self._changed = threading.Condition()
        self._closed = False

    def add(self, key: K) -> None:
        """See ``Backlog.add``."""
        with self._changed:
            self._backlog.add(key, self._clock.monotonic())
            self._changed.notify()

    def renew(self, key: K) -> None:
        """See ``Backlog.renew``."""
        with self._changed:
            self._backlog.renew(key, self._clock.monotonic())
            self._changed.notify()

    def add_in(self, key: K, seconds: float) -> None:
        """See ``Backlog.add_in``."""
        with self._changed:
            self._backlog.add_in(key, seconds, self._clock.monotonic())
            self._changed.notify()

    def take(self) -> K | None:
        """The next key, as soon as there is one; None once the queue is closed."""
        with self._changed:
            while not self._closed:
                now = self._clock.monotonic()
                key = self._backlog.take(now)
                if key is not None:
                    return key
                due = self._backlog.next_due()
                self._changed.wait(None if due is None else min(max(0.001, due - now), LONGEST_WAIT_S))
            return None

    def done(self, key: K, ended: Ended = Ended.WELL, at_least_s: float = 0.0) -> None:
        """See ``Backlog.done``."""
        with self._changed:
            self._backlog.done(key, self._clock.monotonic(), ended, at_least_s)
            self._changed.notify()

    def close(self) -> None:
        """Nothing is handed out any more; threads that wait get None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def depth(self) -> int:
        """Keys that wait for a thread."""
        with self._changed:
            return self._backlog.depth()

    def oldest(self) -> float:
        """Seconds that the first of them has waited."""
        with self._changed:
            return self._backlog.oldest(self._clock.monotonic())
