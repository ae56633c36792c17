"""The threads that take jobs from the work queue and make passes over them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from outlast.clock import Clock
from outlast_operator.leadership import NotLeading
from outlast_operator.metrics import Metrics
from outlast_operator.model import Key
from outlast_operator.reconciler import Passed
from outlast_operator.refusals import ApiError, verdict
from outlast_operator.workqueue import LONGEST_BACKOFF_S, Ended, WorkQueue

log = logging.getLogger(__name__)

HUNG_S = 120.0
"""A pass that makes no request for so long hangs: each of its requests has a deadline of seconds."""


class Workers:
    """``reconcile`` is called for one job by one thread at a time."""

    def __init__(
        self, queue: WorkQueue[Key], reconcile: Callable[[Key], Passed], metrics: Metrics, clock: Clock, count: int
    ) -> None:
        self._queue, self._reconcile, self._metrics, self._clock = queue, reconcile, metrics, clock
        self._busy: dict[str, tuple[Key, float]] = {}
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{index}", daemon=True) for index in range(count)
        ]
        self._started = False

    def start(self) -> None:
        self._started = True
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Hand out no more jobs, and wait so long for the passes under way."""
        self._queue.close()
        until = self._clock.monotonic() + timeout_s
        for thread in self._threads if self._started else ():
            thread.join(max(0.0, until - self._clock.monotonic()))

    def ailing(self, now: float) -> Iterator[str]:
        """What is wrong with the threads."""
        for thread in self._threads if self._started else ():
            if not thread.is_alive():
                yield f"{thread.name} has ended"
        for name, (key, since) in list(self._busy.items()):
            if now - since > HUNG_S:
                yield f"{name} has made no request for {key} for {now - since:.0f} s"

    def goes_on(self) -> None:
        """The pass of the calling thread is about to make a request."""
        name = threading.current_thread().name
        if name in self._busy:
            self._busy[name] = (self._busy[name][0], self._clock.monotonic())

    def _work(self) -> None:
        name = threading.current_thread().name
        while (key := self._queue.take()) is not None:
            began = self._clock.monotonic()
            self._busy[name] = (key, began)
            try:
                self._handle(key)
            finally:
                del self._busy[name]
                self._metrics.seconds.observe(self._clock.monotonic() - began)
                self._metrics.reconciles.inc()

    def _handle(self, key: Key) -> None:
        ended, again_in_s, at_least_s = Ended.FAILED, None, 0.0
        try:
            passed = self._reconcile(key)
            ended, again_in_s = Ended.REFUSED if passed.refused else Ended.WELL, passed.again_in_s
            if passed.refused:
                self._metrics.errors.labels("refused").inc()
        except ApiError as error:
            kind = verdict(error).value
            at_least_s = min(error.retry_after_s or 0.0, LONGEST_BACKOFF_S)
            self._metrics.errors.labels(kind).inc()
            log.log(logging.INFO if kind == "behind" else logging.WARNING, "pass-failed job=%s cause=%s", key, error)
        except NotLeading as error:
            self._metrics.errors.labels("not-leading").inc()
            log.warning("pass-ended job=%s cause=%s", key, error)
        except Exception:  # one job that is not understood must not take the other jobs' thread with it
            self._metrics.errors.labels("bug").inc()
            log.exception("pass-broken job=%s", key)
        self._queue.done(key, ended, at_least_s)
        if again_in_s is not None:
            self._queue.add_in(key, again_in_s)
