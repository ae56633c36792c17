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
    *,
    slow: bool = False,
    pauses_s: tuple[float, float] | None = None,
) -> T:
    """``call()``, again after StoreUnavailable until ``patience_s`` is over; the last error is raised then.

    ``on_wait`` is told each error that is waited after, and None by the same thread when nothing is waited for any
    more, however that ended. ``slow``: ``call`` may rightly take long, so that patience begins with its first failure
    only. ``pauses_s``: the first and the longest pause. Raises StaleAttemptError when ``cancelled`` says yes during a
    pause.
    """
    pause, longest = pauses_s or (FIRST_S, LONGEST_S)
    until = None if slow else time.monotonic() + patience_s
    waited = False
    try:
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                now = time.monotonic()
                until = now + patience_s if until is None else until
                if now >= until:
                    raise
                waited = True
                on_wait(str(error))
            _sleep(min(random.uniform(0.0, pause), max(0.0, until - time.monotonic())), cancelled)
            pause = min(2 * pause, longest)
    finally:
        if waited:
            on_wait(None)


def _sleep(seconds: float, cancelled: Callable[[], bool]) -> None:
    until, never = time.monotonic() + seconds, threading.Event()
    while (left := until - time.monotonic()) > 0:
        if cancelled():
            raise StaleAttemptError("the transfer was called off")
        never.wait(min(left, _LOOK_S))
