"""What a controller leaves to the one after it in the same folder, and what that one makes of it. Pure.

The machine's seconds are monotonic; ``job.epoch`` added to them gives wall seconds, which mean something to others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from outlast.messages.instructions import Remember
from outlast.messages.kept import Kept

if TYPE_CHECKING:
    from outlast.controller.job import Job


def take_over(job: Job, kept: Kept) -> None:
    """Go on counting where the controller before ended."""
    epoch = job.epoch
    if kept.began is not None:
        job.first_began = min(job.first_began, kept.began - epoch)
    job.started = kept.started
    job.budget.recall([at - epoch for at in kept.restarts], {(step, text): n for step, text, n in kept.errors})
    if kept.size is not None:
        size = kept.size
        job.config = replace(job.config, replicas=size.replicas, min_replicas=size.min_replicas, spares=size.spares)
    job.resizing.asked, job.resizing.shedding = kept.size, kept.shedding
    job.kept = kept


def keep(job: Job) -> None:
    """Have what has changed since written down."""
    budget, resizing, epoch = job.budget, job.resizing, job.epoch
    kept = Kept(
        began=job.first_began + epoch,
        started=job.started,
        restarts=tuple(at + epoch for at in budget.times),
        errors=tuple((step, text, count) for (step, text), count in budget.errors.items()),
        size=resizing.asked,
        shedding=resizing.shedding,
    )
    if kept != job.kept:
        job.kept = kept
        job.out.append(Remember(kept))
