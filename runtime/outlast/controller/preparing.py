"""From the end of one attempt to the start of the next: what is waited for, with how many nodes it begins, the launch.

::

    all nodes have stopped -> the cause is named -> the store is claimed (or does not answer) -> there are enough nodes,
    with enough memory, and no backoff passes -> seats, plan, Start
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlast.controller import keeping
from outlast.controller.faults import first_cause
from outlast.controller.phases import PREPARING, Phase
from outlast.controller.progress import Progress
from outlast.controller.recovery import Launch, Preparation, plan_launch, room, start_instructions
from outlast.controller.snapshots import SnapshotCycle
from outlast.messages.instructions import Load

if TYPE_CHECKING:
    from outlast.controller.job import Job

STOP_AGAIN_S = 15.0
"""Nodes that have not answered by then are told again to stop."""
START_AGAIN_S = 30.0
"""Nodes that have not begun by then are told again: a call to an agent may fail while the agent lives on."""


def advance(job: Job, now: float) -> None:
    """Take the next step of the preparation, if there is one and nothing keeps it waiting."""
    preparation = job.preparation
    if job.phase not in PREPARING or preparation is None or preparation.waiting:
        return
    if not preparation.concluded and not _conclude(job, preparation, now):
        return
    if job.claims.pending(now):
        return
    size = _size(job, preparation, now)
    _note_shortage(job, preparation, size, now)
    if size is None or now < preparation.not_before or _looked_in_vain(job, preparation):
        _wait(job, now)
        return
    launch = _plan(job, preparation, size, now)
    if launch is not None:
        _launch(job, launch, now)
    elif job.phase in PREPARING:
        _wait(job, now)


def _wait(job: Job, now: float) -> None:
    if job.phase is not Phase.WAITING:
        job.story.ledger.enter("idle", now)
    job.enter(Phase.WAITING, now)


def _conclude(job: Job, preparation: Preparation, now: float) -> bool:
    """Name the first cause and ask the budget; False when the job fails by it."""
    cause = first_cause(job.symptoms)
    job.out.append(job.story.concluded(cause, job.symptoms, now))
    preparation.concluded = True
    job.symptoms = []
    crash = (cause.step or 0, cause.signature) if cause.signature is not None else None
    verdict = job.budget.restart(now, job.story.best_step > job.best_at_start, crash)
    if verdict.reason is not None:
        job.finish("failed", f"{cause.text}; {verdict.reason}", now)
        return False
    job.restart_count += 1
    keeping.keep(job)
    preparation.not_before = now + verdict.delay_s
    if verdict.delay_s > 0:
        job.emit("backoff", f"restarting after {verdict.delay_s:.0f} s", seconds=verdict.delay_s)
    return True


# --- how many nodes -------------------------------------------------------------------------------------------------


def _size(job: Job, preparation: Preparation, now: float) -> int | None:
    """With how many nodes to begin now; None: wait for more."""
    config, usable = job.config, job.members.usable
    if usable >= config.replicas:
        return config.replicas
    if preparation.size is not None and usable >= preparation.size:
        return usable
    waited = 0.0 if preparation.short_since is None else now - preparation.short_since
    patient = config.min_replicas is None or usable < config.min_replicas or waited < config.shrink_after_s
    return None if patient else usable


def _note_shortage(job: Job, preparation: Preparation, size: int | None, now: float) -> None:
    config, here = job.config, job.members.usable
    if size is not None:
        if here >= config.replicas:
            preparation.short_since = None
        return
    if preparation.short_since is not None:
        return
    preparation.short_since = now
    limit, then = config.start_timeout_s, ""
    if config.min_replicas is not None and here >= config.min_replicas:
        limit, then = config.shrink_after_s, ", then going on with fewer"
    text = f"{here} of {config.replicas} nodes are here; waiting {limit:.0f} s for more{then}"
    job.emit("waiting", text, nodes=here)


# --- the plan -------------------------------------------------------------------------------------------------------


def _looked_in_vain(job: Job, preparation: Preparation) -> bool:
    """Whether nothing has changed since a plan was found to be none."""
    return preparation.looked == _seen(job)


def _seen(job: Job) -> tuple[object, ...]:
    """What a plan depends on that may change."""
    claims = job.claims
    return job.members.usable, claims.claimed, claims.denied, claims.unknown


def _plan(job: Job, preparation: Preparation, size: int, now: float) -> Launch | None:
    """How to begin with ``size`` nodes; None when they lack memory, or the store must be heard first."""
    attempt, claims = job.attempt, job.claims
    if attempt is None:
        return None
    launch = plan_launch(job.config, job.members, attempt, size, claims.stored or (), claims.excluded)
    if launch.plan is None and claims.unknown:
        _lack_store(job, preparation, launch, now)
    elif size < job.config.replicas and size != job.size and not _has_room(job, preparation, launch):
        preparation.short_since = now if preparation.short_since is None else preparation.short_since
    else:
        return launch
    preparation.looked = _seen(job)
    return None


def _lack_store(job: Job, preparation: Preparation, launch: Launch, now: float) -> None:
    """To begin at step 0 while nobody knows what the store holds would be to lose it. One that denies is not waited
    for."""
    if job.claims.denied:
        job.finish("failed", f"the job's checkpoints cannot be used: {job.claims.denied}", now)
        return
    if preparation.lacking_since is None:
        preparation.lacking_since = now
        for reason in launch.reasons:
            job.emit("passed-over", f"cannot be rebuilt: {reason}")
        limit = job.config.start_timeout_s
        text = f"nothing in memory to go on from, and the store does not answer; waiting {limit:.0f} s for it"
        job.emit("waiting-for-store", text)


def _has_room(job: Job, preparation: Preparation, launch: Launch) -> bool:
    lengths = {restore.rank: restore.length for restore in launch.plan.ranks} if launch.plan is not None else {}
    fit = room(job.config, job.members, list(launch.seats.values()), lengths)
    if fit:
        return True
    text = f"{len(launch.seats)} nodes are too small: {fit}; waiting for more"
    if text != preparation.told:
        preparation.told = text
        job.emit("no-room", text, missing=dict(fit.missing), need=fit.need)
    return False


# --- the start ------------------------------------------------------------------------------------------------------


def _launch(job: Job, launch: Launch, now: float) -> None:
    """Give the seats and start the ranks."""
    before, members = job.size, job.members
    job.preparation = None
    members.seat_all(launch.seats)
    job.progress = Progress(now, launch.step)
    job.best_at_start = job.story.best_step
    job.cycle = SnapshotCycle(job.around, launch.attempt, launch.groups, launch.restored)
    job.awaiting = set(launch.seats.values())
    job.resumes = launch.plan is not None
    if launch.plan is not None:
        job.lengths = {restore.rank: restore.length for restore in launch.plan.ranks}
    if job.started is None:
        job.started = now + job.epoch
    keeping.keep(job)
    job.origin = launch.origin(job.claims.stored or ())
    job.enter(Phase.STARTING, now)
    if job.story.open is not None and (job.origin is not None or not job.resumes):
        job.checkpoint_rhythm.failed(now)
    _tell_restore(job, launch)
    size, wanted, number = len(launch.seats), job.config.replicas, launch.attempt.number
    job.out += job.resizing.launched(before, size, wanted, number, launch.step, now)
    job.story.launched(launch, job.world, now)
    starts = start_instructions(launch, members, job.config.procs, job.restart_count)
    job.starts, job.start_again_at = {start.node: start for start in starts}, now + START_AGAIN_S
    job.out += starts


def start_again(job: Job, now: float) -> None:
    """Say again what has ranks start to whoever may not have heard it."""
    if now < job.start_again_at or job.attempt is None:
        return
    job.start_again_at = now + START_AGAIN_S
    if job.awaiting:
        deaf = [name for name in sorted(job.awaiting) if job.members.nodes[name].attempt != job.attempt]
        job.out += [job.starts[name] for name in deaf if name in job.starts]
    else:
        job.out.append(Load(job.members.seated_names(), job.attempt))


def _tell_restore(job: Job, launch: Launch) -> None:
    sources, number = launch.sources(job.world), launch.attempt.number
    for reason in launch.reasons:
        job.emit("passed-over", f"cannot be rebuilt: {reason}")
    fields: dict[str, Any] = {"attempt": number, "step": launch.step, "restore_sources": sources}
    fields |= {"seats": list(launch.seats.values())[:64], "nodes": len(launch.seats)}
    if launch.plan is not None:
        origin = ", ".join(f"{count} {source}" for source, count in sorted(sources.items()))
        other = ", written by another world" if launch.plan.direct and len(launch.plan.ranks) != job.world else ""
        text = f"attempt {number} resumes with step {launch.step} ({origin}{other})"
        job.emit("restored", text, generation=str(launch.plan.generation), direct=launch.plan.direct, **fields)
    elif launch.reasons or job.story.best_step or job.restart_count:
        why = "no snapshot can be rebuilt" if launch.reasons else "no snapshot was held"
        job.emit("restored-none", f"attempt {number} restarts from step 0: {why}", restored="none", **fields)
    else:
        job.emit("fresh", f"attempt {number} begins at step 0", **fields)
