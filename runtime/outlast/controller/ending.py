"""The end of a job: ranks that are done, the snapshot of the last step, and its way to the store.

::

    with an object tier: all ranks wait after the last step -> a snapshot of it is committed -> Proceed -> ranks write
    the weights and end -> the snapshot is in the store -> succeeded
    without one: the last rank's end is the job's
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlast.controller import holding, resizing
from outlast.controller.faults import Symptom
from outlast.messages.instructions import Proceed
from outlast.snapshot.identity import Generation

if TYPE_CHECKING:
    from outlast.controller.job import Job


def committed(job: Job, now: float) -> None:
    """A snapshot was committed: the last one lets the ranks end, another at which they wait has its purpose."""
    newest, attempt = job.cycle.newest if job.cycle is not None else None, job.attempt
    if newest is None or attempt is None:
        return
    job.lengths = newest.lengths
    total = job.progress.total
    last = total is not None and newest.generation.step >= total and newest.generation.taken_by(attempt)
    if last and job.config.checkpoint is not None and job.final is None:
        _last_committed(job, newest.generation, now)
    else:
        holding.settle(job, now)
    resizing.release_done(job, now)


def _last_committed(job: Job, generation: Generation, now: float) -> None:
    cycle = job.cycle
    if cycle is None:
        return
    job.final, cycle.pace.ended = generation, True
    job.progress.moved_at = now
    if cycle.held is not None:
        job.story.held(now - cycle.held_since, now)
    step = generation.step
    job.emit("last-step", f"step {step}, the last, is committed; the ranks write the weights", step=step)
    job.out += cycle.proceed() or [Proceed(job.members.seated_names(), generation)]


def rank_done(job: Job, rank: int, digest: str, steps: int, now: float) -> None:
    """A rank has done all its steps; no snapshot is of use any more, and the last rank ends the training."""
    _know_final(job, steps)
    first = not job.progress.done
    job.progress.done[rank] = digest
    job.progress.moved_at = now
    job.note_step(steps, now)
    if digest and (rank == 0 or job.weights_digest is None):
        job.weights_digest = digest
    if job.cycle is not None:
        job.out += job.cycle.close()
        if first and job.config.checkpoint is not None and job.attempt is not None:
            # Others may still wait there for a snapshot that is none now, or for a word that went lost.
            job.out.append(Proceed(job.members.seated_names(), Generation.of(job.attempt, steps)))
    if len(job.progress.done) == job.world:
        job.ended_at = now
        if job.config.checkpoint is not None and job.final is None and not job.claims.holds_step(steps):
            last = "there is no checkpoint" if job.claims.newest is None else "the last checkpoint is an older one"
            text = f"the ranks ended after step {steps} without a snapshot of it: {last}"
            job.emit("no-final-checkpoint", text, step=steps)
        look(job, now)


def _know_final(job: Job, steps: int) -> None:
    """Ranks that outlived a controller ended after a snapshot of the last step, which may still be uploaded."""
    inherited, stored = job.inherited, job.config.checkpoint is not None
    if stored and job.final is None and inherited is not None and inherited.generation.step == steps:
        job.final = inherited.generation
        if job.cycle is not None:
            job.cycle.newest = inherited


def look(job: Job, now: float) -> None:
    """End the job once all ranks are done and the last step is in the store, or has not come there for too long."""
    if job.ended_at is None or job.outcome is not None:
        return
    if not job.final_pending:
        job.finish("succeeded", f"all {job.world} ranks have done all their steps", now)
        return
    cycle = job.checkpoints
    if cycle is not None and job.final is not None and cycle.damaged(job.final):
        text = f"an image of step {job.final.step}, the last, was found damaged before it was in the store"
        job.fault(Symptom("image-damaged", text, now, now, step=job.final.step), now)
    elif now > job.store_waits_until(job.ended_at, job.config.patience.final_s):
        why = f" ({cycle.totals.last_error})" if cycle is not None and cycle.totals.last_error else ""
        text = f"the last step could not be brought into the store within {now - job.ended_at:.0f} s{why}"
        job.finish("failed", f"{text}; the weights are in the run's final folder", now)
