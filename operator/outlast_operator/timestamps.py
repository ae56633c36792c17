"""Wall time as Kubernetes writes it (RFC 3339, UTC, whole seconds) and back. Pure."""

from __future__ import annotations

from datetime import UTC, datetime


def written(seconds: float) -> str:
    """``1700000000.7`` is ``2023-11-14T22:13:20Z``."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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
