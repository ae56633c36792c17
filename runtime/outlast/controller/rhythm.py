"""One tier's interval as it is chosen now, and what is measured for it."""

from __future__ import annotations

from typing import Any

from outlast.controller.intervals import IntervalChooser, Lengthening


class Rhythm:
    """Asks ``chooser``, and tells it what a state costs: also the steps that were longer while one was written."""

    def __init__(self, chooser: IntervalChooser) -> None:
        self._chooser = chooser
        self._lengthening = Lengthening()

    def interval(self, now: float) -> float:
        """Seconds of training from one state to the next."""
        return self._chooser.choice(now).interval_s

    def step(self, seconds: float, busy: bool) -> None:
        """A step took so long; ``busy``: a state was being written."""
        self._lengthening.step(seconds, busy)

    def safe(self, stall_s: float, latency_s: float, step_s: float | None) -> None:
        """A state is safe ``latency_s`` after its boundary, and blocked training for ``stall_s``."""
        background_s = self._lengthening.background_s(latency_s / step_s) if step_s else 0.0
        self._chooser.observe(stall_s, background_s, latency_s)

    def failed(self, now: float) -> None:
        """The work since the last state is lost."""
        self._chooser.failed(now)

    def resumed(self, now: float) -> None:
        """Training goes on, or begins."""
        self._chooser.resumed(now)

    def to_json(self, now: float) -> dict[str, Any]:
        """The choice with its inputs, for /status."""
        return self._chooser.choice(now).to_json()
