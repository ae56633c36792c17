"""When a job's status is written, and what of it: the difference alone, once a pass, at once only when it matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outlast.jobstatus import TrainingJobStatus
from outlast_operator.model import Object


def as_json(status: TrainingJobStatus) -> dict[str, Any]:
    """The status as the API server keeps it."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch (RFC 7396) that makes ``new`` of ``old``; empty when they are equal."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        known = old.get(name)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            inner = difference(known, value)
            if inner:
                patch[name] = inner
        elif name not in old or known != value:
            patch[name] = value
    return patch


def patch_of(raw: Object, status: TrainingJobStatus) -> dict[str, Any] | None:
    """The merge patch for ``raw``, which holds for exactly its version; None when nothing differs."""
    changes = difference(raw.get("status") or {}, as_json(status))
    if not changes:
        return None
    return {"metadata": {"resourceVersion": raw["metadata"]["resourceVersion"]}, "status": changes}


@dataclass
class Pace:
    """When a job's status was written last (monotonic seconds), so that mere progress waits."""

    every_s: float
    last: float

    def wait_s(self, urgent: bool, now: float) -> float:
        """How long the write has to wait; 0: not at all."""
        return 0.0 if urgent else max(0.0, self.last + self.every_s - now)
