"""What becomes due with time, phase by phase. Every wait of the machine ends here, or in an event."""

from __future__ import annotations

import math
from collections.abc import Callable

from outlast.controller import durable, ending, holding, preparing, resizing, suspending
from outlast.controller.faults import Symptom
from outlast.controller.job import Job
from outlast.controller.phases import Phase
from outlast.messages.instructions import DumpStacks, Load, Stop

STRAGGLERS_EVERY_S = 5.0


def due(job: Job, now: float) -> None:
    """See to what has become due at ``now``."""
    limit = job.config.active_deadline_s
    if limit is not None and now - job.first_began > limit and job.outcome is None:
        job.finish("failed", f"the job has not ended within its activeDeadlineSeconds ({limit:.0f})", now)
    if job.members.leaving:
        resizing.release_done(job, now)
    suspending.drive(job, now)
    _DUE.get(job.phase, _nothing)(job, now)


def _nothing(job: Job, now: float) -> None:
    """Nothing is waited for."""


def _gathering(job: Job, now: float) -> None:
    waited = now - job.began
    if waited > job.config.start_timeout_s:
        here, wanted = len(job.members.alive), job.config.replicas
        _want_nodes(job, f"only {here} of {wanted} nodes joined within {waited:.0f} s (startTimeout)", now)


def _want_nodes(job: Job, text: str, now: float) -> None:
    """Nodes have been missing for startTimeout: the end, unless others judge that; then it is said now and then."""
    if not job.config.patient:
        job.finish("failed", text, now)
    elif now - job.wanting_told_at > job.config.start_timeout_s:
        job.wanting_told_at = now
        job.emit("still-waiting", text, nodes=len(job.members.alive), wanted=job.config.replicas)


def _stopping(job: Job, now: float) -> None:
    """Nodes that do not confirm are told again, and in the end given up."""
    preparation = job.preparation
    if preparation is not None and now >= preparation.again_at:
        preparation.again_at = now + preparing.STOP_AGAIN_S
        job.out += [Stop(name, preparation.attempt) for name in sorted(preparation.waiting)]
    late = preparation.waiting if preparation is not None and now > preparation.deadline else ()
    for name in sorted(late):
        node = job.members.alive.get(name)
        if node is not None:
            silent = now - job.entered
            job.lose(node, f"it has not confirmed the end of its ranks in {silent:.0f} s", silent, now)
    preparing.advance(job, now)


def _waiting(job: Job, now: float) -> None:
    """The end of a backoff; the end of the patience for missing nodes, and for the store."""
    preparation, limit = job.preparation, job.config.start_timeout_s
    if preparation is None:
        return
    since, deaf_since = preparation.short_since, preparation.lacking_since
    if deaf_since is not None and job.claims.unknown and now - deaf_since > limit:
        why = f"the object store did not answer within {limit:.0f} s (startTimeout), and nothing is left in memory"
        job.finish("failed", f"{why}: to begin anew would lose the job's checkpoints", now)
        return
    if since is not None and now - since > limit:
        here, wanted = job.members.usable, job.config.replicas
        why = f"only {here} of {wanted} nodes are left, and no other joined within {limit:.0f} s (startTimeout)"
        _want_nodes(job, f"{why}; {preparation.told}" if preparation.told else why, now)
    preparing.advance(job, now)


def _starting(job: Job, now: float) -> None:
    """Nodes that cannot rebuild, ranks that never become ready, scripts that do not use outlast."""
    progress, silence = job.progress, now - job.entered
    resizing.drive(job, now)
    if job.phase is not Phase.STARTING:
        return
    preparing.start_again(job, now)
    if job.awaiting:
        if silence > job.config.start_timeout_s:
            names = ", ".join(sorted(job.awaiting)[:8])
            _give_up_start(job, f"{names} did not finish restoring within {silence:.0f} s", now)
    elif progress.ready:
        _await_ready(job, now)
    elif job.resumes:  # its ranks use outlast, and may have much to read
        if silence > job.config.start_timeout_s:
            _give_up_start(job, f"no rank has loaded its state within {silence:.0f} s", now)
    elif silence > job.config.patience.silent_s:
        text = "no rank uses outlast so far: the script is restarted when it fails, and not restored"
        job.emit("unprotected", text)
        job.run(now)


def _await_ready(job: Job, now: float) -> None:
    """Some ranks have their state: the others have startTimeout for it; scripts may come to it late that have none."""
    waited = now - (job.entered if job.resumes else max(job.entered, job.progress.ready_at))
    if waited > job.config.start_timeout_s:
        missing = sorted(set(range(job.world)) - job.progress.ready)[:8]
        _give_up_start(job, f"ranks {missing} did not become ready within {waited:.0f} s", now)


def _give_up_start(job: Job, text: str, now: float) -> None:
    step = job.progress.restored_step
    job.fault(Symptom("start-timeout", text, now, job.entered, step=step, signature="start-timeout"), now)


def _running(job: Job, now: float) -> None:
    """Changes of size, snapshots, checkpoints, the end; hangs and stragglers."""
    progress = job.progress
    if now >= job.load_again_at:
        _load_again(job, now)
    for step in (resizing.drive, holding.drive, _snapshot, durable.drive, ending.look, _judge_progress):
        if job.phase is Phase.RUNNING:
            step(job, now)
    if now >= job.look_for_stragglers_at:
        job.look_for_stragglers_at = now + STRAGGLERS_EVERY_S
        for rank, times in progress.stragglers().items():
            text = f"rank {rank} takes {times:.1f} times as long for its own part of a step as the median rank"
            job.emit("straggler", text, rank=rank, times=round(times, 2))


def _load_again(job: Job, now: float) -> None:
    """Ranks of an adopted attempt may wait for a word of the controller before, or for images that it had planned."""
    job.load_again_at = math.inf
    if job.all_ready or job.attempt is None or now - job.entered > job.config.start_timeout_s:
        return
    if job.half_restored and not job.progress.stepped and not job.progress.done:
        job.emit("not-restored", f"attempt {job.attempt.number} was still restoring: its restore is planned anew")
        job.begin_attempt(now)
        return
    if job.awaiting:  # the store is being read: ranks read from each other's nodes too
        job.load_again_at = now + 1.0
        return
    job.load_again_at = now + preparing.START_AGAIN_S
    job.out.append(Load(job.members.seated_names(), job.attempt))


def _snapshot(job: Job, now: float) -> None:
    if job.cycle is not None and job.all_ready:
        job.out += job.cycle.tick(job.progress, now)


def _judge_progress(job: Job, now: float) -> None:
    """Ranks that do not move hang, unless they wait for a word of the controller's."""
    progress, cycle = job.progress, job.cycle
    if job.ended_at is not None:
        return
    if cycle is not None and cycle.holding:
        progress.moved_at = now
    elif (progress.ready or job.resumes) and not job.all_ready and not progress.done:  # adopted while they restore
        progress.moved_at = now
        _await_ready(job, now)
    elif now > progress.hang_deadline(job.config.hang_timeout_s):
        if not _waits_at_end(job, now):
            _suspect_hang(job, now)
    elif progress.ready and not progress.stepped and not progress.busy and not progress.done:
        waited = now - progress.moved_at
        if waited > job.config.start_timeout_s and not _waits_at_end(job, now):
            _give_up_start(job, f"no rank has done its first step within {waited:.0f} s", now)


def _waits_at_end(job: Job, now: float) -> bool:
    """Whether all ranks wait for the snapshot of the last step, and not for too long."""
    if job.config.checkpoint is None or job.final is not None or not job.progress.at_end(job.world):
        return False
    return now - job.progress.moved_at <= job.config.patience.final_s


def _suspect_hang(job: Job, now: float) -> None:
    progress = job.progress
    waited, rank = now - progress.moved_at, progress.furthest_behind()
    node = None if rank is None else job.members.seats.get(rank // job.config.procs)
    behind = "" if rank is None else f"; rank {rank} is behind the others"
    text = f"no rank has made progress for {waited:.1f} s after step {progress.top_step}{behind}"
    symptom = Symptom("hang", text, now, progress.moved_at, node, rank, progress.top_step)
    names = job.members.seated_names()
    job.stacks_awaited = {name for name in names if name in job.members.alive}
    job.out += [DumpStacks(name, text) for name in names]
    job.fault(symptom, now)


def _diagnosing(job: Job, now: float) -> None:
    if now >= job.decide_at:
        job.begin_attempt(now)


def _finishing(job: Job, now: float) -> None:
    if now >= job.decide_at:
        job.finalize(now)


_DUE: dict[Phase, Callable[[Job, float], None]] = {
    Phase.GATHERING: _gathering,
    Phase.STOPPING: _stopping,
    Phase.WAITING: _waiting,
    Phase.STARTING: _starting,
    Phase.RUNNING: _running,
    Phase.DIAGNOSING: _diagnosing,
    Phase.FINISHING: _finishing,
}
