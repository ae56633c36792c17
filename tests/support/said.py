"""What a job's controller says, as ``outlast.controller.status`` has it: enough of it for a plan."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

VERSION = version("outlast")


def said(nodes: Sequence[str], phase: str = "Running", step: int = 0, **more: Any) -> dict[str, Any]:
    """The status of a controller that knows ``nodes``, all of them with a seat."""
    count = len(nodes)
    return {
        "version": VERSION,
        "phase": phase,
        "reason": "",
        "outcome": None,
        "step": step,
        "best_step": step,
        "total": 1000,
        "attempts": 1,
        "attempt": 1,
        "restarts": {},
        "nodes": {name: node(name, seat) for seat, name in enumerate(nodes)},
        "workers": {"ready": count, "wanted": count, "least": count, "size": count, "spares": 0, "leaving": 0, "would_leave": []},
        "unplaced": [],
        "snapshot": {"step": step, "age_s": 1.0},
        "goodput": {"seconds": {"work": float(step)}, "ratio": 0.98},
        "recoveries": [],
        "failures": [],
        **more,
    }  # fmt: skip


def node(name: str, seat: int | None, state: str = "active") -> dict[str, Any]:
    """One of its nodes."""
    return {"node": name, "domain": f"m-{name}", "seat": seat, "state": state, "keeper": "up", "heartbeat_age_s": 0.1}
