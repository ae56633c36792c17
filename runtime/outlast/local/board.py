"""What the controller's last status says about nodes, and when a node is due for replacement (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LOST = frozenset({"lost", "left"})
"""States of nodes that the job has no more."""
RUNNING = "Running"


@dataclass(frozen=True)
class Board:
    """The controller's newest /status; an empty one before the first."""

    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str | None:
        """succeeded, failed or stopped once the job is over."""
        outcome = self.status.get("outcome")
        return str(outcome) if outcome else None

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.status.get("step") or 0)

    @property
    def best_step(self) -> int:
        """The most steps that were ever done."""
        return max(self.step, int(self.status.get("best_step") or 0))

    @property
    def attempt(self) -> int:
        """The number of the attempt under way; 0 before the first."""
        attempt = self.status.get("attempt") or 0
        return int(attempt if not isinstance(attempt, Mapping) else attempt["number"])

    @property
    def running(self) -> bool:
        return self.status.get("phase") == RUNNING

    @property
    def nodes(self) -> Mapping[str, Mapping[str, Any]]:
        nodes = self.status.get("nodes") or {}
        return nodes if isinstance(nodes, Mapping) else {str(node["node"]): node for node in nodes}

    @property
    def asked(self) -> int | None:
        """How many nodes somebody has asked for since the start; None: nobody has."""
        workers = self.status.get("workers") or {}
        return int(workers["wanted"]) + int(workers["wanted_spares"]) if workers.get("asked") else None

    def left(self) -> set[str]:
        """The nodes that have handed over and are gone."""
        return {name for name, node in self.nodes.items() if node.get("state") == "left"}

    def here(self) -> set[str]:
        """The nodes that are there and stay."""
        return {name for name, node in self.nodes.items() if node.get("state") not in LOST | {"leaving"}}

    def seats(self) -> dict[int, str]:
        """Seat -> the node that has it now."""
        return {
            int(node["seat"]): name
            for name, node in self.nodes.items()
            if node.get("seat") is not None and node.get("state") not in LOST
        }

    def lost(self) -> set[str]:
        """The nodes that the controller has given up."""
        return {name for name, node in self.nodes.items() if node.get("state") in LOST}


class Replacements:
    """Says which nodes have been lost for long enough. ``after_s`` None: never replace."""

    def __init__(self, after_s: float | None) -> None:
        self._after_s = after_s
        self._since: dict[str, float] = {}
        self._replaced: set[str] = set()

    def due(self, lost: Iterable[str], now: float) -> list[str]:
        """The nodes of ``lost`` to replace now (monotonic seconds), until ``done`` says that they are."""
        lost = set(lost) - self._replaced
        self._since = {node: self._since.get(node, now) for node in lost}
        if self._after_s is None:
            return []
        return [node for node in sorted(lost) if now - self._since[node] >= self._after_s]

    def open(self, lost: Iterable[str]) -> set[str]:
        """Those of ``lost`` that are not done with."""
        return set(lost) - self._replaced

    def coming(self, lost: Iterable[str]) -> int:
        """How many of ``lost`` will be replaced yet."""
        return 0 if self._after_s is None else len(self.open(lost))

    def done(self, node: str) -> None:
        """``node`` has a replacement, or needs none, even if it comes back and is lost again."""
        self._replaced.add(node)
