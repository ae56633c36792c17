"""Several things that are waited for, as one: each source is read by a thread of its own.

The threads are daemons, for a source may block for as long as its peer is silent; they end with the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from outlast.errors import OutlastError


@dataclass(frozen=True)
class Ended:
    """A source has no more to say; ``error``: why it broke off."""

    error: OutlastError | None = None


class Merged:
    """Takes (source's name, item) in the order of arrival; the last item of every source is an ``Ended``."""

    def __init__(self) -> None:
        self._arrived: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1000)
        self.open: set[str] = set()

    def add(self, name: str, source: Iterable[Any]) -> None:
        """Begin to read ``source``."""
        self.open.add(name)
        threading.Thread(target=self._read, args=(name, source), name=name, daemon=True).start()

    def next(self, timeout_s: float | None = None) -> tuple[str, Any] | None:
        """The next item, or None when nothing came in time."""
        try:
            name, item = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, Ended):
            self.open.discard(name)
        return name, item

    def _read(self, name: str, source: Iterable[Any]) -> None:
        error: OutlastError | None = None
        try:
            for item in source:
                self._arrived.put((name, item))
        except OutlastError as caught:
            error = caught
        self._arrived.put((name, Ended(error)))
