"""Faults that somebody asks of a running job: whether they may be, and who carries them out. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlast.controller.phases import LIVE
from outlast.faults import RANK_KINDS, AtOnce, Kind, Part
from outlast.messages.events import FaultRequested
from outlast.messages.instructions import Crash, Injure

if TYPE_CHECKING:
    from outlast.controller.job import Job


def objection(job: Job, asked: FaultRequested) -> str:
    """Why nothing will be broken; empty when it will."""
    fault = _fault(asked)
    if not job.config.faults:
        return f"{fault}: the job allows no faults; set spec.faults.allow to true before it starts"
    if fault.kind is Kind.CONTROLLER_CRASH:
        return ""
    noun, count = ("rank", job.world) if fault.kind in RANK_KINDS else ("seat", job.size)
    if fault.target is None or fault.target >= count:
        there = f"the job has {noun}s 0 to {count - 1} now" if count else "no attempt has been started yet"
        return f"{fault}: there is no {noun} {fault.target}: {there}"
    if _node(job, fault) is None:
        return f"{fault}: the node of {noun} {fault.target} is lost; another has yet to take its seat"
    if fault.kind in RANK_KINDS and job.phase not in LIVE:
        return f"{fault}: no rank runs just now, the job is {job.phase.value}; ask again when it does"
    return ""


def ask(job: Job, asked: FaultRequested, now: float) -> None:
    """Have it done, if it may be, and say so."""
    del now
    fault = _fault(asked)
    trouble, node = objection(job, asked), _node(job, fault)
    if trouble:
        job.emit("fault-refused", trouble, fault=str(fault))
        return
    fields = {"fault": str(fault), "step": job.progress.top_step, "target": fault.target, "node": node}
    job.emit("fault-injected", str(fault), **fields)
    if node is None:
        job.out.append(Crash())
    else:
        rank = fault.target if fault.kind in RANK_KINDS else None
        job.out.append(Injure(node, fault.kind.value, rank, fault.part.value if fault.part else None))


def _fault(asked: FaultRequested) -> AtOnce:
    return AtOnce(Kind(asked.kind), asked.target, Part(asked.part) if asked.part else None)


def _node(job: Job, fault: AtOnce) -> str | None:
    """Who carries it out: the living node that has the seat or the rank; None: the controller, or nobody."""
    if fault.target is None:
        return None
    seat = fault.target // job.config.procs if fault.kind in RANK_KINDS else fault.target
    name = job.members.seats.get(seat)
    return name if name in job.members.alive else None
