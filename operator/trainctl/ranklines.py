"""Ranks' lines in the output of node Pods: which they are, which are wanted, and in which Pods to look (pure).

A node Pod writes each line of a rank as ``[rank R attempt A] text`` (``outlast.pod``); other lines are its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_MARK = re.compile(r"\[rank (\d+) attempt (\d+)\] ?")
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|[+-]\d\d:\d\d)) ?")
_FRACTION = re.compile(r"\.(\d*)")


@dataclass(frozen=True)
class RankLine:
    """One line of a rank's output; ``time`` as the kubelet wrote it (RFC 3339)."""

    time: str
    rank: int
    attempt: int
    text: str


@dataclass(frozen=True)
class Wanted:
    """Which lines to show. ``rank`` None: all ranks'; ``attempt`` None: see ``least``, from which attempt on."""

    rank: int | None = 0
    attempt: int | None = None
    least: int = 0

    def has(self, line: RankLine) -> bool:
        """Whether ``line`` is one of them."""
        if self.rank is not None and line.rank != self.rank:
            return False
        return line.attempt >= self.least if self.attempt is None else line.attempt == self.attempt


def split_time(text: str) -> tuple[str, str]:
    """A line of a Pod's log with ``timestamps=true``: (time, text)."""
    found = _TIMESTAMP.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)


def parse_line(text: str) -> RankLine | None:
    """A rank's line out of a timestamped line of its Pod; None: it is the Pod's own."""
    time, rest = split_time(text)
    found = _MARK.match(rest)
    return RankLine(time, int(found[1]), int(found[2]), rest[found.end() :]) if found else None


def shown(line: RankLine, *, marked: bool, timestamps: bool) -> str:
    """The line as people see it; ``marked``: with its rank and attempt, where several are mixed."""
    mark = f"[rank {line.rank} attempt {line.attempt}] " if marked else ""
    return f"{line.time} {mark}{line.text}" if timestamps and line.time else f"{mark}{line.text}"


def by_attempt(lines: Iterable[RankLine], wanted: Wanted, tail: int | None) -> dict[int, list[RankLine]]:
    """The wanted lines of each attempt in the order of time; of each the last ``tail``."""
    found: dict[int, list[RankLine]] = {}
    for line in lines:
        if wanted.has(line):
            found.setdefault(line.attempt, []).append(line)
    start = None if tail is None else -tail if tail else sys.maxsize
    return {attempt: sorted(some, key=lambda line: instant(line.time))[start:] for attempt, some in found.items()}


def instant(time: str) -> tuple[str, str]:
    """What orders times of all zones: the second in UTC, and the fraction, whose last zeros Kubernetes leaves out."""
    found = _FRACTION.search(time)
    whole = _FRACTION.sub("", time)
    try:
        whole = datetime.fromisoformat(whole).astimezone(UTC).replace(tzinfo=None).isoformat()
    except (ValueError, OverflowError):
        pass  # there is no time
    return whole, f"{found[1] if found else '':0<9}"


def pods_of_ranks(pods: Sequence[str], live: Mapping[str, Any] | None, procs: int, rank: int | None) -> tuple[str, ...]:
    """Of the node Pods, those to read: the one whose node has the rank's seat, as the controller says; all of them
    where it cannot say, and for all ranks."""
    if rank is None or live is None:
        return tuple(pods)
    seat = rank // procs
    seated = {str(node["node"]) for node in (live.get("nodes") or {}).values() if node.get("seat") == seat}
    found = tuple(name for name in pods if name in seated)
    return found or tuple(pods)
