"""What people want to know of a controller's /status, as text (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainctl.columns import printable

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
    checkpoint: str
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
            ("checkpoint", self.checkpoint),
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
        nodes=_nodes(status.get("nodes") or {}, (status.get("workers") or {}).get("wanted")),
        attempt=str(status.get("attempt", NOTHING)),
        snapshot=_newest((status.get("snapshot") or {}).get("committed")),
        checkpoint=_newest((status.get("checkpoint") or {}).get("committed")),
        goodput=_goodput(status.get("goodput")),
    )


def event_line(event: Mapping[str, Any]) -> str:
    """One line for an event of the log."""
    return printable(f"{event.get('kind', 'event')}: {event.get('text', '')}")


def _number(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else NOTHING


def _nodes(nodes: Mapping[str, Mapping[str, Any]], wanted: object) -> str:
    """How many are in each state, the active ones out of those wanted: "3/4 active, 1 lost"."""
    counts: dict[str, int] = {}
    for node in nodes.values():
        state = str(node.get("state", "known"))
        counts[state] = counts.get(state, 0) + 1
    texts = {state: str(count) for state, count in counts.items()}
    if wanted is not None and "active" in texts:
        texts["active"] += f"/{wanted}"
    return ", ".join(f"{text} {state}" for state, text in texts.items()) or NOTHING


def _newest(committed: object) -> str:
    """The newest committed one: "step 16, 3 s ago", or, when that was not seen, "step 16"."""
    if not isinstance(committed, Mapping):
        return NOTHING
    age = _number(committed.get("age_s"), ", {:.0f} s ago")
    return f"step {committed.get('step', NOTHING)}{'' if age == NOTHING else age}"


def _goodput(value: object) -> str:
    ratio = value.get("ratio") if isinstance(value, Mapping) else value
    return _number(ratio, "{:.1%}")
