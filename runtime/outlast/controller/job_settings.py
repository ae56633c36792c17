"""What a TrainingJob asks of the controller's machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from outlast.api import Metadata, TrainingJob, TrainingJobSpec
from outlast.checkpoint.manifest import job_url
from outlast.controller.settings import CheckpointConfig, MachineConfig
from outlast.errors import SpecError
from outlast.resource import explain


def settings_of(job: Mapping[str, Any], *, patient: bool = False) -> MachineConfig:
    """The machine's settings for a TrainingJob given as JSON. ``patient``: want of nodes is for others to judge.

    Raises SpecError when it is none.
    """
    try:
        parsed = TrainingJob.model_validate(job)
    except ValidationError as error:
        raise SpecError(explain(error, TrainingJob)) from error
    spec = parsed.spec
    every, hang = spec.snapshot.every_steps, spec.recovery.hang_timeout
    return MachineConfig(
        replicas=spec.workers.replicas,
        spares=spec.workers.spares,
        procs=spec.workers.procs_per_worker,
        every_steps=None if every == "auto" else every,
        group_size=spec.snapshot.erasure.group_size,
        parity=spec.snapshot.erasure.parity,
        max_restarts=spec.recovery.max_restarts,
        window_s=spec.recovery.window,
        hang_timeout_s=None if hang == "auto" else hang,
        start_timeout_s=spec.recovery.start_timeout,
        active_deadline_s=spec.active_deadline_seconds,
        min_replicas=spec.workers.min_replicas,
        shrink_after_s=spec.recovery.shrink_after,
        grow_after_s=spec.recovery.grow_after,
        checkpoint=_checkpoint(parsed.metadata, spec),
        fingerprint=_fingerprint(spec),
        patient=patient,
        faults=spec.faults.allow,
    )


def _checkpoint(metadata: Metadata, spec: TrainingJobSpec) -> CheckpointConfig | None:
    wanted = spec.checkpoint
    if wanted is None:
        return None
    return CheckpointConfig(
        url=job_url(wanted.url, metadata.namespace, metadata.name),
        interval_steps=wanted.interval if isinstance(wanted.interval, int) else None,
        interval_s=wanted.interval if isinstance(wanted.interval, float) else None,
        bandwidth=wanted.bandwidth,
        restore_from=wanted.restore_from,
    )


def _fingerprint(spec: TrainingJobSpec) -> str:
    """Of what decides, besides the script and the world, what a job computes: the command and its environment."""
    parts = spec.model_dump(mode="json", include={"entrypoint", "env"})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
