"""A job and its object tier: the claim's answers, checkpoints on their way, and what cannot be restored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlast.controller import ending, preparing
from outlast.controller.checkpoints import MUST_ACT
from outlast.controller.faults import Symptom
from outlast.controller.phases import PREPARING
from outlast.messages import events as e
from outlast.messages.instructions import Quarantine

if TYPE_CHECKING:
    from outlast.controller.job import Job


def drive(job: Job, now: float) -> None:
    """While the job runs: begin checkpoints when they are due, the last one at once."""
    cycle, snapshots, claims = job.checkpoints, job.cycle, job.claims
    if cycle is None or snapshots is None or not (job.all_ready or job.final is not None):
        return
    if job.final is not None and not job.final_pending:
        return
    urgent = job.final is not None or (job.suspension is not None and snapshots.held is not None)
    nodes = job.members.seated_names() if claims.claimed == job.attempt else ()
    cycle.about = {**job.about, "spec": job.config.fingerprint}
    job.out += cycle.tick(snapshots.newest, claims.newest, nodes, now, urgent=urgent)


# --- the claim ------------------------------------------------------------------------------------------------------


def claim_again(job: Job, now: float) -> None:
    """A new controller has taken over a running attempt."""
    if job.attempt is not None:
        job.out += job.claims.ask(job.attempt, now, 0.0)


def claimed(job: Job, event: e.Claimed, now: float) -> None:
    """The job's checkpoints are ours, and known."""
    claims, attempt = job.claims, job.attempt
    if not claims.current(event) or attempt is None:
        return
    claims.take(event)
    job.store_news.hear(now, "")
    steps = [known.generation.step for known in event.stored]
    there = f"checkpoints of steps {', '.join(map(str, steps))} are there" if steps else "no checkpoint is there yet"
    job.emit("claimed", f"the store is claimed; {there}", attempt=attempt.number)
    if event.unseen:
        job.emit("restore-from-unseen", f"it is not known what there is to begin with: {event.unseen}")
    own = [known.generation.attempt for known in event.stored if not known.foreign]
    members, preparation = job.members, job.preparation
    members.best_seen_attempt = max([members.best_seen_attempt, *own])
    if job.phase in PREPARING and preparation is not None and members.best_seen_attempt >= attempt.number:
        job.prepare_anew(preparation, now)
        return
    preparing.advance(job, now)
    ending.look(job, now)


def claim_failed(job: Job, event: e.ClaimFailed, now: float) -> None:
    """They are not, for now or for good. What is in memory can be gone on from all the same."""
    if not job.claims.current(event):
        return
    if event.trouble == "lost":
        _taken_over(job, event.reason, now)
        return
    denied = event.trouble == "denied"
    what = "the job's checkpoints cannot be used" if denied else "the store does not answer"
    until = "that is mended (it does not pass by itself: a person must act)" if denied else "it does"
    text = f"{what}: {event.reason}; there are no checkpoints until {until}"
    job.emit("claim-failed", text, reason=event.reason, trouble=event.trouble)
    job.store_news.hear(now, text)
    job.claims.fail(event.reason if denied else "")
    preparing.advance(job, now)


def _taken_over(job: Job, reason: str, now: float) -> None:
    job.finish("failed", f"another controller has taken over this job's checkpoints: {reason}", now)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def upload_failed(job: Job, event: e.UploadFailed, now: float) -> None:
    """A node could not upload. One whose keeper is down is told again when it is back."""
    if event.trouble == "lost":
        _taken_over(job, event.reason, now)
    elif event.trouble == "unavailable" and not job.members.nodes[event.node].keeper_up:
        return
    elif job.checkpoints is not None:
        if event.trouble != "bad" and job.checkpoints.awaits(event.node, event.generation):
            job.store_news.hear(now, event.reason)
        job.out += job.checkpoints.upload_failed(event, now)
        ending.look(job, now)


def committed(job: Job, event: e.CheckpointCommitted, now: float) -> None:
    """A checkpoint is complete."""
    if job.checkpoints is None:
        return
    began = job.checkpoints.work.began if job.checkpoints.work is not None else now
    job.claims.add(event.checkpoint)
    job.store_news.hear(now, "")
    job.out += job.checkpoints.committed(event.checkpoint, now)
    job.checkpoint_rhythm.safe(0.0, now - began, job.progress.step_s)
    ending.look(job, now)


def expired(job: Job, event: e.CheckpointsExpired) -> None:
    """Retention has removed some."""
    job.claims.forget(event.generations)


def commit_failed(job: Job, event: e.CheckpointFailed, now: float) -> None:
    """A checkpoint is none."""
    if event.trouble == "lost":
        _taken_over(job, event.reason, now)
    elif job.checkpoints is not None:
        job.out += job.checkpoints.commit_failed(event, now)
        if event.trouble != "bad":
            job.store_news.hear(now, event.reason)


# --- restoring ------------------------------------------------------------------------------------------------------


def restore_failed(job: Job, event: e.RestoreFailed, now: float) -> None:
    """What the attempt was to begin with cannot be had: with another state, later, or never."""
    generation = event.generation
    where = event.node if event.rank is None else f"rank {event.rank} on {event.node}"
    text = f"{where} could not restore step {generation.step}: {event.reason}"
    if event.trouble == "lost":
        _taken_over(job, event.reason, now)
        return
    if event.trouble == "denied":
        job.finish("failed", f"{text} {MUST_ACT}", now)
        return
    if event.trouble == "bad" and event.memory:
        used = "not used again" if job.members.doubt(generation, event.attempt) else "read anew"
        job.emit("image-damaged", f"what nodes hold of step {generation.step} is {used}", node=event.node)
    elif event.trouble == "bad" and job.claims.exclude(generation) is not None:
        job.out.append(Quarantine(generation, event.reason))
    job.fault(Symptom("restore-failed", text, now, now, event.node, event.rank, generation.step), now)


def hear_about(job: Job, event: e.RankReady) -> None:
    """Rank 0 tells what it is: say when what is restored was written by something else."""
    if event.rank != 0:
        return
    job.about, origin = event.about, job.origin
    here = {**event.about, "spec": job.config.fingerprint}
    there = origin.about if origin is not None else {}
    names = {"script": "the script", "spec": "the job's specification"}
    changed = [name for name in names if there.get(name) and here.get(name) and there[name] != here[name]]
    if origin is not None and changed:
        what = " and ".join(names[name] for name in changed)
        text = f"{what} changed since the checkpoint of step {origin.generation.step} was written"
        job.emit("fingerprint-changed", text, changed=changed, generation=str(origin.generation))
