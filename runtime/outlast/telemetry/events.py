"""The job's story: one JSON object per line with time, seq, kind, job, attempt, text and fields.

``seq`` counts from 1 and goes on after a restart of the controller, so that a reader that remembers the last one it saw
misses nothing and sees nothing twice, whichever controller it asks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from outlast.clock import Clock
from outlast.telemetry.lines import LineFile, exact, last_object, parse, read_lines

RECENT = 2048
"""Events kept in memory; older ones are read from the file."""
REACH = 16 * 1024
"""Bytes of the file within which an event is looked for line by line."""


@dataclass(frozen=True)
class LogEvent:
    """One line. ``time`` is in wall seconds, ``fields`` are for programs, ``text`` is for people."""

    time: float
    seq: int
    kind: str
    job: str
    attempt: int
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "seq": self.seq,
            "kind": self.kind,
            "job": self.job,
            "attempt": self.attempt,
            "text": self.text,
            "fields": dict(self.fields),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LogEvent:
        """Read a line back. Raises KeyError or ValueError when it is no event."""
        return cls(
            time=float(value["time"]),
            seq=int(value["seq"]),
            kind=str(value["kind"]),
            job=str(value["job"]),
            attempt=int(value["attempt"]),
            text=str(value["text"]),
            fields=dict(value["fields"]),
        )


class EventLog:
    """The writer of DIR/events.jsonl. Raises OSError when the file cannot be written."""

    def __init__(self, path: Path, job: str, clock: Clock) -> None:
        self._job = job
        self._clock = clock
        last = last_object(path)
        self._seq = int(last["seq"]) if last else 0
        self._file = LineFile(path)
        self._recent: deque[LogEvent] = deque(maxlen=RECENT)

    @property
    def seq(self) -> int:
        """The number of the newest event; 0: there is none."""
        return self._seq

    def append(self, kind: str, text: str, attempt: int = 0, fields: Mapping[str, Any] | None = None) -> LogEvent:
        """Add an event and return it, once it is written."""
        plain = exact(dict(fields or {}))
        event = LogEvent(self._clock.wall(), self._seq + 1, kind, self._job, attempt, text, plain)
        self._file.append(event.to_json())
        self._seq = event.seq
        self._recent.append(event)
        return event

    def after(self, seq: int, limit: int = 1000) -> list[LogEvent]:
        """Up to ``limit`` events with a greater number than ``seq``, oldest first."""
        oldest = self._recent[0].seq if self._recent else self._seq + 1
        if seq + 1 >= oldest:
            first = max(0, seq + 1 - oldest)
            return list(islice(self._recent, first, first + limit))
        return list(islice(_events_after(self._file.path, seq), limit))

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[LogEvent]:
    """All events of a file, oldest first."""
    return [LogEvent.from_json(value) for value in read_lines(path)]


def _events_after(path: Path, seq: int) -> Iterator[LogEvent]:
    """The events of a file with a greater number than ``seq``, oldest first, each read when it is asked for."""
    if not path.exists():
        return
    with path.open("rb") as file:
        _go_near(file, seq)
        for line in file:
            value = parse(line)
            if value is not None and int(value["seq"]) > seq:
                yield LogEvent.from_json(value)


def _go_near(file: BinaryIO, seq: int) -> None:
    """Go to a line before the first event beyond ``seq``, by halving: numbers grow along the file."""
    before, beyond = 0, file.seek(0, os.SEEK_END)
    while beyond - before > REACH:
        middle = (before + beyond) // 2
        file.seek(middle)
        file.readline()
        start = file.tell()
        found = _next_seq(file)
        if found is None or found > seq:
            beyond = middle
        else:
            before = start
    file.seek(before)


def _next_seq(file: BinaryIO) -> int | None:
    for line in file:
        value = parse(line)
        if value is not None:
            return int(value["seq"])
    return None
