"""Wall time as Kubernetes writes it (RFC 3339, UTC, whole seconds) and back. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

LATEST = 253_402_300_799
"""The end of the year 9999: what lies beyond cannot be written."""


def written(seconds: float) -> str:
    """``1700000000.7`` is ``2023-11-14T22:13:20Z``; what is before 1970 or beyond the year 9999 is its limit."""
    return datetime.fromtimestamp(max(0, min(int(seconds), LATEST)), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read(text: str) -> float:
    """Seconds since the epoch. Raises ValueError when ``text`` is no time."""
    return datetime.fromisoformat(text).timestamp()


def read_or_none(text: str | None) -> float | None:
    """Likewise; None for what is absent or cannot be read: somebody else may have written it."""
    if not text:
        return None
    try:
        return read(text)
    except ValueError:
        return None
