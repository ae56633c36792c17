"""A job of another size: when it grows, how nodes leave it, and what it is told to do for that.

::

    nodes are free, pause over  -> ranks held at a snapshot -> committed -> a planned attempt with more seats
    a node with a seat leaves   -> ranks held at a snapshot -> committed -> a planned attempt without it -> Release
                                -> half of its time is over -> the same from the newest snapshot

Nothing is recomputed: ranks wait at the boundary of the snapshot that the next attempt begins with. A job is made
smaller for want of nodes in ``preparing``, and because that was asked for in ``scaling``. What holds the ranks, and
what comes of it, is in ``holding``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlast.controller import scaling
from outlast.controller.membership import Departure, Node
from outlast.controller.phases import LIVE, PREPARING, Phase
from outlast.controller.recovery import Planned, room
from outlast.messages.events import Leaving
from outlast.messages.instructions import Emit, Release
from outlast.messages.kept import Size

if TYPE_CHECKING:
    from outlast.controller.job import Job

SETTLE_S = 2.0
"""Free nodes are taken once no other has joined for so long, so that those that come together are taken together."""
LONGEST_SETTLE_S = 10.0
LONGEST_PAUSE_S = 600.0
UNSTABLE_S = 300.0
"""A node lost so soon after a growth makes the next one wait longer."""
HURRY_SHARE = 0.5
"""Of a leaving node's time: then its handing over begins without a snapshot of its own."""
RELEASE_SHARE = 0.8
"""Of a leaving node's time: then it is let go in any case."""
RELEASE_AGAIN_S = 15.0
"""Longer than an agent waits for its ranks to end before it says that they have not."""


class Pause:
    """How long a job stays as it is before it grows: ``first_s`` after a resize, twice as long each time that a node
    is lost soon after a growth."""

    def __init__(self, first_s: float) -> None:
        self._first_s = self.seconds = first_s
        self._resized_at: float | None = None
        self._grown_at: float | None = None

    def resized(self, grown: bool, now: float) -> None:
        """An attempt was started with another size."""
        self._resized_at = now
        if grown:
            self._grown_at = now

    def lost(self, now: float) -> None:
        """A node with a seat was lost."""
        if self._grown_at is None:
            return
        soon = now - self._grown_at < UNSTABLE_S
        self.seconds = min(LONGEST_PAUSE_S, max(1.0, 2 * self.seconds)) if soon else self._first_s
        self._grown_at = None

    def lift(self) -> None:
        """The job may grow at once: somebody has asked for it."""
        self._resized_at = None

    def over(self, now: float) -> bool:
        """Whether the job may grow."""
        return self._resized_at is None or now - self._resized_at >= self.seconds


class Resizing:
    """``records``: each change of size as {"from", "to", "attempt", "step", "cause"}; ``target``: the size that the
    job is about to grow to; ``asked``: the one that was asked for last, if any; ``shedding``: nodes that are too many
    for it have yet to leave."""

    def __init__(self, grow_after_s: float) -> None:
        self.pause = Pause(grow_after_s)
        self.records: list[dict[str, Any]] = []
        self.target: int | None = None
        self.no_room = ""
        self.asked: Size | None = None
        self.shedding = False

    def launched(self, before: int, size: int, wanted: int, attempt: int, step: int, now: float) -> list[Emit]:
        """An attempt of ``size`` nodes is started after one of ``before`` (0: none)."""
        self.target = None
        if size == before or (not before and size == wanted):
            return []
        self.pause.resized(size > before > 0, now)
        fields = {"to": size, "wanted": wanted, "attempt": attempt, "step": step}
        if not before:
            return [Emit("short", f"begins with {size} of {wanted} nodes", {"from": wanted, **fields})]
        self.records.append({"from": before, "to": size, "attempt": attempt, "step": step})
        how = "grows" if size > before else "shrinks"
        return [Emit("resized", f"{how} from {before} to {size} of {wanted} nodes", {"from": before, **fields})]


def drive(job: Job, now: float) -> None:
    """While ranks live: see to who leaves."""
    if job.members.leaving:
        _see_off(job, now)
    if job.phase is Phase.RUNNING and job.all_ready and job.final is None:
        scaling.shed(job, now)


# --- grow -----------------------------------------------------------------------------------------------------------


def grows(job: Job, now: float) -> bool:
    """Whether the job is to grow now; says so when it has just become so."""
    resizing, before = job.resizing, job.resizing.target
    resizing.target = _target(job, now)
    if resizing.target is not None and before is None:
        text = f"grows from {job.size} to {resizing.target} nodes after the next snapshot"
        job.emit("growing", text, **{"from": job.size, "to": resizing.target})
    return resizing.target is not None


def _target(job: Job, now: float) -> int | None:
    members, size, wanted = job.members, job.size, job.config.replicas
    if size >= wanted or len(members.alive) <= size or not job.resizing.pause.over(now):
        return None
    free = members.free()
    if not free or (job.resizing.target is None and not _settled(free, now)):
        return None
    chosen = free[: wanted - size]
    return size + len(chosen) if _has_room(job, chosen) else None


def _settled(free: list[Node], now: float) -> bool:
    joined = [node.joined_at for node in free]
    return now - max(joined) >= SETTLE_S or now - min(joined) >= LONGEST_SETTLE_S


def _has_room(job: Job, chosen: list[Node]) -> bool:
    newest = job.cycle.newest if job.cycle is not None else None
    if newest is None:
        return True
    names = [*job.members.seated_names(), *(node.name for node in chosen)]
    fit = room(job.config, job.members, names, dict(newest.lengths))
    text = "" if fit else str(fit)
    if text and text != job.resizing.no_room:
        job.emit("no-room", f"does not grow to {len(names)} nodes: {text}", missing=dict(fit.missing))
    job.resizing.no_room = text
    return bool(fit)


# --- leave ----------------------------------------------------------------------------------------------------------


def leave(job: Job, node: Node, event: Leaving, now: float) -> None:
    """A node was told to go."""
    if node.leaving is not None:
        _leave_again(job, node, node.leaving, event, now)
        return
    source = node.seat is not None or job.phase is Phase.GATHERING
    job.members.depart(node, Departure(now, event.grace_s, event.reason, source=source))
    why = f" ({event.reason})" if event.reason else ""
    text = f"{node.name} leaves within {event.grace_s:.0f} s{why}"
    job.emit("leaving", text, node=node.name, seat=node.seat, grace_s=event.grace_s)
    if job.preparation is not None and job.phase in PREPARING:
        job.preparation.size = max(job.floor, min(job.members.usable, job.config.replicas))
    _see_off(job, now)


def _leave_again(job: Job, node: Node, departure: Departure, event: Leaving, now: float) -> None:
    """A node that leaves already, because it is too many or was told before, is told to go."""
    if departure.released:
        job.out.append(Release(node.name))
    elif departure.unneeded:
        departure.told_at, departure.grace_s, departure.reason = now, event.grace_s, event.reason
        _see_off(job, now)


def release_done(job: Job, now: float) -> None:
    """Let those go of whom nothing is needed any more, or whose time is nearly over."""
    for node in list(job.members.leaving.values()):
        departure = node.leaving
        if departure is None:
            continue
        if departure.released:
            if now >= departure.again_at:  # a call to an agent may fail while the agent lives on
                departure.again_at = now + RELEASE_AGAIN_S
                job.out.append(Release(node.name))
        elif departure.spent(now) >= RELEASE_SHARE or not _needed(job, node):
            departure.released, departure.again_at = True, now + RELEASE_AGAIN_S
            job.emit("released", f"{node.name} may go: nothing of it is needed any more", node=node.name)
            job.out.append(Release(node.name))


def _see_off(job: Job, now: float) -> None:
    release_done(job, now)
    if job.phase not in (Phase.STARTING, Phase.RUNNING):
        return
    late = [node for node in seated_leavers(job) if node.leaving and node.leaving.spent(now) >= HURRY_SHARE]
    if late and job.final is None:
        job.begin_attempt(now, departure(late))


def _needed(job: Job, node: Node) -> bool:
    """Whether anything would be lost with a leaving node."""
    if job.outcome is not None:
        return False
    if node.seat is not None and job.phase in LIVE:
        return job.needs(node)
    if node.leaving is None or not node.leaving.source:
        return False
    # It had a seat: its images are a source until what the next attempt has is protected without it.
    return job.phase not in LIVE or job.cycle is None or job.cycle.newest is None


def seated_leavers(job: Job) -> list[Node]:
    """Those that leave, have a seat and have not done all there is to do."""
    leavers = (node for node in job.members.leaving.values() if node.seat is not None)
    return [node for node in leavers if job.needs(node)]


def departure(leavers: list[Node]) -> Planned:
    names = ", ".join(node.name for node in leavers)
    reason = next((node.leaving.reason for node in leavers if node.leaving and node.leaving.reason), "")
    verb = "leaves" if len(leavers) == 1 else "leave"
    return Planned("node-left", f"{names} {verb}{f' ({reason})' if reason else ''}", leavers[0].name)
