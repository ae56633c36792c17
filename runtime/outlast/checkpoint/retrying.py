"""Asking a store again: growing pauses with full jitter, for as long as patience lasts.

Source of the pauses: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 (full jitter).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from outlast.errors import StaleAttemptError, StoreUnavailable

FIRST_S = 0.2
LONGEST_S = 10.0
_LOOK_S = 0.1

T = TypeVar("T")


def again(
    call: Callable[[], T],
    patience_s: float,
    cancelled: Callable[[], bool] = lambda: False,
    on_wait: Callable[[str | None], None] = lambda _: None,
) -> T:
    """``call()``, again after StoreUnavailable until ``patience_s`` is over; the last error is raised then.

    ``on_wait`` is told each error that is waited after, and None when the call has succeeded after one. Raises
    StaleAttemptError when ``cancelled`` says yes during a pause.
    """
    until, pause = time.monotonic() + patience_s, FIRST_S
    waited = False
    while True:
        try:
            result = call()
            if waited:
                on_wait(None)
            return result
        except StoreUnavailable as error:
            if time.monotonic() >= until:
                raise
            on_wait(str(error))
            waited = True
        _sleep(min(random.uniform(0.0, pause), max(0.0, until - time.monotonic())), cancelled)
        pause = min(2 * pause, LONGEST_S)


def _sleep(seconds: float, cancelled: Callable[[], bool]) -> None:
    until, never = time.monotonic() + seconds, threading.Event()
    while (left := until - time.monotonic()) > 0:
        if cancelled():
            raise StaleAttemptError("the transfer was called off")
        never.wait(min(left, _LOOK_S))
