"""Which of several operators acts: the official client's leader election over a Lease, and what it leaves open.

``LeaderElection`` (kubernetes 37.0.1) acquires and renews; it is given a lock of our own, which is what its interface
is for, because of what its ``LeaseLock`` and its loop do not do:

- a request to the API server may last for ever, past the end of the lease; a connection that is refused ends the whole
  election with an exception. Here each request has a deadline, and one without an answer counts as not renewed.
- after somebody else has taken the Lease, it goes on trying for the whole renew deadline while both act. Here
  leadership ends at once.
- nothing tells those who act that the lease has run out while the thread that renews it was stuck or the process was
  stopped. Here ``check`` is asked before every write.
- it measures others' leases by the wall clock, so that one that jumps forward takes a Lease from a leader that renews.
  Here ``update`` measures them again, by the monotonic clock.
- a leader that ends does not release the Lease. Here ``release`` does, and the other takes over at its next look.

Leadership ends once and for good: ``lost`` is called, and the process ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubernetes.client.exceptions import ApiException
from kubernetes.leaderelection.electionconfig import Config
from kubernetes.leaderelection.leaderelection import LeaderElection
from kubernetes.leaderelection.leaderelectionrecord import LeaderElectionRecord

from outlast.clock import Clock
from outlast.errors import OutlastError
from outlast_operator.cluster import Cluster
from outlast_operator.kinds import LEASE
from outlast_operator.refusals import ApiError

log = logging.getLogger(__name__)
logging.getLogger("leaderelection").setLevel(logging.WARNING)


MARGIN_S = 3.0
"""No write begins so shortly before the lease ends: it must have arrived by then."""


class NotLeading(OutlastError):
    """This operator must not write: it does not lead, or can no longer be sure that it does."""


@dataclass(frozen=True)
class Terms:
    """``lease_s``: others wait so long after the last renewal that they have seen; ``renew_s``: the leader gives up
    when it could not renew for so long; ``retry_s``: between two looks."""

    name: str
    namespace: str
    identity: str
    lease_s: int = 15
    renew_s: int = 8
    retry_s: int = 2

    @property
    def answer_s(self) -> float:
        """How long a request may take: a renewal that began in time has ended before the lease does."""
        return float(max(1, (self.lease_s - self.renew_s) // 2))


class Lock:
    """The Lease, as ``LeaderElection`` wants one: ``get``, ``create``, ``update`` and the two names."""

    def __init__(self, cluster: Cluster, terms: Terms, clock: Clock, lost: Callable[[str], None]) -> None:
        self.name, self.namespace, self.identity = terms.name, terms.namespace, terms.identity
        self._cluster, self._terms, self._clock, self._lost = cluster, terms, clock, lost
        self._lease: dict[str, Any] = {}
        self._seen: tuple[Any, float] = (None, 0.0)
        """The Lease's spec when it differed last from the one before, and when that was."""
        self._held_from: float | None = None
        self._released = False
        self._mutex = threading.Lock()

    def check(self) -> None:
        """Raises NotLeading unless the lease is held for certain, by this machine's clock."""
        since = self._held_from
        if since is None or self._released or self._clock.monotonic() - since > self._terms.lease_s - MARGIN_S:
            raise NotLeading(f"{self.identity} does not hold the Lease {self.namespace}/{self.name}")

    @property
    def held(self) -> bool:
        """Whether this operator leads."""
        return self._held_from is not None and not self._released

    def get(self, name: str, namespace: str) -> tuple[bool, LeaderElectionRecord | ApiException]:
        """(True, who leads) or (False, why that is not known)."""
        try:
            self._lease = dict(self._cluster.get(LEASE, namespace, name, self._terms.answer_s))
        except ApiError as error:
            missing = error.status == 404
            if not missing:
                log.warning("lease-not-read lease=%s/%s cause=%s", namespace, name, error)
            answer = ApiException(status=error.status, reason=str(error))
            answer.body = '{"code": 404}' if missing else ""
            return False, answer
        spec = self._lease.get("spec") or {}
        if spec != self._seen[0]:
            self._seen = (spec, self._clock.monotonic())
        record = _record(spec)
        if self._held_from is not None and record.holder_identity != self.identity and not self._released:
            self._lost(f"{record.holder_identity or 'somebody'} has taken the Lease {namespace}/{name}")
        return True, record

    def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """Whether there was no Lease and this operator holds it now."""
        lease = {"apiVersion": LEASE.api_version, "kind": LEASE.name, "metadata": {"name": name}}
        return self._write(lambda body: self._cluster.create(LEASE, namespace, body), lease, election_record)

    def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        """Whether nobody else wrote it since it was read and this operator holds it now."""
        if self._is_anothers():
            return False
        answer_s = self._terms.answer_s
        return self._write(
            lambda body: self._cluster.update(LEASE, namespace, name, body, answer_s), self._lease, updated_record
        )

    def _is_anothers(self) -> bool:
        """Whether somebody else has renewed it, as seen from here, within its own length."""
        spec, since = self._seen
        holder = (spec or {}).get("holderIdentity") or ""
        lasts_s = float((spec or {}).get("leaseDurationSeconds") or 0)
        return holder not in ("", self.identity) and self._clock.monotonic() - since < lasts_s

    def release(self) -> None:
        """Let the next one take over at once. The election's own thread renews nothing any more."""
        with self._mutex:
            if self._held_from is None or self._released:
                return
            self._released = True
            spec = {**self._lease.get("spec", {}), "holderIdentity": "", "leaseDurationSeconds": 1}
            try:
                self._cluster.update(LEASE, self.namespace, self.name, {**self._lease, "spec": spec})
                log.info("released lease=%s/%s identity=%s", self.namespace, self.name, self.identity)
            except ApiError as error:
                log.warning("not-released lease=%s/%s cause=%s", self.namespace, self.name, error)

    def _write(
        self,
        send: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        lease: Mapping[str, Any],
        record: LeaderElectionRecord,
    ) -> bool:
        with self._mutex:
            if self._released:
                return False
            began = self._clock.monotonic()
            try:
                self._lease = dict(send({**lease, "spec": {**lease.get("spec", {}), **_spec(record)}}))
            except ApiError as error:
                log.warning("not-renewed lease=%s/%s cause=%s", self.namespace, self.name, error)
                return False
            self._held_from = began
            return True


class Election:
    """Runs for leader on a thread of its own: ``won`` is called once, ``lost`` when leadership has ended."""

    def __init__(
        self, cluster: Cluster, terms: Terms, clock: Clock, won: Callable[[], None], lost: Callable[[str], None]
    ) -> None:
        self._ended = threading.Event()
        self._on_lost = lost
        self.lock = Lock(cluster, terms, clock, self._lost)
        config = Config(
            lock=self.lock,
            lease_duration=terms.lease_s,
            renew_deadline=terms.renew_s,
            retry_period=terms.retry_s,
            onstarted_leading=won,
            onstopped_leading=lambda: self._lost(
                f"the Lease was not renewed for {terms.renew_s} s, or what a leader does has failed"
            ),
        )
        self._election = LeaderElection(config)
        self._thread = threading.Thread(target=self._election.run, name="election", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def release(self) -> None:
        """Give the Lease back, if it is held; ``lost`` is not called."""
        self._ended.set()
        self.lock.release()

    def _lost(self, why: str) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._on_lost(why)


def _record(spec: Mapping[str, Any]) -> LeaderElectionRecord:
    duration = spec.get("leaseDurationSeconds")
    return LeaderElectionRecord(
        spec.get("holderIdentity") or None,
        None if duration is None else str(duration),
        spec.get("acquireTime"),
        spec.get("renewTime"),
    )


def _spec(record: LeaderElectionRecord) -> dict[str, Any]:
    """The election's times are local and naive, the Lease's are UTC; an acquire time that was read is kept."""
    return {
        "holderIdentity": record.holder_identity,
        "leaseDurationSeconds": int(record.lease_duration),
        "acquireTime": _utc(record.acquire_time),
        "renewTime": _utc(record.renew_time),
    }


def _utc(text: str) -> str:
    found = datetime.fromisoformat(text)
    return found.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
