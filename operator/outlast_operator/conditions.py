"""Conditions out of a decision. Pure. There are always five; ``lastTransitionTime`` moves with ``status`` alone."""

from __future__ import annotations

from collections.abc import Mapping

from outlast.jobstatus import Condition, Phase, TrainingJobStatus
from outlast_operator import recoveries
from outlast_operator.sight import Sight
from outlast_operator.timestamps import written
from outlast_operator.verdict import Decision, Truth, Word

LONGEST_MESSAGE = 1024


def judged(sight: Sight, decision: Decision) -> TrainingJobStatus:
    """The decision's status with its phase and conditions."""
    words = _words(sight, decision)
    old: dict[str, Condition] = {condition.type: condition for condition in sight.old.conditions}
    conditions = tuple(_condition(sight, kind, *words[kind], old.get(kind)) for kind in words)
    return decision.status.model_copy(update={"phase": decision.phase, "conditions": conditions})


def _words(sight: Sight, decision: Decision) -> Mapping[str, tuple[Truth, Word]]:
    phase, why = decision.phase, decision.why
    ready = decision.ready or _truth(phase == "Running")
    return {
        "Ready": (ready, why),
        "Suspended": (_truth(phase == "Suspended"), _suspended(decision)),
        "Recovering": (_truth(phase == "Recovering"), _recovery(sight, phase)),
        "Succeeded": _ended(phase, "Succeeded", why),
        "Failed": _ended(phase, "Failed", why),
    }


def _recovery(sight: Sight, phase: Phase) -> Word:
    if phase == "Recovering":
        return recoveries.under_way(sight)
    return recoveries.last_one(sight, phase in ("Running", "Succeeded"))


def _truth(so: bool) -> Truth:
    return "True" if so else "False"


def _suspended(decision: Decision) -> Word:
    if decision.phase == "Suspended":
        return decision.why
    return decision.suspended or Word("NotSuspended")


def _ended(phase: Phase, kind: Phase, why: Word) -> tuple[Truth, Word]:
    if phase == kind:
        return "True", why
    return "False", Word(phase if phase in ("Succeeded", "Failed") else "NotOver")


def _condition(sight: Sight, kind: str, truth: Truth, word: Word, old: Condition | None) -> Condition:
    same = old is not None and old.status == truth
    return Condition(
        type=kind,  # type: ignore[arg-type]
        status=truth,
        reason=word.reason,
        message=word.message[:LONGEST_MESSAGE],
        observed_generation=sight.job.metadata.generation,
        last_transition_time=old.last_transition_time if old is not None and same else written(sight.now),
    )
