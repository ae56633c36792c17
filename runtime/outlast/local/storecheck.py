"""What the job's store holds already, asked before anything is started: is it to be gone on from, and whose is it?"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import closing

from outlast.api import TrainingJob
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import Head, job_url, parse_reference
from outlast.checkpoint.store import StoreOptions, open_store
from outlast.errors import CheckpointError, RequestError

PATIENCE_S = 20.0
"""How long a store that does not answer is asked again."""


def identity_of(job: TrainingJob, resume: bool, say: Callable[[str], None]) -> str:
    """The mark that this run's controllers put on the job's checkpoints.

    The object's own where Kubernetes gave it one; going on, that of the checkpoints; else one that is new. Raises
    RequestError when a run of the job has left checkpoints there, or may be about to, and ``resume`` was not asked for,
    or ones whose head was lost, and what the store raises.
    """
    local = not job.metadata.uid
    own = job.metadata.uid or secrets.token_hex(16)
    if job.spec.checkpoint is None:
        return own
    resume = resume or job.spec.checkpoint.resume
    url = job_url(job.spec.checkpoint.url, job.metadata.namespace, job.metadata.name)
    with closing(open_store(url, StoreOptions(patience_s=PATIENCE_S))) as store:
        archive = Archive(store)
        head = archive.read_head()
        if head is None:
            archive.check_lost()
    if not resume and head is not None and not head.empty:
        raise RequestError(
            f"{url} holds checkpoints of this job already, {_what(head)}: go on from them with --resume, or give the "
            "job another name or spec.checkpoint.url"
        )
    if not resume and head is not None and not head.vacant and local:
        raise RequestError(
            f"{url} belongs to a run of this job that has made no checkpoint, and that would be stopped if it has not "
            "ended: if it has, begin in its place with --resume, or give the job another name or spec.checkpoint.url"
        )
    if job.spec.checkpoint.restore_from is not None and not (head is not None and head.line) and local:
        _check_restorable(job.spec.checkpoint.restore_from)
    if resume:
        there = head is not None and head.line
        say(
            f"going on from {_what(head)} at {url}"
            if head and there
            else f"nothing is stored at {url}: starting afresh"
        )
    return head.job.identity if head is not None and not head.vacant and local else own


def _check_restorable(reference: str) -> None:
    """Raises RequestError when there is no such checkpoint, and what the store raises."""
    url, step = parse_reference(reference)
    with closing(open_store(url, StoreOptions(patience_s=PATIENCE_S))) as store:
        try:
            Archive(store).find(step)
        except (RequestError, CheckpointError) as error:
            raise RequestError(f"spec.checkpoint.restoreFrom {reference}: {error}") from error


def _what(head: Head) -> str:
    return f"the newest of step {head.line[-1].step}" if head.line else f"{len(head.quarantined)} in quarantine"
