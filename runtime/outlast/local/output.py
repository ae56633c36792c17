"""What the supervisor says: one JSON object per line on its standard output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any


class Output:
    """Writes lines to a file descriptor. A reader that is gone is no error: its absence is noticed elsewhere."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def progress(self, text: str) -> None:
        """What is going on, for people."""
        self._write({"type": "progress", "time": time.time(), "text": text})

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of the event log."""
        self._write({"type": "event", "event": dict(event)})

    def status(self, status: Mapping[str, Any]) -> None:
        """The controller's status."""
        self._write({"type": "status", "status": dict(status)})

    def end(self, status: int, outcome: str, text: str, report: str) -> None:
        """The last line. ``status``: the exit status; ``report``: the path of report.json."""
        self._write({"type": "end", "exit": status, "outcome": outcome, "text": text, "report": report})

    def _write(self, value: Mapping[str, Any]) -> None:
        try:
            os.write(self._descriptor, json.dumps(value).encode() + b"\n")
        except BrokenPipeError:
            return
