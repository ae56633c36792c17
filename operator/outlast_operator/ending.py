"""The end of a job: its outcome is written first, then the controller may end, and at last the job goes. Pure.

A finished job stays finished: no edit gives it Pods again. Its Pods end by themselves once the controller is told to
(``POST /stop``) and are kept until the job is deleted; who has not ended two minutes later is deleted.
"""

from __future__ import annotations

from outlast.api import KIND
from outlast.jobstatus import Phase, TrainingJobStatus
from outlast_operator.heard import SUSPENDED
from outlast_operator.model import Action, Call, Delete
from outlast_operator.recoveries import camel
from outlast_operator.sight import Sight
from outlast_operator.timestamps import read_or_none, written
from outlast_operator.verdict import Decision, Word

LINGER_S = 120.0
"""Seconds after the end in which Pods end by themselves."""
OVER: tuple[Phase, ...] = ("Succeeded", "Failed")
DEADLINE = "DeadlineExceeded"


def is_over(status: TrainingJobStatus) -> bool:
    """Whether the job's outcome is recorded."""
    return status.phase in OVER


def outcome(sight: Sight, status: TrainingJobStatus) -> Decision | None:
    """The end of a job that was not over, if this is it."""
    said = sight.heard.outcome if sight.heard is not None else ""
    if sight.heard is not None and said and said != SUSPENDED:
        reason = sight.heard.text("reason")
        if said == "succeeded":
            return finish(
                sight, status, "Succeeded", Word("Succeeded", reason or "all ranks have done all their steps")
            )
        return finish(sight, status, "Failed", _failure(said, reason, sight))
    ends = deadline(sight, status)
    if ends is not None and sight.now >= ends:
        limit = sight.job.spec.active_deadline_seconds
        text = f"the job was not done {limit} s after it was first given Pods (spec.activeDeadlineSeconds)"
        return finish(sight, status, "Failed", Word(DEADLINE, text))
    return None


def deadline(sight: Sight, status: TrainingJobStatus) -> float | None:
    """When activeDeadlineSeconds will be over; None: never."""
    limit, started = sight.job.spec.active_deadline_seconds, read_or_none(status.active_since)
    return None if limit is None or started is None else started + limit


def finish(sight: Sight, status: TrainingJobStatus, phase: Phase, why: Word) -> Decision:
    """Record the outcome; what follows from it is for the next pass, when it is there to be seen."""
    done = {"completion_time": written(sight.now), "suspending_since": None}
    return Decision(phase, why, status.model_copy(update=done), waits=(sight.now,))


def after(sight: Sight) -> Decision:
    """A job that is over: let its Pods end, and delete it when its time has come."""
    old = sight.old
    known = sight.condition(old.phase)
    why = Word(known.reason, known.message) if known is not None else Word(old.phase)
    ended_at = read_or_none(old.completion_time) or sight.now
    keep = {} if old.completion_time else {"completion_time": written(ended_at)}
    status = old.model_copy(update={"observed_generation": sight.job.metadata.generation, **keep})
    actions, waits = _see_off(sight, ended_at)
    ttl = sight.job.spec.ttl_seconds_after_finished
    if ttl is not None and sight.now >= ended_at + ttl:
        actions.append(Delete(KIND, sight.name, sight.job.metadata.uid or ""))
    elif ttl is not None:
        waits.append(ended_at + ttl)
    return Decision(old.phase, why, status, tuple(actions), waits=tuple(waits))


def _see_off(sight: Sight, ended_at: float) -> tuple[list[Action], list[float]]:
    """Pods that have not ended: the controller is told to; those that nobody tells, or that do not, are deleted."""
    running = [pod for pod in sight.pods if not pod.ended and not pod.deleting]
    if not running:
        return [], []
    actions: list[Action] = []
    if sight.answering:
        actions.append(Call("POST", "/stop", {"reason": f"the job has {sight.old.phase.lower()}"}))
    unheard = sight.heard is None and not any(pod.ready for pod in running)
    if unheard or sight.now >= ended_at + LINGER_S:
        return [*actions, *(Delete("Pod", pod.name, pod.uid) for pod in running)], []
    return actions, [ended_at + LINGER_S]


def _failure(said: str, reason: str, sight: Sight) -> Word:
    """The controller's reason as one word: the cause that it named first, if it is what ended the job."""
    if said == "stopped":
        return Word("Stopped", reason or "the job was asked to stop")
    if "activeDeadlineSeconds" in reason:
        return Word(DEADLINE, reason)
    cause = str(sight.heard.part("first_error").get("cause") or "") if sight.heard is not None else ""
    return Word(camel(cause) or "JobFailed", reason or "the job has failed")
