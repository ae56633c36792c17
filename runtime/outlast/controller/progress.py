"""How far the ranks of one attempt are, and whether they still move. Constant time for each heartbeat."""

from __future__ import annotations

import math

from outlast.controller import policy
from outlast.messages.events import Heartbeat

AFTER_LAST_STEP_S = 300.0
"""After its last step a script validates and saves: that is no hang before so long."""

_GAIN = 1 / 8
_OWN_GAIN = 1 / 4
_FURTHEST_GUESS_S = 2.0


class Progress:
    """``top_step``: most steps done by any rank; ``moved_at``: when anybody last moved; ``step_s``: a step's time;
    ``ready_at``: when the first rank had its state, or there was no such rank yet."""

    def __init__(self, now: float, step: int = 0) -> None:
        self.restored_step = step
        self.top_step = step
        self.moved_at = now
        self.began = now
        self.step_s: float | None = None
        self.longest_step_s = 0.0
        self.total: int | None = None
        self.metrics: dict[str, float] = {}
        self.steps: dict[int, int] = {}
        self.ready: set[int] = set()
        self.ready_at = now
        self.done: dict[int, str] = {}
        self.busy: dict[int, tuple[str, float]] = {}
        self._own: dict[int, float] = {}
        self._suspects: dict[int, int] = {}
        self.named: frozenset[int] = frozenset()

    @property
    def stepped(self) -> bool:
        """Whether any rank has done a step in this attempt."""
        return self.top_step > self.restored_step

    def is_ready(self, rank: int, now: float) -> None:
        """A rank has its state."""
        if not self.ready:
            self.ready_at = now
        self.ready.add(rank)

    def heartbeat(self, event: Heartbeat, now: float) -> bool:
        """Take a heartbeat in; True when some rank has moved."""
        moved = False
        for rank, step in event.steps.items():
            if step > self.steps.get(rank, self.restored_step):
                self.steps[rank] = step
                moved = True
                if step > self.top_step:
                    self.top_step = step
        if event.total is not None:
            self.total = event.total
        if moved:
            self.moved_at = now
            self._measure(event)
        return moved

    def reached(self, step: int, now: float) -> None:
        """Some rank has done so many steps, as something else than a heartbeat says."""
        if step > self.top_step:
            self.top_step, self.moved_at = step, now

    def _measure(self, event: Heartbeat) -> None:
        for seconds in event.step_seconds.values():
            self.step_s = seconds if self.step_s is None else self.step_s + _GAIN * (seconds - self.step_s)
            self.longest_step_s = max(self.longest_step_s * 0.999, seconds)
            break
        for rank, seconds in event.own_seconds.items():
            known = self._own.get(rank, seconds)
            self._own[rank] = known + _OWN_GAIN * (seconds - known)
        if event.metrics:
            self.metrics = event.metrics

    def estimate(self, now: float) -> int:
        """How many steps the fastest rank has probably done by now."""
        if not self.step_s:
            return self.top_step
        return self.top_step + math.floor(min(_FURTHEST_GUESS_S, now - self.moved_at) / self.step_s)

    def at_end(self, world: int) -> bool:
        """Whether every one of ``world`` ranks has done all steps that it said it would."""
        if self.total is None or self.top_step < self.total:
            return False
        steps, total, restored = self.steps, self.total, self.restored_step
        return all(steps.get(rank, restored) >= total or rank in self.done for rank in range(world))

    def set_busy(self, rank: int, label: str, limit_s: float | None, now: float) -> None:
        """A rank announced a pause."""
        self.busy[rank] = (label, math.inf if limit_s is None else now + limit_s)

    def set_idle(self, rank: int, now: float) -> None:
        """Its pause is over."""
        if self.busy.pop(rank, None) is not None:
            self.moved_at = now

    def hang_deadline(self, configured: float | None) -> float:
        """When ranks that have not moved until then hang; endless before anything was done in the attempt."""
        if not self.stepped and not self.done:
            return math.inf
        patience_s = policy.hang_timeout(configured, self.step_s, self.longest_step_s)
        if self.done or (self.total is not None and self.top_step >= self.total):
            patience_s = max(patience_s, AFTER_LAST_STEP_S)
        deadline = self.moved_at + patience_s
        return max([deadline, *(until for _, until in self.busy.values())]) if self.busy else deadline

    def furthest_behind(self) -> int | None:
        """The one rank that has done fewer steps than all others; None when it is not one."""
        if len(self.steps) < 2:
            return None
        least = min(self.steps.values())
        behind = [rank for rank, step in self.steps.items() if step == least]
        return behind[0] if len(behind) == 1 else None

    def stragglers(self) -> dict[int, float]:
        """Ranks that have newly become stragglers, at the second look in a row, as rank -> multiple of the median."""
        found = policy.stragglers({rank: own for rank, own in self._own.items() if rank not in self.done})
        self._suspects = {rank: self._suspects.get(rank, 0) + 1 for rank in found}
        confirmed = frozenset(rank for rank, looks in self._suspects.items() if looks >= 2)
        new = confirmed - self.named
        self.named = confirmed
        return {rank: found[rank] for rank in sorted(new)}
