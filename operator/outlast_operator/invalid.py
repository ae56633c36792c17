"""A resource that cannot be obeyed, of a job that has nothing to go on with: it waits, and says why. Pure."""

from __future__ import annotations

from outlast.jobstatus import Condition, TrainingJobStatus
from outlast_operator.happenings import happened
from outlast_operator.model import Observed, Plan
from outlast_operator.timestamps import written

REASON = "InvalidSpec"


def refused(observed: Observed, old: TrainingJobStatus, problem: str, now: float) -> Plan:
    """The status that names the problem. No Pods are made; those of a job that is over stay as they are."""
    if old.phase in ("Succeeded", "Failed"):
        return Plan()
    generation = observed.raw["metadata"].get("generation")
    known = {condition.type: condition for condition in old.conditions}
    ready = known.get("Ready")
    since = ready.last_transition_time if ready is not None and ready.status == "False" else written(now)
    refusal = Condition(
        type="Ready",
        status="False",
        reason=REASON,
        message=problem,
        observed_generation=generation,
        last_transition_time=since,
    )
    rest = tuple(condition for condition in old.conditions if condition.type != "Ready")
    phase = old.phase if old.phase == "Suspended" else "Pending"
    status = old.model_copy(update={"phase": phase, "observed_generation": generation, "conditions": (refusal, *rest)})
    told = happened(old, status, None)
    return Plan((), status, bool(told) or old.observed_generation != generation, told)
