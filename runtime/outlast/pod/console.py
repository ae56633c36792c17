"""A Pod's standard output: one event a line, key=value, and ranks' output between them.

``say`` never waits: whoever reads a container's output may be slow, and nothing of a node may be held up by that.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from outlast.clock import Clock, SystemClock

MOST_WAITING = 10_000
"""Lines kept for a slow reader; beyond that they are dropped, and counted."""

_FLUSH_S = 2.0


def line_of(wall: float, event: str, fields: Mapping[str, Any]) -> str:
    """``time=... event=... key=value ...``; values with blanks or quotes are JSON strings."""
    time = datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    pairs = {"time": time, "event": event, **{key: value for key, value in fields.items() if value is not None}}
    return " ".join(f"{key}={_value(value)}" for key, value in pairs.items())


def _value(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = bool(text) and text.isprintable() and not any(letter in ' "=' for letter in text)
    return text if plain else json.dumps(text, ensure_ascii=False)


class Console:
    """``common``: fields of every line. Any thread may call any method."""

    def __init__(self, descriptor: int, common: Mapping[str, Any], clock: Clock | None = None) -> None:
        self._descriptor, self._common, self._clock = descriptor, dict(common), clock or SystemClock()
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        self._lock, self._counting = threading.Lock(), threading.Lock()
        self._thread = threading.Thread(target=self._carry, name="outlast-console", daemon=True)
        self._thread.start()

    def say(self, event: str, **fields: Any) -> None:
        """Add a line; it is dropped when thousands wait already."""
        try:
            self._lines.put_nowait(self._line(event, fields))
        except queue.Full:
            with self._counting:
                self._dropped += 1

    def write(self, lines: bytes) -> None:
        """Write whole lines as they are, however long that takes."""
        with self._lock:
            while lines:
                try:
                    lines = lines[os.write(self._descriptor, lines) :]
                except BrokenPipeError:
                    return

    def close(self) -> None:
        """Write what waits, as far as that takes no longer than two seconds."""
        try:
            self._lines.put(None, timeout=_FLUSH_S)
        except queue.Full:
            return
        self._thread.join(_FLUSH_S)

    def _line(self, event: str, fields: Mapping[str, Any]) -> bytes:
        text = line_of(self._clock.wall(), event, {**self._common, **fields})
        return text.encode(errors="backslashreplace") + b"\n"

    def _carry(self) -> None:
        while (line := self._lines.get()) is not None:
            self.write(line)
            with self._counting:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self.write(self._line("lines-dropped", {"lines": dropped, "reason": "the output was not read in time"}))
