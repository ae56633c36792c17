"""What ranks' logs are called: as files on a node, and as objects below the job's URL in its store. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

KEPT_ATTEMPTS = 20
"""Attempts whose logs stay, on a node and in the store."""

STORED = "logs/"
"""What the keys of stored logs begin with."""

_FILE = re.compile(r"rank-(\d+)\.attempt-(\d+)\.log")
_KEY = re.compile(r"logs/attempt-(\d+)/rank-(\d+)\.log")


def log_file(attempt: int, rank: int) -> str:
    """The file's name in the node's log folder."""
    return f"rank-{rank}.attempt-{attempt}.log"


def parse_log_file(name: str) -> tuple[int, int] | None:
    """(attempt, rank) of such a name; None: it is none."""
    found = _FILE.fullmatch(name)
    return (int(found[2]), int(found[1])) if found else None


def log_key(attempt: int, rank: int) -> str:
    """Where it lies below the job's URL."""
    return f"{STORED}attempt-{attempt}/rank-{rank}.log"


def parse_log_key(key: str) -> tuple[int, int] | None:
    """(attempt, rank) of such a key; None: it is none."""
    found = _KEY.fullmatch(key)
    return (int(found[1]), int(found[2])) if found else None


def outdated(attempts: Iterable[int], kept: int = KEPT_ATTEMPTS) -> set[int]:
    """Those of ``attempts`` that are older than the newest ``kept`` numbers."""
    found = set(attempts)
    return {attempt for attempt in found if attempt <= max(found) - kept}
