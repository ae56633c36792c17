"""The end of a job that is to be taken up again: its last state goes to the store first. Pure.

::

    asked -> ranks held at a snapshot -> its checkpoint -> suspended
          -> nothing trains, nor will at once -> suspended, with the newest checkpoint there is
          -> the store does not answer in time, or there is none -> suspended, and what is lost is said

The store has ``patience_s`` to answer, again from each of its answers and from its first complaint; an upload that goes
on without complaint may take as long as that of a job's last step. While ranks are started again the time does not run,
for ``startTimeout`` at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlast.controller.phases import Phase
from outlast.messages.events import SuspendRequested

if TYPE_CHECKING:
    from outlast.controller.job import Job

JOINING_S = 5.0
"""Nodes whose ranks outlived a controller have joined the next one by then; where they have to find it, and to join
another Ray (a ``patient`` controller's), they have its patience."""
STEPS = 6
"""A snapshot is taken within so many steps, where these are longer than one's patience; two rounds of them later where
gradients are summed over some."""


@dataclass
class Suspension:
    """``until``: when the waiting ends, unless the store has it go on; ``holding``: that ranks wait was noted."""

    asked_at: float
    patience_s: float
    reason: str
    until: float
    holding: bool = False


def ask(job: Job, asked: SuspendRequested, now: float) -> None:
    """End the job as soon as its state is safe."""
    if job.outcome is not None or job.suspension is not None:
        return
    wait_s = max(asked.patience_s, STEPS * (job.progress.step_s or 0.0))
    job.suspension = Suspension(now, asked.patience_s, asked.reason, now + wait_s)
    why = f" ({asked.reason})" if asked.reason else ""
    job.emit("suspending", f"the job is suspended{why}", patience_s=asked.patience_s, reason=asked.reason)
    drive(job, now)


def drive(job: Job, now: float) -> None:
    """End a job that is being suspended once all is safe, or no more can be saved."""
    suspension = job.suspension
    if suspension is None or job.outcome is not None:
        return
    held = job.cycle.held if job.cycle is not None else None
    if held is not None and not suspension.holding:
        suspension.holding, suspension.until = True, now + suspension.patience_s
    elif not suspension.holding and job.cycle is not None:
        steps = STEPS + 2 * (job.cycle.pace.period - 1)
        suspension.until = max(suspension.until, suspension.asked_at + steps * (job.progress.step_s or 0.0))
    if not suspension.holding and job.phase is not Phase.RUNNING:
        recovering = min(now, suspension.asked_at + job.config.start_timeout_s)
        suspension.until = max(suspension.until, recovering + suspension.patience_s)
    newest = job.claims.newest
    if held is not None and newest is not None and newest.generation == held:
        _end(job, "", now)
    elif job.config.checkpoint is None:
        _end(job, "the job has no object tier", now)
    elif _idle(job, suspension, now):
        _end(job, "training was not under way", now)
    elif now >= _limit(job, suspension):
        trouble = f" ({job.store_news.trouble})" if job.store_news.trouble else ""
        _end(job, f"no checkpoint within {now - suspension.asked_at:.0f} s{trouble}", now)


def _limit(job: Job, suspension: Suspension) -> float:
    at_end = job.final is not None
    patience_s = max(suspension.patience_s, job.config.patience.final_s) if at_end else suspension.patience_s
    return max(suspension.until, job.store_waits_until(suspension.asked_at, patience_s))


def _idle(job: Job, suspension: Suspension, now: float) -> bool:
    """Whether nothing trains, nor is about to."""
    if job.phase is Phase.GATHERING:
        known = any(node.held for node in job.members.alive.values())
        joining_s = max(JOINING_S, suspension.patience_s) if job.config.patient else JOINING_S
        return not known and now - job.began >= joining_s
    preparation = job.preparation
    short = preparation is not None and (preparation.short_since, preparation.lacking_since) != (None, None)
    return job.phase is Phase.WAITING and short


def _end(job: Job, why: str, now: float) -> None:
    suspension, cycle, newest = job.suspension, job.cycle, job.claims.newest
    if suspension is None:
        return
    if cycle is not None and cycle.held is not None:
        job.story.held(now - cycle.held_since, now)
    step = cycle.held.step if cycle is not None and cycle.held is not None else job.progress.top_step
    saved = newest.generation.step if newest is not None else None
    job.suspended = {"step": step, "checkpoint_step": saved, "reason": suspension.reason}
    job.finish("suspended", _told(step, saved, why), now)


def _told(step: int, saved: int | None, why: str) -> str:
    if not why:
        return f"suspended at step {step}, which is in the store"
    if saved is None:
        return f"suspended at step {step}; no checkpoint is known of, so all of it may be lost: {why}"
    lost = f"the {step - saved} steps after it are lost" if step > saved else "no step is lost"
    return f"suspended with the checkpoint of step {saved}; {lost}: {why}"
