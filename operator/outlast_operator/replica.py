"""One replica of the operator: caches that are always kept, and what only the leader does.

::

    informers -> Caches -> WorkQueue -> Workers -> Reconciler -> Applier -> API server
                                                       '-> Poller -> jobs' controllers

A follower keeps its caches alone; when it wins it makes sure that its cache of Pods is not behind what the
leader before it has made, starts the workers and looks at every job.
"""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from outlast.clock import Clock
from outlast.kube import MANAGED_BY, MANAGED_BY_LABEL
from outlast_operator.applying import Applier
from outlast_operator.caches import Caches, job_of
from outlast_operator.cluster import Cluster
from outlast_operator.events import Events
from outlast_operator.expectations import Expectations
from outlast_operator.informer import Informer, Source
from outlast_operator.kinds import CACHED, POD, Kind
from outlast_operator.leadership import Election, Terms
from outlast_operator.metrics import Gauges, Metrics
from outlast_operator.model import Key, Object, Settings
from outlast_operator.poller import Poller, PollSettings
from outlast_operator.reconciler import Decide, Reconciler
from outlast_operator.refusals import ApiError
from outlast_operator.store import key_of
from outlast_operator.workers import Workers
from outlast_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

OURS = f"{MANAGED_BY_LABEL}={MANAGED_BY}"
NAMES_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


def own_identity() -> str:
    """Tells this process from every other, also from one before it in the same Pod."""
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Options:
    """What the command line says. ``namespaces``: whose jobs are looked after; none: all."""

    settings: Settings
    terms: Terms
    namespaces: tuple[str, ...] = ()
    workers: int = 4
    poll: PollSettings = field(default_factory=PollSettings)


class Replica:
    """``fail`` is called, with the reason, when leadership has ended: it must end the process at once."""

    def __init__(
        self,
        options: Options,
        cluster: Cluster,
        metrics: Metrics,
        decide: Decide,
        clock: Clock,
        chance: Random,
        fail: Callable[[str], None],
    ) -> None:
        self._options, self._cluster, self._clock, self._chance = options, cluster, clock, chance
        self._queue: WorkQueue[Key] = WorkQueue(clock, chance)
        self._caches = Caches(touched=self._touched, renewed=self._renewed)
        self._election = Election(cluster, options.terms, clock, self._lead, fail)
        self._events = Events(cluster, clock, options.terms.identity, metrics.events_dropped.inc)
        self._poller = Poller(options.poll, self._queue.add, self._progressed, clock, chance, metrics.polled)
        self._expectations = Expectations()
        self._informers = list(self._make_informers())
        self._reconciler = self._make_reconciler(decide)
        self._workers = Workers(self._queue, self._reconciler.reconcile, metrics, clock, options.workers)
        self._stopping, self._acting = threading.Event(), threading.Event()
        metrics.read_from(self._gauges(), self._caches.jobs)

    def start(self) -> None:
        """Fill the caches and run for leader, in the background."""
        for informer in self._informers:
            informer.start()
        self._election.start()

    def stop(self) -> None:
        """End what is under way, then let another one lead."""
        self._stopping.set()
        self._workers.stop(timeout_s=10.0)
        self._poller.stop()
        self._events.stop()
        self._election.release()

    def unsynced(self) -> list[str]:
        """The caches that are not filled yet."""
        return [f"{informer.name} are not listed yet" for informer in self._informers if not informer.synced]

    def ailing(self) -> list[str]:
        """What is wrong with the threads."""
        return list(self._ailing())

    @property
    def leads(self) -> bool:
        """Whether this operator holds the Lease."""
        return self._election.lock.held

    def _ailing(self) -> Iterator[str]:
        now = self._clock.monotonic()
        yield from (wrong for informer in self._informers if (wrong := informer.ailing(now)))
        yield from self._workers.ailing(now)
        if not self._election.alive:
            yield "the election has ended"
        if self._acting.is_set():
            yield from (
                f"the thread of {name} has ended"
                for name, part in (("events", self._events), ("poller", self._poller))
                if not part.alive
            )

    def _lead(self) -> None:
        """On the election's second thread: begin to act once nothing is behind."""
        log.info("leading identity=%s", self._options.terms.identity)
        if not self._wait_for(lambda: not self.unsynced()) or not self._wait_for(self._has_all_pods):
            return
        self._events.start()
        self._poller.start()
        self._acting.set()
        for job in self._caches.jobs():
            self._queue.add(key_of(job))
        self._workers.start()
        log.info("acting jobs=%d pods=%d", len(self._caches.jobs()), len(self._caches.stores[POD]))

    def _wait_for(self, reached: Callable[[], bool]) -> bool:
        """Poll until it is so; False when the operator ends before. Leadership lost meanwhile ends the process."""
        while not reached():
            if self._stopping.wait(0.2):
                return False
        return True

    def _has_all_pods(self) -> bool:
        """Whether the cache has every Pod that there is now: what the leader before made last may not have arrived."""
        held = {pod["metadata"]["uid"] for pod in self._caches.stores[POD].all()}
        try:
            for namespace in self._options.namespaces or (None,):
                for page in self._cluster.pages(POD, namespace, OURS, NAMES_ONLY):
                    if any(item["metadata"]["uid"] not in held for item in page["items"] or ()):
                        return False
        except ApiError as error:
            log.warning("cannot-list-pods cause=%s", error)
            return False
        return True

    def _touched(self, key: Key) -> None:
        """Whoever does not act yet queues nothing: ``_lead`` adds every job."""
        if self._acting.is_set():
            self._queue.add(key)

    def _renewed(self, key: Key) -> None:
        if self._acting.is_set():
            self._queue.renew(key)

    def _changed(self, kind: Kind, obj: Object) -> None:
        """An informer's store has changed."""
        job = job_of(obj)
        if kind is POD and job is not None:
            self._expectations.seen(job, obj["metadata"]["name"])
        self._caches.changed(kind, obj)

    def _progressed(self, key: Key) -> None:
        self._queue.add_in(key, self._reconciler.progress_due_in_s(key))

    def _make_informers(self) -> Iterator[Informer]:
        for kind in CACHED:
            for namespace in (self._options.namespaces if kind.namespaced else ()) or (None,):
                selector = OURS if kind.ours else ""
                source = Source(self._cluster, kind, namespace, selector, self._clock, self._chance)
                yield Informer(source, kind, self._caches.stores[kind], self._changed)

    def _make_reconciler(self, decide: Decide) -> Reconciler:
        cluster, caches, expectations = self._cluster, self._caches, self._expectations
        applier = Applier(cluster, caches, expectations, self._poller, self._clock, self._may_write)
        every_s = self._options.settings.progress_every_s
        return Reconciler(
            caches,
            cluster,
            expectations,
            self._poller,
            applier,
            self._events,
            decide,
            self._clock,
            self._chance,
            every_s,
        )

    def _may_write(self) -> None:
        self._election.lock.check()
        self._workers.goes_on()

    def _gauges(self) -> Gauges:
        pods = self._caches.stores[POD]
        return {
            "leader": ("1 where this operator leads.", lambda: float(self.leads)),
            "queue_depth": ("Jobs that wait for a pass.", lambda: float(self._queue.depth())),
            "queue_oldest_seconds": ("How long the first of them has waited.", self._queue.oldest),
            "pods": ("Pods in the cache.", lambda: float(len(pods))),
            "controllers": ("Jobs whose controllers are asked.", lambda: float(self._poller.following)),
            "caches_synced": ("1 once all caches are filled.", lambda: float(not self.unsynced())),
        }
