"""What a job's passes have written and the caches have not shown yet: until they do, no further pass is made.

A pass on a cache that lacks the Pods of the pass before would make them twice. A Pod is seen when the store has it or
an event told of it (it may be gone again at once); the resource is when the store has the written version or a later
one. What is not seen within ``patience_s`` is asked for at the API server: a Pod that is not there was made and deleted
between two watches; one that is there shows that the cache is behind, and is waited for on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from outlast_operator.model import Key


@dataclass
class _Awaited:
    pods: set[str] = field(default_factory=set)
    version: int = 0
    since: float = 0.0


@dataclass(frozen=True)
class Outstanding:
    """``pods`` that have not been seen, ``overdue`` when it is time to ask for them."""

    pods: frozenset[str]
    overdue: bool


class Expectations:
    """Of all jobs; safe to use from several threads. Times are monotonic seconds."""

    def __init__(self, patience_s: float = 10.0) -> None:
        self._patience_s = patience_s
        self._awaited: dict[Key, _Awaited] = {}
        self._lock = threading.Lock()

    def created(self, job: Key, pod: str, now: float) -> None:
        """A Pod is about to be made: said before it is asked for, so that its event cannot come first."""
        with self._lock:
            awaited = self._awaited.setdefault(job, _Awaited())
            awaited.pods.add(pod)
            awaited.since = now

    def wrote(self, job: Key, version: int, now: float) -> None:
        """The resource was written and has this version now."""
        with self._lock:
            awaited = self._awaited.setdefault(job, _Awaited())
            awaited.version, awaited.since = max(awaited.version, version), now

    def seen(self, job: Key, pod: str) -> None:
        """The cache has learnt of the Pod, or it was not made after all."""
        with self._lock:
            awaited = self._awaited.get(job)
            if awaited is not None:
                awaited.pods.discard(pod)

    def forget(self, job: Key) -> None:
        """The job is gone."""
        with self._lock:
            self._awaited.pop(job, None)

    def outstanding(self, job: Key, version: int, has_pod: Callable[[str], bool], now: float) -> Outstanding | None:
        """What is not seen yet, None when nothing is; ``version``: the resource's in the cache."""
        with self._lock:
            awaited = self._awaited.get(job)
            if awaited is None:
                return None
            awaited.pods = {pod for pod in awaited.pods if not has_pod(pod)}
            if not awaited.pods and awaited.version <= version:
                del self._awaited[job]
                return None
            overdue = now - awaited.since >= self._patience_s
            if overdue:
                awaited.since = now
                awaited.version = 0  # a write with an outdated version is refused by the API server: nothing is lost
            return Outstanding(frozenset(awaited.pods), overdue)
