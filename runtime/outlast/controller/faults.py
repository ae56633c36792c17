"""What went wrong first. Faults come in company: one rank dies, and every other reports that it lost a connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from signal import SIGABRT, SIGKILL, Signals
from typing import Literal

from outlast.controller import policy
from outlast.messages.events import ErrorInfo, RankExited

Kind = Literal[
    "rank-exit", "rank-error", "node-lost", "agent-lost", "hang", "start-timeout", "restore-failed", "image-damaged"
]


@dataclass(frozen=True)
class Symptom:
    """One fault as it was seen. ``happened_at`` and ``seen_at`` are the controller's seconds, ``wall`` the node's wall
    seconds (None: unknown); ``collateral``: it says only that somebody else is gone; ``signature``: of a
    crash; ``attempt``: the one it struck.
    """

    kind: Kind
    text: str
    seen_at: float
    happened_at: float
    node: str | None = None
    rank: int | None = None
    step: int | None = None
    wall: float | None = None
    error: ErrorInfo | None = None
    collateral: bool = False
    signature: str | None = None
    attempt: int | None = None

    @property
    def detect_s(self) -> float:
        """Seconds from the fault to its detection."""
        return max(0.0, self.seen_at - self.happened_at)


def rank_symptom(event: RankExited, step: int, now: float, being_stopped: bool) -> Symptom:
    """A rank's end as a symptom. ``being_stopped``: its agent was told to kill it, which may be all there is to it."""
    if event.error is not None:
        return _error_symptom(event, event.error, step, now)
    if event.signal is not None:
        how = f"was ended by {_signal_name(event.signal)}{f', {event.why}' if event.why else ''}"
        # The communication libraries abort a process whose peer is gone.
        collateral = event.signal == SIGABRT or (being_stopped and event.signal == SIGKILL and not event.why)
    else:
        how, collateral = f"exited with status {event.code}", being_stopped
    return Symptom(
        "rank-exit",
        f"rank {event.rank} on {event.node} {how}",
        now,
        now,
        event.node,
        event.rank,
        step,
        event.time or None,
        collateral=collateral,
        signature=how,
    )


def _error_symptom(event: RankExited, error: ErrorInfo, step: int, now: float) -> Symptom:
    first_line = error.message.strip().splitlines()[0] if error.message.strip() else ""
    return Symptom(
        "rank-error",
        f"rank {event.rank} on {event.node} raised {error.type}: {first_line}",
        now,
        now,
        event.node,
        event.rank,
        step,
        error.time,
        error,
        policy.is_collateral(error.type, error.message),
        policy.signature(error.type, error.message),
    )


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"


def first_cause(symptoms: Sequence[Symptom]) -> Symptom:
    """The one that explains the others: the earliest that is not collateral, by the ranks' own clocks among ranks."""
    roots = [symptom for symptom in symptoms if not symptom.collateral] or list(symptoms)
    first = min(roots, key=lambda symptom: symptom.happened_at)
    if first.wall is None:
        return first
    return min((root for root in roots if root.wall is not None), key=lambda root: root.wall or 0.0)
