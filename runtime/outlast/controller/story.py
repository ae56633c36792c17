"""What happened to the job and what it cost: recoveries, failures and the ledger of time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from outlast.controller.faults import Symptom
from outlast.controller.recovery import Launch, Planned
from outlast.messages.instructions import Emit
from outlast.snapshot.identity import Generation
from outlast.telemetry.goodput import Ledger, RecoveryRecord

LAST_FAILURES = 20
MOST_TOLD = 16
"""Faults of one recovery that get a line of their own though they only say that somebody else is gone."""


class Story:
    """Recoveries so far, the one under way (``open``), restarts by cause, and the ledger. ``epoch`` added to the
    machine's seconds gives wall seconds."""

    def __init__(self, now: float, epoch: float = 0.0) -> None:
        self.epoch = epoch
        self.ledger = Ledger(now)
        self.records: list[RecoveryRecord] = []
        self.open: RecoveryRecord | None = None
        self.restarts: Counter[str] = Counter()
        self.failures: deque[Symptom] = deque(maxlen=LAST_FAILURES)
        self.best_step = 0
        self.last_attempt = 0
        """The newest attempt whose ranks were started."""
        self._running = False
        self._told = 0
        self._stall: tuple[Generation | None, float] = (None, 0.0)
        self._stopping_at = self._starting_at = self._loaded_at = 0.0

    def fault(self, symptom: Symptom, attempt: int, now: float) -> list[Emit]:
        """A fault was seen: a recovery begins, or the one under way is struck again. Of many victims a few are told."""
        self._running = False
        if self.open is None or self.open.planned:
            self.open = RecoveryRecord(symptom.kind, symptom.text, attempt, symptom.happened_at, symptom.detect_s)
            self.records.append(self.open)
            self.ledger.move("detect", symptom.detect_s, now)
            self._told = 0
        self._told += 1
        return [_fault_line(symptom)] if self._told <= MOST_TOLD or not symptom.collateral else []

    def planned(self, planned: Planned, attempt: int, now: float) -> Emit:
        """An attempt is begun on purpose: it is recorded like a recovery, though nothing was lost."""
        if self.open is None:
            self.open = RecoveryRecord(planned.kind, planned.cause, attempt, now, 0.0, node=planned.node, planned=True)
            self.records.append(self.open)
        else:
            self.open.further.append(planned.cause)
        return Emit("planned", planned.cause, {"kind": planned.kind, "node": planned.node})

    def held(self, seconds: float, now: float) -> None:
        """All ranks waited for a snapshot to be committed."""
        self.ledger.move("snapshot_stall", seconds, now)

    def struck_again(self, symptom: Symptom) -> Emit:
        """A fault was seen when the cause of the recovery had been named already."""
        if self.open is not None:
            self.open.further.append(symptom.text)
        return _fault_line(symptom)

    def stopping(self, now: float) -> None:
        """Everybody is told to stop."""
        self.ledger.enter("stop", now)
        self._running = False
        self._stopping_at = now

    def concluded(self, cause: Symptom, symptoms: Sequence[Symptom], now: float) -> Emit:
        """The cause is named: the first of ``symptoms``."""
        self.ledger.move("detect", cause.seen_at - self._stopping_at, now)
        self.failures.append(cause)
        self.restarts[cause.kind] += 1
        record = self.open
        others = [symptom for symptom in symptoms if symptom is not cause]
        if record is not None and record.stop_s is None and not record.further:
            record.kind, record.cause, record.node, record.rank = cause.kind, cause.text, cause.node, cause.rank
            record.fault_at, record.detect_s = cause.happened_at, cause.detect_s
            record.further = [symptom.text for symptom in others if not symptom.collateral]
        elif record is not None:
            record.further += [symptom.text for symptom in symptoms if not symptom.collateral]
        return Emit("cause", cause.text, _cause_fields(cause, others, self.epoch))

    def launched(self, launch: Launch, world: int, now: float) -> None:
        """Ranks start."""
        self.last_attempt = launch.attempt.number
        self.ledger.enter("restore", now)
        self._starting_at = now
        if self.open is not None:
            self.open.attempt = launch.attempt.number
            self.open.stop_s = now - self._stopping_at
            self.open.restored_step = launch.step
            self.open.lost_steps = max(0, self.best_step - launch.step)
            self.open.restore_sources = launch.sources(world)

    def loading(self, now: float) -> None:
        """All nodes have rebuilt what they lacked."""
        self.ledger.enter("start", now)
        self._loaded_at = now
        if self.open is not None:
            self.open.restore_s = now - self._starting_at

    def running(self, step: int, now: float) -> None:
        """All ranks are ready to go on with ``step``."""
        self.ledger.enter("recompute" if step < self.best_step else "train", now)
        self._running = True
        if self.open is not None:
            self.open.start_s = now - self._loaded_at

    def stalled(self, generation: Generation, seconds: float, now: float) -> None:
        """A rank's loop was blocked by a snapshot; the job was for as long as its slowest rank."""
        known = self._stall[1] if self._stall[0] == generation else 0.0
        if seconds > known:
            self.ledger.move("snapshot_stall", seconds - known, now)
            self._stall = (generation, seconds)

    def moved(self, top_step: int, restored_step: int, now: float) -> Emit | None:
        """Some rank has done a step; the first one after a recovery ends it."""
        if top_step > self.best_step:
            self.best_step = top_step
            if self.ledger.current == "recompute":
                self.ledger.enter("train", now)
        record = self.open
        if record is None or top_step <= restored_step or not self._running:
            return None
        self.open = None
        record.total_s = now - record.fault_at
        kind, text = ("resumed", "went on") if record.planned else ("recovered", "recovered from")
        text = f"{text}: {record.cause} ({record.total_s:.2f} s, {record.lost_steps} steps lost)"
        return Emit(kind, text, record.to_json())

    def first_error(self) -> dict[str, Any] | None:
        """The last named cause, for people: {cause, text, node, rank, step, attempt, time, type, message, ...}."""
        return symptom_json(self.failures[-1], self.epoch) if self.failures else None


def symptom_json(symptom: Symptom, epoch: float, now: float | None = None) -> dict[str, Any]:
    """A symptom as plain values; ``time`` in wall seconds, the node's own where it was told, else the controller's, of
    which ``epoch`` makes wall seconds; with ``now``, its age in seconds."""
    error = symptom.error
    plain: dict[str, Any] = {
        "cause": symptom.kind,
        "text": symptom.text,
        "node": symptom.node,
        "rank": symptom.rank,
        "step": symptom.step,
        "attempt": symptom.attempt,
        "time": round(symptom.happened_at + epoch if symptom.wall is None else symptom.wall, 3),
        "type": error.type if error else symptom.kind,
        "message": error.message if error else symptom.text,
        "traceback": error.traceback if error else None,
    }
    return plain if now is None else {**plain, "age_s": round(now - symptom.seen_at, 1)}


def _fault_line(symptom: Symptom) -> Emit:
    fields = {"cause": symptom.kind, "node": symptom.node, "rank": symptom.rank, "step": symptom.step}
    return Emit("fault", symptom.text, {**fields, "detect_s": round(symptom.detect_s, 3)})


def _cause_fields(cause: Symptom, others: Sequence[Symptom], epoch: float) -> dict[str, Any]:
    fields = symptom_json(cause, epoch)
    if others:
        fields["also"] = [symptom.text for symptom in others[:20]]
    return fields
