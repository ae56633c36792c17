"""What a person wants to read in `kubectl describe`, found by comparing two statuses: each is told once. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from outlast.jobstatus import Condition, TrainingJobStatus
from outlast_operator.heard import Heard
from outlast_operator.model import Happening
from outlast_operator.recoveries import RECOVERED, WENT_ON, camel

_PLAIN = frozenset(
    {"Training", "Starting", "WaitingForNodes", "Recovering", "WaitingToRetry", "GivenBack", "Resuming", "Suspending"}
)
"""Reasons of Ready that are no news by themselves, or told otherwise."""


def happened(old: TrainingJobStatus, new: TrainingJobStatus, heard: Heard | None) -> tuple[Happening, ...]:
    """The Events between two statuses, in a readable order."""
    told = (_failed(old, new), _hindered(old, new), _recovering(old, new), _checkpoints(old, new, heard))
    return (*(happening for group in told for happening in group), *_phase(old, new))


def _phase(old: TrainingJobStatus, new: TrainingJobStatus) -> Iterator[Happening]:
    suspended, before = _of(new, "Suspended"), _of(old, "Suspended")
    if suspended and suspended.reason == "Suspending" and (before is None or before.reason != "Suspending"):
        yield Happening("Normal", "Suspending", suspended.message)
    if old.phase == new.phase and old.conditions:
        return
    ready = _of(new, "Ready")
    text = ready.message if ready is not None else ""
    if new.phase == "Succeeded":
        digest = f"; weights {new.weights_digest}" if new.weights_digest else ""
        yield Happening("Normal", "Succeeded", f"{text} ({new.step} steps, {new.restart_count} restarts){digest}")
    elif new.phase == "Failed":
        yield Happening("Warning", "Failed", text)
    elif new.phase == "Suspended":
        loss = suspended is not None and suspended.reason != "Suspended"
        yield Happening("Warning" if loss else "Normal", "Suspended", suspended.message if suspended else text)
    elif old.phase == "Suspended":
        yield Happening("Normal", "Resumed", f"the job starts again from {_origin(new)}")
    elif new.phase == "Running" and old.phase in ("Pending", "Starting"):
        yield Happening("Normal", "Running", f"attempt {new.attempt} trains with {new.workers.ready} nodes")


def _failed(old: TrainingJobStatus, new: TrainingJobStatus) -> Iterator[Happening]:
    """Faults that the controller has named."""
    for failure in new.failures:
        if failure not in old.failures:
            where = f" on {failure.node}" if failure.node and failure.node not in failure.message else ""
            step = f" at step {failure.step}" if failure.step is not None else ""
            yield Happening("Warning", camel(failure.cause) or "Fault", f"{failure.message}{where}{step}")


def _hindered(old: TrainingJobStatus, new: TrainingJobStatus) -> Iterator[Happening]:
    """What keeps Pods from starting, what is wrong with the resource, versions that do not fit."""
    ready, before = _of(new, "Ready"), _of(old, "Ready")
    if ready is None or new.phase in ("Suspended", "Succeeded", "Failed") or ready.reason in _PLAIN:
        return
    recovering = _of(new, "Recovering")
    if recovering is not None and recovering.status == "True" and recovering.reason == ready.reason:
        return
    if before is None or before.reason != ready.reason:
        yield Happening("Warning", ready.reason, ready.message)


def _recovering(old: TrainingJobStatus, new: TrainingJobStatus) -> Iterator[Happening]:
    """The beginning of a recovery that no failure tells of, and the end of each."""
    now, before = _of(new, "Recovering"), _of(old, "Recovering")
    if now is None:
        return
    if now.status == "True":
        if (before is None or before.status != "True") and new.failures == old.failures:
            yield Happening("Normal", "Recovering", now.message)
        return
    news = before is None or before.status == "True" or before.message != now.message
    if news and now.reason in (RECOVERED, WENT_ON) and new.phase == "Running":
        what = "recovered from" if now.reason == RECOVERED else "went on after"
        yield Happening("Normal", now.reason, f"{what}: {now.message}")


def _checkpoints(old: TrainingJobStatus, new: TrainingJobStatus, heard: Heard | None) -> Iterator[Happening]:
    if new.checkpoint_failures > old.checkpoint_failures:
        why = str(heard.part("checkpoint").get("last_error") or "") if heard is not None else ""
        text = f"a checkpoint could not be completed{f': {why}' if why else ''}; training goes on"
        yield Happening("Warning", "CheckpointFailed", text)
    if old.checkpoint is None and new.checkpoint is not None:
        text = f"step {new.checkpoint.step} is at {new.checkpoint.url}"
        yield Happening("Normal", "FirstCheckpoint", text)


def _origin(status: TrainingJobStatus) -> str:
    checkpoint = status.checkpoint
    return "step 0" if checkpoint is None else f"step {checkpoint.step} at {checkpoint.url}"


def _of(status: TrainingJobStatus, kind: str) -> Condition | None:
    return next((condition for condition in status.conditions if condition.type == kind), None)
