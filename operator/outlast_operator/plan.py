"""One pass over one job, decided: what is seen goes in, what is done comes out. Pure.

::

    Observed --sight--> Sight --progress--> status with what the controller says
                          '--> over? ending    its outcome, its deadline? ending    to be suspended? suspending
                               else active (starting: enough nodes or none; replacing: which Pods; calls)
                          --> Decision --conditions--> status --happenings--> Plan
"""

from __future__ import annotations

from outlast.jobstatus import StartStatus, TrainingJobStatus
from outlast_operator import active, ending, suspending
from outlast_operator.conditions import judged
from outlast_operator.happenings import happened
from outlast_operator.invalid import refused
from outlast_operator.model import Observed, Plan, Settings
from outlast_operator.progress import progressed
from outlast_operator.sight import Sight, job_in_force, old_status, problem_of, sight_of
from outlast_operator.verdict import Decision

SOONEST_S = 0.05
"""Before this a pass is not repeated for the sake of time alone."""


def plan(observed: Observed, settings: Settings, now: float) -> Plan:
    """What one pass does about one job; ``now``: wall seconds.

    Raises ValueError when the job needs its first token and ``observed.new_token`` is empty.
    """
    if observed.raw["metadata"].get("deletionTimestamp"):
        return Plan()  # the garbage collector does the rest
    old, problem = old_status(observed.raw), problem_of(observed)
    # A job without Pods begins with what it is told now, or not at all.
    job = None if problem and old.phase == "Suspended" else job_in_force(observed, problem)
    if job is None:
        return refused(observed, old, problem, now)
    sight = sight_of(observed, job, problem, old, settings, now)
    if sight.unasked and not ending.is_over(old):
        return Plan()  # its first answer, or that there is none, makes the next pass
    decision = decide(sight)
    status = judged(sight, decision)
    happenings = (*decision.happenings, *happened(old, status, sight.heard))
    return Plan(
        decision.actions,
        status,
        bool(happenings) or _matters(old) != _matters(status),
        happenings,
        _again_in(decision, now),
    )


def decide(sight: Sight) -> Decision:
    """The stage that the job is in, and what that asks for."""
    if ending.is_over(sight.old):
        return ending.after(sight)
    status = progressed(sight)
    ended = ending.outcome(sight, status)
    if ended is not None:
        return ended
    if sight.job.spec.suspend:
        return suspending.suspend(sight, status)
    if sight.suspended:
        return suspending.start_anew(sight, status)
    return active.run(sight, status)


def _matters(status: TrainingJobStatus) -> tuple[object, ...]:
    """What is written at once when it changes; all else is progress."""
    return (
        status.phase,
        status.observed_generation,
        {(condition.type, condition.status, condition.reason) for condition in status.conditions},
        status.checkpoint.url if status.checkpoint is not None else None,
        status.head,
        status.next_pod,
        _start(status.start),
        status.suspending_since,
        status.start_time,
        status.active_since,
        status.completion_time,
        status.weights_digest,
        status.controller.identity,
    )


def _start(start: StartStatus) -> tuple[object, ...]:
    return (start.failures, start.since, start.attempts, start.retry_time)


def _again_in(decision: Decision, now: float) -> float | None:
    if not decision.waits:
        return None
    return max(SOONEST_S, min(decision.waits) - now)
