"""Kubernetes Events about jobs: what `kubectl describe` shows.

What is said again within ``AGAIN_S`` raises the count of the Event that there is, at most every ``REPEAT_S``; a job
that has much to say is cut off by a token bucket. Written by one thread, so that no pass waits for it; what it cannot
write is dropped and counted, since everything that must be known is in the status.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from outlast.clock import Clock
from outlast_operator.cluster import Cluster
from outlast_operator.kinds import EVENT, JOB
from outlast_operator.model import Happening, Key, Object
from outlast_operator.refusals import ApiError
from outlast_operator.store import key_of

log = logging.getLogger(__name__)

AGAIN_S, REPEAT_S = 600.0, 30.0
BURST, EVERY_S = 25.0, 10.0
"""Events of one job at once, and one more every so many seconds."""
MOST_WAITING = 10_000
MOST_KNOWN_A_JOB = 64
LONGEST_MESSAGE = 1024
"""The API server's limit for an Event's message."""


@dataclass
class _Told:
    """An Event that there is: ``count`` as it was written last."""

    name: str
    count: int
    first: float
    written: float
    last: float


@dataclass(frozen=True)
class Line:
    """One write: a new Event (``count`` 1), or the count of one that there is."""

    job: Object
    happening: Happening
    name: str
    count: int
    first: float
    last: float


class Digest:
    """What of one job's happenings is written (pure; wall seconds)."""

    def __init__(self) -> None:
        self._told: OrderedDict[Happening, _Told] = OrderedDict()
        self._tokens, self._filled_at = BURST, 0.0

    def line(self, job: Object, happening: Happening, now: float) -> Line | None:
        """The write that ``happening`` needs; None when it needs none, or has too many before it."""
        told = self._told.get(happening)
        if told is not None and now - told.last < AGAIN_S:
            told.count, told.last = told.count + 1, now
            if now - told.written < REPEAT_S or not self._may(now):
                return None
            told.written = now
        elif self._may(now):
            name = f"{job['metadata']['name']}.{int(now * 1e6):x}.{len(self._told):x}"
            told = self._told[happening] = _Told(name, 1, now, now, now)
            self._told.move_to_end(happening)
            while len(self._told) > MOST_KNOWN_A_JOB:
                self._told.popitem(last=False)
        else:
            return None
        return Line(job, happening, told.name, told.count, told.first, told.last)

    def _may(self, now: float) -> bool:
        self._tokens = min(BURST, self._tokens + (now - self._filled_at) / EVERY_S)
        self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Events:
    """Of all jobs. ``dropped`` is told of each that was not written."""

    def __init__(self, cluster: Cluster, clock: Clock, identity: str, dropped: Callable[[], None]) -> None:
        self._cluster, self._clock, self._identity, self._dropped = cluster, clock, identity, dropped
        self._digests: dict[Key, tuple[str, Digest]] = {}  # with the uid of the job that it is of
        self._lines: queue.Queue[Line | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Writes what waits, for so long at most."""
        if self._thread.is_alive():
            self._lines.put(None)
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def tell(self, job: Object, happenings: Sequence[Happening]) -> None:
        """Events about ``job``, soon."""
        key, uid = key_of(job), job["metadata"]["uid"]
        if self._digests.get(key, ("", None))[0] != uid:
            self._digests[key] = (uid, Digest())
        digest = self._digests[key][1]
        for happening in happenings:
            line = digest.line(job, happening, self._clock.wall())
            if line is None:
                continue
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self._dropped()

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self._digests.pop(key, None)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except ApiError as error:
                self._dropped()
                log.warning("event-dropped job=%s cause=%s", key_of(line.job), error)

    def _write(self, line: Line) -> None:
        namespace = line.job["metadata"]["namespace"]
        if line.count > 1:
            change = {"count": line.count, "lastTimestamp": _text(line.last)}
            self._cluster.patch(EVENT, namespace, line.name, change)
            return
        self._cluster.create(EVENT, namespace, event(line, self._identity))


def event(line: Line, identity: str) -> Object:
    """The Event object (core/v1, as kubectl and every dashboard read it)."""
    metadata = line.job["metadata"]
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.name,
        "metadata": {"name": line.name, "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": JOB.api_version,
            "kind": JOB.name,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
        "type": line.happening.type,
        "reason": line.happening.reason,
        "message": line.happening.message[:LONGEST_MESSAGE],
        "count": line.count,
        "firstTimestamp": _text(line.first),
        "lastTimestamp": _text(line.last),
        "source": {"component": "outlast-operator"},
        "reportingComponent": "outlast-operator",
        "reportingInstance": identity[:128],
    }


def _text(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
