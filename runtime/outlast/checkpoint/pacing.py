"""Keeping uploads below a bandwidth: one pace, shared by all threads of a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_BURST_S = 0.25
_LOOK_S = 0.1


class Pace:
    """``bandwidth`` in bytes a second; None: no limit. After GCRA: each piece moves the earliest time of the next."""

    def __init__(self, bandwidth: int | None) -> None:
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, nbytes: int, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Wait until ``nbytes`` may be sent; False when ``cancelled`` said yes meanwhile: they are not to be sent then,
        and take nothing from who asks afterwards."""
        if self._bandwidth is None:
            return True
        takes_s = nbytes / self._bandwidth
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - _BURST_S) + takes_s
            until = self._free_at
        while (left := until - time.monotonic()) > 0:
            if cancelled():
                with self._lock:
                    self._free_at -= takes_s
                return False
            time.sleep(min(left, _LOOK_S))
        return True
