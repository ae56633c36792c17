"""Where the time went: a ledger of seconds by cause, and a record of each recovery. Pure.

At every moment the job is in exactly one state, and its seconds are booked there; what is found out afterwards (a fault
is detected later than it happens, a rank tells of a stall when it is over) is moved from one account to another. The
accounts add up to the wall time. Goodput is the share of ``train``: steps done for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Account = Literal["train", "detect", "stop", "start", "restore", "recompute", "snapshot_stall", "idle"]

LOST: tuple[Account, ...] = ("detect", "stop", "start", "restore", "recompute", "snapshot_stall", "idle")
"""Accounts of seconds that brought no new step."""


@dataclass
class Ledger:
    """``enter`` when the job's state changes, ``move`` what belonged elsewhere; read with ``seconds``."""

    since: float
    current: Account = "idle"
    began: float = field(init=False)
    _booked: dict[Account, float] = field(default_factory=dict)
    closed: bool = False

    def __post_init__(self) -> None:
        self.began = self.since

    def enter(self, account: Account, now: float) -> None:
        """From ``now`` on, seconds count for ``account``."""
        self._book(now)
        self.current = account

    def move(self, to: Account, seconds: float, now: float) -> float:
        """Book the latest ``seconds`` of the current account under ``to``, as many as it has; returns how many."""
        self._book(now)
        moved = max(0.0, min(seconds, self._booked.get(self.current, 0.0)))
        self._add(self.current, -moved)
        self._add(to, moved)
        return moved

    def close(self, now: float) -> None:
        """The job is over: nothing is booked after ``now``."""
        self._book(now)
        self.closed = True

    def seconds(self, now: float) -> dict[Account, float]:
        """All accounts; they add up to the time since the start."""
        running = 0.0 if self.closed else max(0.0, now - self.since)
        totals: dict[Account, float] = {account: self._booked.get(account, 0.0) for account in ("train", *LOST)}
        totals[self.current] += running
        return totals

    def goodput(self, now: float) -> float | None:
        """The share of time in which new steps were done; None before anything was."""
        totals = self.seconds(now)
        wall = sum(totals.values())
        return totals["train"] / wall if wall > 0 else None

    def to_json(self, now: float) -> dict[str, Any]:
        """{"ratio", "train_s", "lost_s": {cause: seconds}, "wall_s"}."""
        totals = self.seconds(now)
        ratio = self.goodput(now)
        return {
            "ratio": None if ratio is None else round(ratio, 4),
            "wall_s": round(sum(totals.values()), 3),
            "train_s": round(totals["train"], 3),
            "lost_s": {account: round(totals[account], 3) for account in LOST},
        }

    def _book(self, now: float) -> None:
        if not self.closed and now > self.since:
            self._add(self.current, now - self.since)
            self.since = now

    def _add(self, account: Account, seconds: float) -> None:
        self._booked[account] = self._booked.get(account, 0.0) + seconds


@dataclass
class RecoveryRecord:
    """One recovery: from the fault to the first new step. Seconds; None until known.

    ``kind`` is the cause as a word (rank-exit, node-lost, hang ...), ``cause`` the sentence; ``further``: causes of
    faults that struck while it was under way; ``restore_sources``: ranks by where their state came from;
    ``restored_step`` the step to resume with, ``lost_steps`` those done before and to be done again; ``total_s`` from
    the fault to the end of the first step done after it. ``planned``: there was no fault (kinds resize, node-left).
    """

    kind: str
    cause: str
    attempt: int
    fault_at: float
    detect_s: float
    further: list[str] = field(default_factory=list)
    restore_sources: dict[str, int] = field(default_factory=dict)
    restored_step: int | None = None
    lost_steps: int | None = None
    stop_s: float | None = None
    restore_s: float | None = None
    start_s: float | None = None
    total_s: float | None = None
    node: str | None = None
    rank: int | None = None
    planned: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record with rounded seconds, without the controller's own clock."""
        fields: Mapping[str, Any] = asdict(self)
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in fields.items()
            if name != "fault_at"
        }
