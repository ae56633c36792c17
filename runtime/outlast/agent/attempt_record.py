"""What a node remembers of attempts when its agent ends: a small file, durable before a rank starts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from outlast.snapshot.identity import Attempt

FILE = "attempt.json"


@dataclass(frozen=True)
class AttemptRecord:
    """``in_force``: the newest attempt that this node was told; ``started``: the one whose ranks it started last, in
    which seat, and which restart of the job that was.
    """

    in_force: Attempt | None = None
    started: Attempt | None = None
    seat: int | None = None
    restart_count: int = 0

    def admits(self, attempt: Attempt) -> bool:
        """Whether ``attempt`` may be obeyed: in force already, or newer. Another of the same number is not."""
        current = self.in_force
        return current is None or attempt == current or attempt.number > current.number


def load(folder: Path) -> AttemptRecord:
    """The record in ``folder``; an empty one when there is none. Raises ValueError or KeyError when it is damaged."""
    try:
        data = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return AttemptRecord()
    in_force, started = data["in_force"], data["started"]
    return AttemptRecord(
        Attempt.parse(in_force) if in_force else None,
        Attempt.parse(started) if started else None,
        data["seat"],
        int(data["restart_count"]),
    )


def store(folder: Path, record: AttemptRecord) -> None:
    """Replace the record; on return it survives this process and a crash of the machine's file cache."""
    data = {
        "in_force": record.in_force and str(record.in_force),
        "started": record.started and str(record.started),
        "seat": record.seat,
        "restart_count": record.restart_count,
    }
    draft = folder / f".{FILE}"
    with draft.open("w") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / FILE)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
