"""Conditions out of a decision. Pure. There are always five; ``lastTransitionTime`` moves with ``status`` alone."""

from __future__ import annotations

from collections.abc import Mapping

from outlast.jobstatus import Condition, Phase, TrainingJobStatus
from outlast_operator.active import recovery_word
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
    recovering = phase == "Recovering"
    return {
        "Ready": (ready, why),
        "Suspended": (_truth(phase == "Suspended"), _suspended(decision)),
        "Recovering": (_truth(recovering), recovery_word(sight) if recovering else _recovered(sight)),
        "Succeeded": _ended(phase, "Succeeded", why),
        "Failed": _ended(phase, "Failed", why),
    }


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


def _recovered(sight: Sight) -> Word:
    """The last recovery, once it is over; how long it took is kept in the condition when its controller is gone."""
    records = sight.heard.status.get("recoveries") if sight.heard is not None else ()
    last = records[-1] if isinstance(records, list | tuple) and records else {}
    if isinstance(last, dict) and isinstance(last.get("total_s"), int | float):
        lost = f", {last['lost_steps']} steps lost" if last.get("lost_steps") is not None else ""
        return Word("Recovered", f"{last.get('cause', '')} ({last['total_s']:.1f} s{lost})")
    known = next((one for one in sight.old.conditions if one.type == "Recovering"), None)
    if known is not None and known.status == "False":
        return Word(known.reason, known.message)
    return Word("Recovered" if known is not None else "NothingLost", known.message if known is not None else "")


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
