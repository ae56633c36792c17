"""At which step the next snapshot is taken, and what is asked of the ranks there. Pure.

A permit must be ahead of the ranks, so that all hear of it in time, and near, so that it is wanted still. The first of
an attempt, and the one after a plan that no longer holds, asks for a plan. Where a script sums gradients over steps
snapshots are possible only before some; ranks say before which once they were asked for another. With an object tier
ranks stay at the boundary after their last step until a snapshot of it is committed: permits for that boundary are
never too late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from outlast.controller import policy
from outlast.controller.progress import Progress
from outlast.controller.settings import MachineConfig

MOST_MARGIN_FACTOR = 16
RETRY_S = 1.0
LONGEST_RETRY_S = 30.0
ACCUMULATING = "accumulating"
"""Begins why a rank has missed a snapshot at a boundary at which gradients wait for an optimizer's step."""
ECHO_S = 10.0
"""How long answers to a permit that was called off are waited for before the same step is permitted again."""


@dataclass(frozen=True)
class Next:
    """A permit: for which step, only to plan (``replan``), or to stay there (``hold``); given up at ``deadline``."""

    step: int
    replan: bool
    hold: bool
    deadline: float


@dataclass
class _Echo:
    """Ranks that still have to answer to a permit that was called off."""

    step: int = -1
    ranks: set[int] = field(default_factory=set)
    until: float = 0.0


class Pace:
    """``hold``: whoever sets it wants the ranks to stay at the next snapshot; ``hurry``: the next one is wanted soon;
    ``ended``: no more. ``unsound``: how often in a row gradients waited. ``interval``: as for ``every_steps`` None.
    ``adopted``: permits of the controller before this one may still be on their way.
    """

    def __init__(
        self, config: MachineConfig, interval: Callable[[float], float], *, adopted: bool = False, hurry: bool = False
    ) -> None:
        self.hold = False
        self.hurry = hurry
        self.ended = False
        self.planned = False
        self.final = config.checkpoint is not None
        self._config, self._interval = config, interval
        self._adopted = adopted
        self._last_permitted = -1
        self._last_copied: int | None = None
        self._factor = 1
        self._errors = self.unsound = 0
        self._sound: tuple[int, int] | None = None
        self._not_before = 0.0
        self._not_before_step = 0
        self._echo = _Echo()

    def next(self, progress: Progress, now: float) -> Next | None:
        """The next permit, once its step is near enough to be sure of it and far enough for all ranks to hear of it."""
        if self.ended or now < self._not_before or progress.done:
            return None
        if self._adopted and not progress.stepped and not self._at_end(progress):
            return None
        estimate = progress.estimate(now)
        margin = policy.margin_steps(progress.step_s, self._factor)
        if self._adopted:
            self._adopted, self._not_before_step = False, estimate + 4 * margin + 8
        step = self._step(max(estimate + margin, self._not_before_step, self._last_permitted + 1), progress, now)
        total = None if progress.total is None else max(progress.total, progress.restored_step)
        if total is not None and step >= total:
            if not self.final:
                return None
            step = total
        if step > estimate + 2 * margin or (step == self._echo.step and self._echo.ranks and now < self._echo.until):
            return None
        self._last_permitted = step
        wait_s = 3.0 * max(0, step - estimate) * (progress.step_s or 1.0)
        hold = self.planned and (self.hold or step == total)
        return Next(step, not self.planned, hold, now + wait_s + self._config.patience.copy_s)

    def _at_end(self, progress: Progress) -> bool:
        """Whether ranks wait after the last step for a permit, which is then never too late."""
        return self.final and progress.total is not None and progress.top_step >= progress.total

    def _step(self, first: int, progress: Progress, now: float) -> int:
        every, hurry = self._config.every_steps, self.hurry or self.hold or not self.planned
        interval_s = self._interval(now) if every is None else 0.0
        # A multiple of every_steps may be long past when the next boundary at which no gradients wait is near.
        from_ = max(first - self.period + 1, (self._last_copied or 0) + 1) if every is not None and not hurry else first
        step = policy.next_snapshot(every, from_, self._last_copied, interval_s, progress.step_s, hurry)
        return self._soundly(max(first, step))

    def _soundly(self, first: int) -> int:
        """The first step from ``first`` on before which no gradients wait, as far as is known."""
        if self._sound is None or not self.planned:
            return first
        at, period = self._sound
        return first + (at - first) % period

    def _learn(self, sound: tuple[int, int] | None) -> None:
        if sound is not None and sound[1] > 0:
            self._sound = sound

    @property
    def period(self) -> int:
        """Steps from one possible snapshot to the next, as far as is known."""
        return self._sound[1] if self._sound is not None else 1

    # --- how it went ------------------------------------------------------------------------------------------------

    def copied(self, step: int, sound: tuple[int, int] | None = None) -> None:
        """All ranks have taken it. ``sound``: as in ``Copied``."""
        self._learn(sound)
        self.hurry, self._last_copied, self._errors, self.unsound = False, step, 0, 0

    def missed(self, reason: str, now: float, sound: tuple[int, int] | None = None) -> None:
        """A rank did not take it. ``sound``: as in ``Missed``."""
        if reason.startswith(ACCUMULATING):
            self.unsound += 1
            self._learn(sound)
            self._not_before_step = self._last_permitted + self.unsound  # ever further: a rhythm may be none
            return
        if reason == "late":
            self._factor = min(MOST_MARGIN_FACTOR, 2 * self._factor)
        else:
            self.planned = False
        if reason not in ("late", "replan"):
            self._errors += 1
            self._not_before = now + min(LONGEST_RETRY_S, RETRY_S * 2.0 ** min(self._errors - 1, 10))

    def unprotected(self, now: float) -> None:
        """Its parity could not be made."""
        self._not_before = now + RETRY_S

    def called_off(self, step: int, unanswered: set[int], now: float) -> None:
        """It will not be, and these ranks have not said yet what they made of it; the next one is wanted soon."""
        self.hurry = True
        self._echo = _Echo(step, set(unanswered), now + ECHO_S)

    def answered(self, step: int, rank: int) -> None:
        """A rank answered to a permit that is not the one under way."""
        if step == self._echo.step:
            self._echo.ranks.discard(rank)
