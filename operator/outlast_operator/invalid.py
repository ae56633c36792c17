"""A resource that cannot be obeyed, of a job that has nothing to go on with: it waits, and says why. Pure."""

from __future__ import annotations

from outlast.jobstatus import Condition, Phase, TrainingJobStatus
from outlast_operator.conditions import LONGEST_MESSAGE
from outlast_operator.happenings import happened
from outlast_operator.model import Observed, Plan
from outlast_operator.pods import owned_by
from outlast_operator.timestamps import written
from outlast_operator.verdict import Truth, Word

REASON = "InvalidSpec"
_SUSPENDED = Word("Suspended", "the job has no Pods; it starts when its spec can be obeyed and spec.suspend is false")


def refused(observed: Observed, old: TrainingJobStatus, problem: str, now: float) -> Plan:
    """The status that names the problem. No Pods are made; those of a job that is over stay as they are."""
    if old.phase in ("Succeeded", "Failed"):
        return Plan()
    generation = observed.raw["metadata"].get("generation")
    phase: Phase = "Suspended" if old.phase == "Suspended" or _is_suspended(observed) else "Pending"
    conditions = _conditions(old, phase, problem, generation, now)
    status = old.model_copy(update={"phase": phase, "observed_generation": generation, "conditions": conditions})
    told = happened(old, status, None)
    urgent = bool(told) or (old.phase, old.observed_generation) != (phase, generation)
    return Plan((), status, urgent, told)


def _is_suspended(observed: Observed) -> bool:
    """Whether the job shall have no Pods and has none: then every field of its spec may be corrected."""
    uid = observed.raw["metadata"].get("uid", "")
    suspend = (observed.raw.get("spec") or {}).get("suspend") is True
    return suspend and not owned_by(observed.pods, uid)


def _conditions(
    old: TrainingJobStatus, phase: Phase, problem: str, generation: int | None, now: float
) -> tuple[Condition, ...]:
    """All five. Ready has the problem; what is known of the others stays, else the job has not begun."""
    known = {str(condition.type): condition for condition in old.conditions}
    suspended: Truth = "True" if phase == "Suspended" else "False"
    words: dict[str, tuple[Truth, Word]] = {
        "Ready": ("False", Word(REASON, problem[:LONGEST_MESSAGE])),
        "Suspended": (suspended, _SUSPENDED if suspended == "True" else Word("NotSuspended")),
        "Recovering": ("False", Word("NothingLost")),
        "Succeeded": ("False", Word("NotOver")),
        "Failed": ("False", Word("NotOver")),
    }
    for kind, before in known.items():
        if kind != "Ready" and (kind != "Suspended" or before.status == suspended):
            words[kind] = (before.status, Word(before.reason, before.message))
    return tuple(_condition(kind, *words[kind], known.get(kind), generation, now) for kind in words)


def _condition(
    kind: str, truth: Truth, word: Word, before: Condition | None, generation: int | None, now: float
) -> Condition:
    same = before is not None and before.status == truth
    return Condition(
        type=kind,  # type: ignore[arg-type]
        status=truth,
        reason=word.reason,
        message=word.message,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before is not None and same else written(now),
    )
