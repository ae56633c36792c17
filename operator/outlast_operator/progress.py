"""What the controller says, in the words of the resource's status, added up over all controllers of the job. Pure.

A controller that takes over has counted nothing: what those before it had is kept in ``status.controller`` and added.
Ages become times once, when they are first seen, so that a status does not change with every look at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from outlast.api import TrainingJob
from outlast.jobstatus import (
    CheckpointStatus,
    ControllerStatus,
    Failure,
    SnapshotStatus,
    StartStatus,
    TrainingJobStatus,
    WorkersStatus,
)
from outlast_operator.heard import SUSPENDED, Heard
from outlast_operator.objects import node_selector
from outlast_operator.sight import Sight
from outlast_operator.timestamps import read_or_none, written

LAST_FAILURES, MOST_FAILURES = 8, 32
"""Kept in the status; looked at of what a controller tells."""
HEAD_LOST = "head-lost"
"""The cause of a restart that no controller counts: its own end."""
BETWEEN = "start"
"""The account of the seconds between two controllers."""
LONGEST_MESSAGE = 300
MOST_RESTARTS, MOST_SECONDS = 10**9, 1e12
"""Of one cause, of one account, as a controller says: their sums stay numbers that JSON and the schema have."""
_SAME_S = 5.0
"""Two failures of one cause and place are the same when no further apart: ages are rounded, and take time to arrive."""


def progressed(sight: Sight) -> TrainingJobStatus:
    """The old status with what is heard now, without phase and conditions."""
    heard, old = sight.heard, sight.old
    common = {"observed_generation": sight.job.metadata.generation, "selector": selector(sight.job)}
    if heard is None:
        nobody = WorkersStatus(wanted=sight.job.spec.workers.replicas)
        # An operator that has begun to look knows no better than the one before it.
        return old.model_copy(update={**common, "workers": nobody if sight.head is None else old.workers})
    controller = _controller(old, heard)
    began = heard.started_at or (sight.now if heard.started else None)
    started = old.start_time or (None if began is None else written(began))
    # A controller that suspended the job before it had all nodes knows less than those before it.
    under_way = heard.count(heard.status, "attempts") > 0 or heard.outcome not in ("", SUSPENDED)
    return old.model_copy(
        update={
            **common,
            "step": heard.count(heard.status, "step") if under_way else old.step,
            "total_steps": heard.count(heard.status, "total") or old.total_steps,
            "attempt": heard.count(heard.status, "attempt") or old.attempt,
            "workers": _workers(heard),
            "snapshot": _snapshot(old, heard) if under_way else old.snapshot,
            "checkpoint": _checkpoint(sight, heard),
            "checkpoint_failures": heard.count(heard.part("checkpoints"), "failed"),
            "goodput": _ratio(controller),
            "failures": _failures(old, heard),
            "weights_digest": heard.text("weights_digest") or old.weights_digest,
            "start_time": started,
            "controller": controller,
            **_restarts(controller, heard),
        }
    )


def emptied(status: TrainingJobStatus) -> TrainingJobStatus:
    """The status of a job whose nodes have all been taken away on purpose: what is counted stays, who is there goes."""
    controller = ControllerStatus(
        version=status.controller.version,
        earlier_restarts=dict(status.restarts),
        earlier_goodput=_sum(status.controller.earlier_goodput, status.controller.goodput),
    )
    return status.model_copy(
        update={
            "controller": controller,
            "head": None,
            "snapshot": None,
            "start": StartStatus(),
            "suspending_since": None,
            "checkpoint_failures": 0,
            "workers": WorkersStatus(wanted=status.workers.wanted),
        }
    )


def kept_step(status: TrainingJobStatus) -> int:
    """The step of the newest checkpoint that is known of."""
    return status.checkpoint.step if status.checkpoint is not None else 0


def selector(job: TrainingJob) -> str:
    """Selects the job's node Pods, as the scale subresource has it."""
    return ",".join(f"{name}={value}" for name, value in sorted(node_selector(job).items()))


# --- over several controllers ---------------------------------------------------------------------------------------


def _controller(old: TrainingJobStatus, heard: Heard) -> ControllerStatus:
    """The controller that speaks, with what those before it had."""
    known, ledger = old.controller, _ledger(heard.part("goodput"))
    same = known.identity in ("", heard.identity)
    return ControllerStatus(
        identity=heard.identity,
        version=heard.text("version") or known.version,
        heard_time=written(heard.at),
        goodput=ledger,
        earlier_restarts=dict(known.earlier_restarts if same else old.restarts),
        earlier_goodput=dict(known.earlier_goodput) if same else _taken_over(known, ledger, heard.at),
        earlier_attempt=known.earlier_attempt if same else old.attempt,
    )


def _taken_over(known: ControllerStatus, ledger: Mapping[str, float], now: float) -> dict[str, float]:
    """What the controllers before had booked, and the silence between the last of them and this one's first word."""
    earlier = _sum(known.earlier_goodput, known.goodput)
    silent = now - (read_or_none(known.heard_time) or now) - sum(ledger.values())
    if silent > 0:
        earlier[BETWEEN] = round(earlier.get(BETWEEN, 0.0) + silent, 3)
    return earlier


def _restarts(controller: ControllerStatus, heard: Heard) -> dict[str, Any]:
    """Restarts by cause. An attempt that follows on a lost controller was a restart, unless its ranks were adopted."""
    told = heard.part("restarts")
    own = {cause: min(heard.count(told, cause), MOST_RESTARTS) for cause in told if heard.count(told, cause)}
    total = {cause: int(count) for cause, count in _sum(controller.earlier_restarts, own).items()}
    if 0 < controller.earlier_attempt < heard.count(heard.status, "attempts"):
        total[HEAD_LOST] = total.get(HEAD_LOST, 0) + 1
    return {"restarts": total, "restart_count": sum(total.values())}


def _ledger(part: Mapping[str, Any]) -> dict[str, float]:
    lost = part.get("lost_s") if isinstance(part.get("lost_s"), Mapping) else {}
    accounts = {"train": part.get("train_s"), **dict(lost or {})}
    booked = {str(name): value for name, value in accounts.items() if isinstance(value, int | float) and value}
    return {name: float(max(0.0, min(value, MOST_SECONDS))) for name, value in booked.items()}


def _ratio(controller: ControllerStatus) -> float | None:
    total = _sum(controller.earlier_goodput, controller.goodput)
    wall = sum(total.values())
    return round(min(1.0, max(0.0, total.get("train", 0.0) / wall)), 4) if wall > 0 else None


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: round(one.get(name, 0) + other.get(name, 0), 3) for name in sorted({*one, *other})}


# --- what is -------------------------------------------------------------------------------------------------------


def _workers(heard: Heard) -> WorkersStatus:
    ready, wanted, spares, size = (heard.count(heard.workers, name) for name in ("ready", "wanted", "spares", "size"))
    return WorkersStatus(ready=ready, wanted=wanted, spares=spares if size else min(spares, max(0, ready - wanted)))


def _snapshot(old: TrainingJobStatus, heard: Heard) -> SnapshotStatus | None:
    part = heard.part("snapshot")
    if part.get("step") is None:
        return None
    step = heard.count(part, "step")
    if old.snapshot is not None and old.snapshot.step == step:
        return old.snapshot
    return SnapshotStatus(step=step, time=written(_since(heard, part.get("age_s"))))


def _checkpoint(sight: Sight, heard: Heard) -> CheckpointStatus | None:
    part, old = heard.part("checkpoint"), sight.old.checkpoint
    url = checkpoint_url(sight.job, part)
    if part.get("step") is None or url is None:
        return old
    step = heard.count(part, "step")
    if old is not None and (old.step, old.url) == (step, url):
        return old
    return CheckpointStatus(step=step, time=written(_since(heard, part.get("age_s"))), url=url)


def checkpoint_url(job: TrainingJob, part: Mapping[str, Any]) -> str | None:
    """Where the job's checkpoints lie; None without an object tier."""
    if part.get("url"):
        return str(part["url"])
    checkpoint = job.spec.checkpoint
    return None if checkpoint is None else f"{checkpoint.url}/{job.metadata.namespace}/{job.metadata.name}"


def _since(heard: Heard, age: object) -> float:
    return heard.at - (float(age) if isinstance(age, int | float) else 0.0)


def _failures(old: TrainingJobStatus, heard: Heard) -> tuple[Failure, ...]:
    """The last ones, oldest first; those of earlier controllers stay until there are others."""
    known = list(old.failures)
    for failure in _told(heard):
        if not any(_same(failure, other) for other in known):
            known.append(failure)
    # In one order whatever was known: of two in one second, each pass must keep the same one.
    return tuple(sorted(known, key=lambda failure: (failure.time, repr(failure)))[-LAST_FAILURES:])


def _told(heard: Heard) -> Iterator[Failure]:
    told = heard.status.get("failures")
    for entry in told[-MOST_FAILURES:] if isinstance(told, list | tuple) else ():
        if not isinstance(entry, Mapping):
            continue
        wall = entry.get("time")
        at = float(wall) if isinstance(wall, int | float) else _since(heard, entry.get("age_s"))
        yield Failure(
            time=written(at),
            cause=str(entry.get("cause") or "unknown"),
            message=str(entry.get("text") or entry.get("message") or "")[:LONGEST_MESSAGE],
            node=str(entry["node"]) if entry.get("node") else None,
            rank=_count_or_none(entry.get("rank")),
            step=_count_or_none(entry.get("step")),
        )


def _count_or_none(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _same(one: Failure, other: Failure) -> bool:
    if one.model_copy(update={"time": other.time}) != other:
        return False
    apart = (read_or_none(one.time) or 0.0) - (read_or_none(other.time) or 0.0)
    return abs(apart) <= _SAME_S
