"""DIR/report.json from the controller's last status, the faults performed and the environment (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CAUSES = ("detect", "stop", "start", "restore", "recompute", "snapshot_stall", "idle")
"""The ledger's causes of lost seconds."""

SOURCES = ("memory-local", "memory-peer", "memory-decode", "object", "none")

PHASES = {"succeeded": "Succeeded", "failed": "Failed", "stopped": "Stopped", "suspended": "Suspended"}


def build_report(
    status: Mapping[str, Any],
    faults: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    wall_s: float,
    reason: str,
) -> dict[str, Any]:
    """What a run came to.

    status: the controller's last /status (empty when there never was one). faults: lines of faults.jsonl. wall_s:
    seconds from the command's start. reason: how it ended, for people. What the status does not say is null or 0.
    """
    return {
        "phase": PHASES.get(str(status.get("outcome")), "Failed"),
        "reason": reason,
        "steps": int(status.get("step") or 0),
        "total": status.get("total"),
        "attempts": _attempts(status),
        "wall_s": round(wall_s, 3),
        "goodput": _goodput(status),
        "recoveries": [_recovery(item) for item in status.get("recoveries") or []],
        "resizes": [dict(item) for item in status.get("resizes") or []],
        "snapshots": _snapshots(status.get("snapshots") or {}),
        "checkpoints": _checkpoints(status.get("checkpoints") or {}),
        "weights_digest": status.get("weights_digest"),
        "first_error": status.get("first_error"),
        "faults": [dict(fault) for fault in faults],
        "environment": {**environment, **_ranks_environment(status)},
    }


def _ranks_environment(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """What rank 0 said of itself when it was done (or before), through whichever node it ran on last."""
    told = [node["environment"] for node in (status.get("nodes") or {}).values() if node.get("environment")]
    return dict(told[-1]) if told else {}


def _attempts(status: Mapping[str, Any]) -> int:
    attempts = status.get("attempts", status.get("attempt")) or 0
    return int(attempts["number"] if isinstance(attempts, Mapping) else attempts)


def _goodput(status: Mapping[str, Any]) -> dict[str, Any]:
    goodput = status.get("goodput")
    known: Mapping[str, Any] = goodput if isinstance(goodput, Mapping) else {"ratio": goodput}
    lost = known.get("lost_s") or {}
    return {"ratio": known.get("ratio"), "lost_s": {**dict.fromkeys(CAUSES, 0.0), **lost}}


def _recovery(item: Mapping[str, Any]) -> dict[str, Any]:
    sources = {**dict.fromkeys(SOURCES, 0), **(item.get("restore_sources") or {})}
    return {"cause": None, "detect_s": None, "lost_steps": None, "total_s": None, **item, "restore_sources": sources}


def _snapshots(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"count": 0, "bytes": 0, "stall_s": 0.0, **item}


def _checkpoints(item: Mapping[str, Any]) -> dict[str, Any]:
    """``skipped``: due while another was under way; ``failed``: begun and not completed."""
    return {"count": 0, "bytes": 0, "skipped": 0, "failed": 0, "last_step": None, "url": None, **item}
