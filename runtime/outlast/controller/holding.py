"""Why ranks are held at a snapshot, and what comes of it once they wait there. Pure.

::

    the job is suspended     -> they stay, while the snapshot goes to the store         (suspending)
    somebody asked to hold   -> they stay until another controller goes on from there, or the time is over
    fewer nodes are wanted   -> a planned attempt with fewer                            (scaling)
    a node with a seat leaves, or nodes are free -> a planned attempt without, or with  (resizing)
    nothing of that any more -> they go on
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlast.controller import resizing, scaling
from outlast.controller.recovery import Planned
from outlast.messages.events import HoldRequested

if TYPE_CHECKING:
    from outlast.controller.job import Job


def ask(job: Job, asked: HoldRequested, now: float) -> None:
    """Ranks shall wait at the next snapshot, for the controller after this one."""
    if job.outcome is None:
        job.hold_until = now + asked.patience_s
        job.emit("hold", f"all ranks wait at the next snapshot, {asked.patience_s:.0f} s at most")
        drive(job, now)


def drive(job: Job, now: float) -> None:
    """While the job runs: whether the next snapshot holds the ranks, and what those wait for that are held."""
    cycle = job.cycle
    if job.hold_until is not None and now >= job.hold_until:
        job.hold_until = None
        job.emit("hold-over", "nobody has taken over: ranks need not wait any longer")
    if cycle is None or not job.all_ready or job.final is not None or job.outcome is not None:
        return
    grows = resizing.grows(job, now)
    cycle.pace.hold = _stays(job) or grows or scaling.shrinks(job) or bool(resizing.seated_leavers(job))
    settle(job, now)


def settle(job: Job, now: float) -> None:
    """All ranks wait at a committed snapshot: begin what they wait for, or let them go on."""
    cycle = job.cycle
    if cycle is None or cycle.held is None or _stays(job):
        return
    held_since, planned = cycle.held_since, _planned(job, now)
    job.story.held(now - held_since, now)
    if planned is not None:
        job.begin_attempt(now, planned)
    else:
        cycle.pace.hold = False
        job.progress.moved_at = now
        job.out += cycle.proceed()


def _stays(job: Job) -> bool:
    """Whether ranks that are held stay there."""
    return job.suspension is not None or job.hold_until is not None


def _planned(job: Job, now: float) -> Planned | None:
    fewer = scaling.admit(job, now) if scaling.shrinks(job) else None
    leavers = resizing.seated_leavers(job)
    if fewer is not None:
        return fewer
    if leavers:
        return resizing.departure(leavers)
    if resizing.grows(job, now):
        return Planned("resize", f"grows from {job.size} to {job.resizing.target} nodes")
    return None
