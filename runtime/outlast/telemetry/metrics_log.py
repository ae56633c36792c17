"""What training reported, one JSON object per line and step: step, attempt, rank, and each metric by name.

Floats are written by repr, so that two runs can be compared bit by bit; what is not finite is written as "nan", "inf"
or "-inf". A step that is done again after a recovery has a line of each attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.telemetry.lines import LineFile, last_object, read_lines

RESERVED = ("step", "attempt", "rank", "time")
"""Names that a metric cannot have."""


@dataclass(frozen=True)
class StepMetrics:
    """One line: the metrics that ``rank`` reported when it had done ``step`` steps."""

    step: int
    attempt: int
    rank: int
    metrics: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        plain = {name: value for name, value in self.metrics.items() if name not in RESERVED}
        return {"step": self.step, "attempt": self.attempt, "rank": self.rank, **plain}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepMetrics:
        """Read a line back. Raises KeyError or ValueError when it is none."""
        metrics = {name: item for name, item in value.items() if name not in RESERVED}
        return cls(int(value["step"]), int(value["attempt"]), int(value["rank"]), metrics)


class MetricsLog:
    """The writer of DIR/metrics.jsonl: only what is new, in the order of (attempt, step)."""

    def __init__(self, path: Path) -> None:
        value = last_object(path)
        self._last = StepMetrics.from_json(value) if value else None
        self._file = LineFile(path)

    @property
    def last(self) -> StepMetrics | None:
        """The newest line."""
        return self._last

    def append(self, line: StepMetrics) -> bool:
        """Write ``line`` unless it, or a newer one, is there already; return whether it was written."""
        if self._last is not None and (line.attempt, line.step) <= (self._last.attempt, self._last.step):
            return False
        self._file.append(line.to_json())
        self._last = line
        return True

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """All lines of a file, oldest first."""
    return [StepMetrics.from_json(value) for value in read_lines(path)]
