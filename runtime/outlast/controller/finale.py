"""The end of a job as the driver carries it out: which nodes have yet to confirm that no rank lives, and the last word.

``control/final.json`` makes the outcome final for any later controller.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast import messages as m
from outlast.snapshot.identity import Attempt


@dataclass
class Ending:
    """The job's outcome is known; ``waiting``: nodes that have not confirmed yet that no rank of theirs lives."""

    finish: m.Finish
    attempt: Attempt
    waiting: set[str]
    deadline: float

    def takes(self, event: m.Event) -> bool:
        """Whether ``event`` was meant for nobody else."""
        if isinstance(event, m.NodeGone):
            self.waiting.discard(event.node)
        if not isinstance(event, m.Stopped) or event.attempt != self.attempt:
            return False
        self.waiting.discard(event.node)
        return True

    def ready(self, now: float) -> bool:
        """Whether all have confirmed, or have had the time to."""
        return not self.waiting or now >= self.deadline


def read_final(path: Path) -> dict[str, Any] | None:
    """How the job ended, when a controller before this one saw its end."""
    if not path.exists():
        return None
    final: dict[str, Any] = json.loads(path.read_text())
    return final
