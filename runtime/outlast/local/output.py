"""What the supervisor says: one JSON object per line on its standard output."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

WAITING = 10_000
"""Lines that wait for a reader that pauses; beyond them the oldest go."""


class Output:
    """Writes lines to a file descriptor, in a thread of its own: who says something does not wait for the reader.

    Of statuses only the newest waits to be read. What has been said is written before this process ends. A reader that
    is gone is no error: its absence is noticed elsewhere.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._status = b""
        self._writing = self._gone = False
        threading.Thread(target=self._write_all, name="outlast-output", daemon=True).start()
        atexit.register(self._flush)

    def progress(self, text: str) -> None:
        """What is going on, for people."""
        self._put({"type": "progress", "time": time.time(), "text": text})

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of the event log."""
        self._put({"type": "event", "event": dict(event)})

    def status(self, status: Mapping[str, Any]) -> None:
        """The controller's status."""
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(self._status)
        self._status = self._put({"type": "status", "status": dict(status)})

    def end(self, status: int, outcome: str, text: str, report: str) -> None:
        """The last line; returns once it is written. ``status``: the exit status; ``report``: where report.json is."""
        self._put({"type": "end", "exit": status, "outcome": outcome, "text": text, "report": report})
        self._flush()

    def _put(self, value: Mapping[str, Any]) -> bytes:
        line = json.dumps(value).encode() + b"\n"
        with self._changed:
            self._waiting.append(line)
            self._changed.notify_all()
        return line

    def _flush(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._gone or not (self._waiting or self._writing))

    def _write_all(self) -> None:
        while not self._gone:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting)
                line, self._writing = self._waiting.popleft(), True
            self._write(line)

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            with self._changed:
                self._gone = True
                self._changed.notify_all()
