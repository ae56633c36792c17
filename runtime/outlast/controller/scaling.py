"""The size that was asked for while the job runs: whether it can be, and who leaves when it is smaller. Pure.

::

    ResizeRequested -> more: the job grows when nodes join (``resizing``)
                    -> fewer seats: ranks held at a snapshot -> who is too many leaves -> a planned attempt without them
                    -> fewer spares: they leave

Who leaves does so as a node that was told to go: it is let go once nothing of it is needed, without a time of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from outlast.controller import keeping
from outlast.controller.membership import Departure
from outlast.controller.phases import PREPARING
from outlast.controller.policy import leavers, natural
from outlast.controller.recovery import Planned, room
from outlast.messages.events import ResizeRequested
from outlast.messages.kept import Size

if TYPE_CHECKING:
    from outlast.controller.job import Job

REASON = "fewer nodes are wanted"


def objection(job: Job, asked: ResizeRequested) -> str:
    """Why the job cannot have that size; empty when it can, as far as is known."""
    return "" if asked.replicas >= job.size else _no_room(job, asked.replicas)


def ask(job: Job, asked: ResizeRequested, now: float) -> None:
    """The job shall have another size from now on."""
    del now
    before = Size(job.config.replicas, job.config.min_replicas, job.config.spares)
    size = Size(asked.replicas, asked.min_replicas, asked.spares)
    if size == before:
        _look_again(job)
        return
    trouble = objection(job, asked)
    if trouble:
        job.emit("resize-refused", trouble, replicas=asked.replicas)
        return
    _want(job, size)
    job.resizing.shedding = size.replicas < before.replicas or _total(size) < _total(before)
    if size.replicas > before.replicas:
        job.resizing.pause.lift()
    _recall(job)
    if job.preparation is not None and job.phase in PREPARING and job.preparation.size is not None:
        job.preparation.size = max(job.floor, min(job.preparation.size, size.replicas))
        job.preparation.looked = None
    text = f"{_told(size)} are wanted; {_told(before)} were"
    fields = {"replicas": size.replicas, "min_replicas": size.min_replicas, "spares": size.spares}
    job.emit("resize-asked", text, **fields)
    keeping.keep(job)


def _look_again(job: Job) -> None:
    """The size that the job has already was asked for: if there are more nodes by now, they leave."""
    resizing, config = job.resizing, job.config
    if not resizing.shedding and job.members.usable > config.replicas + config.spares:
        resizing.shedding = True
        keeping.keep(job)


def shrinks(job: Job) -> bool:
    """Whether the job runs on more nodes than are wanted."""
    return job.size > job.config.replicas


def shed(job: Job, now: float) -> None:
    """While the job runs: have leave who is too many and has no seat; whoever has one is seen to by ``admit``."""
    resizing, config = job.resizing, job.config
    if not resizing.shedding or shrinks(job):
        return
    _tell_surplus(job, now)
    if len(job.members.alive) <= config.replicas + config.spares:
        resizing.shedding = False
        keeping.keep(job)


def admit(job: Job, now: float) -> Planned | None:
    """Ranks are held: the attempt with as few nodes as are wanted; None when those turn out to be too small."""
    size, wanted = job.size, job.config.replicas
    trouble = _no_room(job, wanted)
    if trouble:
        job.emit("resize-refused", trouble, replicas=wanted)
        _want(job, Size(size, job.config.min_replicas, job.config.spares))
        job.resizing.shedding = False
        keeping.keep(job)
        return None
    names = _tell_surplus(job, now)
    who = f": {', '.join(names)} {'leaves' if len(names) == 1 else 'leave'}" if names else ""
    return Planned("resize", f"shrinks from {size} to {wanted} nodes{who}", names[0] if names else None)


def _want(job: Job, size: Size) -> None:
    job.config = replace(job.config, replicas=size.replicas, min_replicas=size.min_replicas, spares=size.spares)
    job.resizing.asked = size


def _tell_surplus(job: Job, now: float) -> list[str]:
    """Have those leave that are more than replicas and spares."""
    members, config = job.members, job.config
    seats = {
        seat: name for seat, name in members.seats.items() if name in members.alive and name not in members.leaving
    }
    surplus = members.usable - config.replicas - config.spares
    names = leavers(seats, [node.name for node in members.free()], max(0, surplus))
    for name in names:
        node = members.nodes[name]
        members.depart(node, Departure(now, math.inf, REASON, source=True))
        job.emit("leaving", f"{name} leaves ({REASON})", node=name, seat=node.seat, grace_s=None)
    return names


def _recall(job: Job) -> None:
    """Have those stay after all that were told to leave as too many, and have not been let go."""
    members, config = job.members, job.config
    leaving = ((node, node.leaving) for node in members.leaving.values())
    told = [node for node, departure in leaving if departure and departure.unneeded and not departure.released]
    told.sort(key=lambda node: (node.seat is None, node.seat or 0, natural(node.name)))
    for node in told[: max(0, config.replicas + config.spares - members.usable)]:
        members.stay(node)
        job.emit("stays", f"{node.name} stays: it is wanted again", node=node.name, seat=node.seat)


def _no_room(job: Job, replicas: int) -> str:
    """Why so few nodes cannot hold the job's snapshots; empty when they can, or nothing is known yet."""
    members = job.members
    stay = [name for name in members.seated_names() if name in members.alive and name not in members.leaving]
    stay = [*stay, *(node.name for node in members.free())][:replicas]
    if not stay or not job.lengths:
        return ""
    fit = room(job.config, members, stay, dict(job.lengths))
    return (
        "" if fit else f"{replicas} nodes are too small for the job: {fit}; leave it larger, or give nodes more memory"
    )


def _total(size: Size) -> int:
    return size.replicas + size.spares


def _told(size: Size) -> str:
    least = "" if size.min_replicas is None else f" (at least {size.min_replicas})"
    return f"{size.replicas} nodes{least} and {size.spares} spares"
