"""What a TrainingJob asks of the controller's machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from outlast.api import TrainingJob
from outlast.controller.settings import MachineConfig
from outlast.errors import SpecError
from outlast.resource import explain


def settings_of(job: Mapping[str, Any]) -> MachineConfig:
    """The machine's settings for a TrainingJob given as JSON. Raises SpecError when it is none."""
    try:
        spec = TrainingJob.model_validate(job).spec
    except ValidationError as error:
        raise SpecError(explain(error, TrainingJob)) from error
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
    )
