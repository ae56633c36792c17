"""What the object store said last, and how long a job with nothing else to do waits for it. Pure.

::

    an upload goes on, and nobody complains -> as long as uploads may take
    the store complains, or nothing is under way -> its patience, from the last good answer or the first complaint
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class StoreNews:
    """``trouble``: what it said last, empty while it is well; ``since``: when it last was well, or began not to."""

    trouble: str = ""
    since: float = -math.inf

    def hear(self, now: float, trouble: str) -> None:
        """It has answered well, or ``trouble`` keeps it from that."""
        if not (trouble and self.trouble):
            self.since = now
        self.trouble = trouble

    def waits_until(self, began: float, patience_s: float, longest_s: float, *, under_way: bool) -> float:
        """Until when it is waited for by a job that has waited since ``began``; ``longest_s``: in all."""
        if under_way and not self.trouble:
            return began + longest_s
        return min(max(began, self.since) + patience_s, began + longest_s)
