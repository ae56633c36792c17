"""One thread that does everything in turn: what others post to it, and what is due.

State that only this thread touches needs no locks. What would block is given to a worker, whose result comes back as
one more thing to do. An exception in anything posted is a bug: the thread ends with it, and ``on_end`` is told.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from outlast.clock import Clock
from outlast.errors import OutlastError

T = TypeVar("T")
WORKERS = 32


class Reactor:
    """``post`` and ``work`` may be called from any thread, ``after`` from what runs on the reactor's own."""

    def __init__(self, clock: Clock, on_end: Callable[[], None]) -> None:
        self._clock, self._on_end = clock, on_end
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="outlast-agent-worker")
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="outlast-agent", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, task: Callable[[], object]) -> None:
        """Have ``task`` done soon, after what was posted before."""
        self._inbox.put(task)

    def after(self, seconds: float, task: Callable[[], None]) -> None:
        """Have ``task`` done in ``seconds``."""
        heapq.heappush(self._timers, (self._clock.monotonic() + seconds, next(self._order), task))

    def work(self, job: Callable[[], T], then: Callable[[T | OutlastError], None]) -> None:
        """Run ``job`` in a worker; its result, or the OutlastError that it raised, goes to ``then`` on this thread."""

        def attempt() -> T | OutlastError:
            try:
                return job()
            except OutlastError as error:
                return error

        future = self._workers.submit(attempt)
        future.add_done_callback(lambda done: self.post(lambda: then(done.result())))

    def end(self) -> None:
        """Do nothing any more. Workers' results are dropped."""
        self._ended = True
        self._inbox.put(lambda: None)
        self._workers.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run(self) -> None:
        try:
            while not self._ended:
                self._turn()
        finally:
            if not self._ended:
                self._on_end()

    def _turn(self) -> None:
        now = self._clock.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        wait = max(self._timers[0][0] - self._clock.monotonic(), 0.0) if self._timers else None
        try:
            task = self._inbox.get(timeout=wait)
        except queue.Empty:
            return
        if not self._ended:
            task()
