"""What people want to know of a controller's /status, as text (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = "-"


@dataclass(frozen=True)
class Summary:
    """One moment of a job, every value as text except ``step`` (steps done; None before the first is known)."""

    phase: str
    step: int | None
    progress: str
    loss: str
    nodes: str
    attempt: str
    snapshot: str
    goodput: str

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) in the order to show them."""
        return [
            ("phase", self.phase),
            ("step", self.progress),
            ("loss", self.loss),
            ("nodes", self.nodes),
            ("attempt", self.attempt),
            ("snapshot", self.snapshot),
            ("goodput", self.goodput),
        ]


def summarize(status: Mapping[str, Any]) -> Summary:
    """The summary of ``status``."""
    step = status.get("step")
    total = status.get("total")
    return Summary(
        phase=str(status.get("phase", NOTHING)),
        step=step,
        progress=NOTHING if step is None else f"{step}/{total}" if total else str(step),
        loss=_number((status.get("metrics") or {}).get("loss"), "{:.4f}"),
        nodes=_nodes(status.get("nodes") or {}),
        attempt=str(status.get("attempt", NOTHING)),
        snapshot=_snapshot((status.get("snapshot") or {}).get("committed")),
        goodput=_goodput(status.get("goodput")),
    )


def event_line(event: Mapping[str, Any]) -> str:
    """One line for an event of the log."""
    return f"{event.get('kind', 'event')}: {event.get('text', '')}"


def _number(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else NOTHING


def _nodes(nodes: Mapping[str, Mapping[str, Any]]) -> str:
    """How many are in each state: "4 active, 1 spare"."""
    counts: dict[str, int] = {}
    for node in nodes.values():
        state = str(node.get("state", "known"))
        counts[state] = counts.get(state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or NOTHING


def _snapshot(committed: object) -> str:
    """The newest committed one: "step 16, 3 s ago"."""
    if not isinstance(committed, Mapping):
        return NOTHING
    return f"step {committed.get('step', NOTHING)}, {_number(committed.get('age_s'), '{:.0f}')} s ago"


def _goodput(value: object) -> str:
    ratio = value.get("ratio") if isinstance(value, Mapping) else value
    return _number(ratio, "{:.1%}")
