"""What a job's controller says (``outlast.controller.status``), read with care: it may be of another version. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

JOINED = frozenset({"active", "spare", "joining", "leaving"})
"""States of nodes that are here."""
LEFT, LOST = "left", "lost"
SUSPENDED = "suspended"
"""The outcome of a suspension."""
GATHERING = "gathering"
"""The stage in which a controller waits for nodes, and has started nothing yet."""
MOST = 2**63 - 1


@dataclass(frozen=True)
class Heard:
    """The status as it was heard at ``at``. Every property has an answer for what is not in it."""

    status: Mapping[str, Any]
    at: float

    @property
    def identity(self) -> str:
        return self.text("controller")

    @property
    def outcome(self) -> str:
        """succeeded, failed, stopped or suspended; "" before the end."""
        return self.text("outcome")

    @property
    def workers(self) -> Mapping[str, Any]:
        return self.part("workers")

    @cached_property
    def states(self) -> dict[str, str]:
        """The nodes that the controller knows, and how they are."""
        return {name: str(_mapping(node).get("state", "")) for name, node in self.part("nodes").items()}

    @cached_property
    def lost_since(self) -> dict[str, float]:
        """The nodes that it has given up, and when, in wall seconds, as far as it says so."""
        nodes = {name: _mapping(node) for name, node in self.part("nodes").items()}
        ages = {name: node.get("gone_s") for name, node in nodes.items() if node.get("state") == LOST}
        return {name: self.at - age for name, age in ages.items() if isinstance(age, int | float)}

    @property
    def joined(self) -> int:
        return self.count(self.workers, "ready")

    @property
    def started(self) -> bool:
        """Whether ranks of the job were ever started, as this controller knows."""
        return any(self.count(self.status, name) > 0 for name in ("attempts", "step", "best_step"))

    @property
    def started_at(self) -> float | None:
        """When the job's first rank was started, in wall seconds, as far as it knows."""
        value = self.status.get("start_time")
        return float(value) if isinstance(value, int | float) else None

    @property
    def suspending(self) -> bool:
        """Whether it is bringing the job's state to the store, and will end by itself."""
        return self.status.get("suspending") is True

    @property
    def unplaced(self) -> tuple[str, ...]:
        told = self.status.get("unplaced")
        return tuple(str(machine) for machine in told) if isinstance(told, list | tuple) else ()

    @property
    def store_trouble(self) -> tuple[str, float] | None:
        """What keeps the object tier from answering, and for how many seconds."""
        part = self.part("store_trouble")
        seconds = part.get("s")
        return (str(part["text"]), float(seconds)) if part.get("text") and isinstance(seconds, int | float) else None

    @property
    def has_snapshot(self) -> bool:
        """Whether a committed snapshot is in the nodes' memory."""
        return self.part("snapshot").get("step") is not None

    def text(self, name: str) -> str:
        return str(self.status.get(name) or "")

    def part(self, name: str) -> Mapping[str, Any]:
        return _mapping(self.status.get(name))

    @staticmethod
    def count(part: Mapping[str, Any], name: str) -> int:
        """A number of 0 or more, and of 63 bits."""
        value = part.get(name)
        return max(0, int(min(value, MOST))) if isinstance(value, int | float) else 0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
