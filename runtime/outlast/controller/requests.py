"""What people and the cluster ask of a job while it lives, by the type of the request. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from outlast.controller import holding, injuring, scaling, suspending
from outlast.messages import events as e

if TYPE_CHECKING:
    from outlast.controller.job import Job

Request = e.ResizeRequested | e.SuspendRequested | e.HoldRequested | e.FaultRequested

_OBJECTIONS: dict[type, Callable[[Job, Any], str]] = {
    e.ResizeRequested: scaling.objection,
    e.FaultRequested: injuring.objection,
}

ASK: dict[type, Callable[[Job, Any, float], None]] = {
    e.ResizeRequested: scaling.ask,
    e.SuspendRequested: suspending.ask,
    e.HoldRequested: holding.ask,
    e.FaultRequested: injuring.ask,
}


def objection(job: Job, request: Request) -> str:
    """Why a request cannot be granted; empty when it can."""
    if job.outcome == "suspended" and isinstance(request, e.SuspendRequested):
        return ""
    if job.outcome is not None:
        return f"the job has ended, or is about to: {job.reason}"
    find = _OBJECTIONS.get(type(request))
    return find(job, request) if find is not None else ""
