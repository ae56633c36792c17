"""What /status says: the job's state as plain JSON. Ages are seconds, times wall seconds since 1970."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlast.controller.membership import Node
from outlast.controller.phases import SHOWN, Phase
from outlast.controller.policy import leavers
from outlast.controller.story import symptom_json

if TYPE_CHECKING:
    from outlast.controller.job import Job

LAST_RECOVERIES = 200
MOST_LEAVERS = 64


def status_of(job: Job, now: float) -> dict[str, Any]:
    """The whole of it; ``phase`` is for people and Kubernetes, ``stage`` the machine's own."""
    story, progress = job.story, job.progress
    return {
        "phase": _shown(job),
        "stage": job.phase.value,
        "reason": job.reason,
        "outcome": job.outcome if job.over else None,
        "step": story.best_step if job.over else progress.top_step,
        "best_step": story.best_step,
        "total": progress.total,
        "metrics": progress.metrics,
        "step_s": None if progress.step_s is None else round(progress.step_s, 4),
        "attempts": story.last_attempt,
        "attempt": job.attempt.number if job.attempt else 0,
        "incarnation": job.attempt.incarnation if job.attempt else None,
        "restarts": dict(story.restarts),
        "start_time": None if job.started is None else round(job.started, 3),
        "nodes": {node.name: _node(job, node, now) for node in job.members.nodes.values()},
        "seats": [{"seat": seat, "node": name} for seat, name in sorted(job.members.seats.items())],
        "workers": _workers(job),
        "ranks": {"ready": len(progress.ready), "done": len(progress.done), "world": _world(job)},
        "stragglers": sorted(progress.named),
        "snapshot": _snapshot(job, now),
        "snapshots": _totals(job),
        "checkpoint": _checkpoint(job, now),
        "checkpoints": _checkpoint_totals(job),
        "store_trouble": _store_trouble(job, now),
        "resizes": list(job.resizing.records),
        "goodput": story.ledger.to_json(now),
        "recoveries": [record.to_json() for record in story.records[-LAST_RECOVERIES:]],
        "failures": [symptom_json(symptom, job.epoch, now) for symptom in story.failures],
        "first_error": story.first_error(),
        "suspended": job.suspended,
        "suspending": job.suspension is not None,
        "weights_digest": job.weights_digest,
    }


def _shown(job: Job) -> str:
    if job.phase in (Phase.STARTING, Phase.STOPPING, Phase.WAITING) and job.story.records:
        return "Recovering"
    return SHOWN[job.phase]


def _node(job: Job, node: Node, now: float) -> dict[str, Any]:
    heard = job.members.watch.silence(node.name, job.awake.now)
    return {
        "node": node.name,
        "domain": node.domain,
        "host": node.host,
        "seat": node.seat,
        "state": node.state,
        "keeper": "up" if node.keeper_up else "down",
        "heartbeat_age_s": None if heard is None else round(heard, 3),
        "reason": node.gone,
        "gone_s": None if node.gone is None else round(now - node.gone_at, 1),
    }


def _world(job: Job) -> int:
    return job.world or job.config.replicas * job.config.procs


def _workers(job: Job) -> dict[str, Any]:
    """``ready``: living nodes; ``wanted`` and ``wanted_spares``: the size that shall be, since it was ``asked`` for or
    by the job; ``least``: the fewest that may train; ``size``: those with seats; ``would_leave``: who goes first when
    fewer are wanted."""
    members, config = job.members, job.config
    seats = {seat: name for seat, name in members.seats.items() if name in members.alive}
    free = [node.name for node in members.free()]
    return {
        "ready": len(members.alive),
        "wanted": config.replicas,
        "least": config.least,
        "size": job.size,
        "growing_to": job.resizing.target,
        "spares": len(free),
        "wanted_spares": config.spares,
        "asked": job.resizing.asked is not None,
        "leaving": len(members.leaving),
        "would_leave": leavers(seats, free, min(MOST_LEAVERS, max(0, len(free) + len(seats) - config.least))),
    }


def _checkpoint_totals(job: Job) -> dict[str, Any]:
    cycle = job.checkpoints
    if cycle is None:
        return {}
    totals = cycle.totals
    return {
        "count": totals.count,
        "skipped": totals.skipped,
        "failed": totals.failed,
        "bytes": totals.bytes,
        "last_step": totals.last_step,
        "url": cycle.config.url,
    }


def _checkpoint(job: Job, now: float) -> dict[str, Any] | None:
    """The newest one and what is under way; None without an object tier."""
    cycle, newest = job.checkpoints, job.claims.newest
    if cycle is None:
        return None
    totals, work, config = cycle.totals, cycle.work, cycle.config
    committed = None
    if newest is not None:
        age = None if totals.newest_at is None or totals.newest != newest.generation else now - totals.newest_at
        committed = {
            "generation": str(newest.generation),
            "step": newest.generation.step,
            "age_s": None if age is None else round(age, 3),
        }
    automatic = config.interval_steps is None and config.interval_s is None
    return {
        "committed": committed,
        **{key: committed[key] if committed else None for key in ("generation", "step", "age_s")},
        **_checkpoint_totals(job),
        "stage": cycle.stage.value,
        "under_way": str(work.generation) if work is not None else None,
        "claimed": job.claims.claimed is not None and job.claims.claimed == job.attempt,
        "last_error": totals.last_error,
        "interval": job.checkpoint_rhythm.to_json(now) if automatic else None,
    }


def _store_trouble(job: Job, now: float) -> dict[str, Any] | None:
    """What keeps the store from answering, and for how long; None while it is well."""
    news = job.store_news
    return {"text": news.trouble, "s": round(now - news.since, 1)} if news.trouble else None


def _totals(job: Job) -> dict[str, Any]:
    totals = job.totals
    return {"count": totals.count, "bytes": totals.bytes, "stall_s": round(totals.stall_s, 6)}


def _snapshot(job: Job, now: float) -> dict[str, Any]:
    totals, cycle = job.totals, job.cycle
    committed = None
    if totals.newest is not None and totals.newest_at is not None:
        age = round(now - totals.newest_at, 3)
        committed = {"generation": str(totals.newest), "step": totals.newest.step, "age_s": age}
    work = cycle.work if cycle is not None else None
    return {
        "committed": committed,
        **{key: committed[key] if committed else None for key in ("generation", "step", "age_s")},
        **_totals(job),
        "stage": cycle.stage.value if cycle is not None else None,
        "under_way": str(work.generation) if work else None,
        "held": cycle is not None and cycle.held is not None,
        "interval": job.snapshot_rhythm.to_json(now) if job.config.every_steps is None else None,
    }
