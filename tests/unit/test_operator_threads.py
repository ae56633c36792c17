"""What runs beside passes: informers' sources, leadership, the threads that take jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException
from kubernetes.leaderelection.leaderelectionrecord import LeaderElectionRecord

from outlast.clock import ManualClock
from outlast_operator.informer import WATCH_S, Informer, Source
from outlast_operator.kinds import MACHINE, POD, Kind
from outlast_operator.leadership import Lock, NotLeading, Terms
from outlast_operator.metrics import Metrics
from outlast_operator.model import Key, Object
from outlast_operator.reconciler import Passed
from outlast_operator.refusals import ApiError
from outlast_operator.store import Store
from outlast_operator.workers import HUNG_S, Workers
from outlast_operator.workqueue import LONGEST_BACKOFF_S, WorkQueue
from support.apiserver import eventually

# --- informers ------------------------------------------------------------------------------------------------------


@dataclass
class FakeWatches:
    """A Cluster whose lists and watches are played from scripts; a watch with nothing left waits until it is closed."""

    pages_of: list[list[dict[str, Any]]]
    watches: list[Any]
    asked: list[tuple[str, str]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def pages(self, kind: Kind, namespace: str | None, selector: str) -> Iterator[dict[str, Any]]:
        self.asked.append(("list", ""))
        pages = self.pages_of.pop(0)
        for items in ([item] for item in pages) if pages else [[]]:
            yield {"metadata": {"resourceVersion": "10"}, "items": items}

    def watch(
        self, kind: Kind, namespace: str | None, selector: str, version: str, lasts_s: int, silent_s: float
    ) -> Any:
        self.asked.append(("watch", version))
        lines = self.watches.pop(0) if self.watches else None
        if isinstance(lines, ApiError):
            raise lines

        def stream(**_: object) -> Iterator[bytes]:
            if lines is None:
                self.over.wait(10)
            yield from lines or ()

        return SimpleNamespace(
            status=200, stream=stream, close=lambda: None, release_conn=lambda: None, connection=None
        )


def pod(name: str, version: int, **status: Any) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": "d",
        "uid": f"u-{name}",
        "resourceVersion": str(version),
        "managedFields": [1],
    }
    return {"metadata": metadata, "status": status}


def line(kind: str, obj: dict[str, Any]) -> bytes:
    import json

    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


@dataclass
class Heard:
    store: Store
    told: list[tuple[str, bool]] = field(default_factory=list)

    def changed(self, kind: Kind, obj: Object) -> None:
        name = obj["metadata"]["name"]
        self.told.append((name, self.store.get(Key("d", name)) is not None))


def informer(cluster: FakeWatches) -> tuple[Informer, Heard]:
    heard = Heard(Store())
    source = Source(cluster, POD, None, "", ManualClock(1000.0), Random(1))  # type: ignore[arg-type]
    return Informer(source, POD, heard.store, heard.changed), heard


def test_an_informer_lists_in_pages_watches_and_resumes_where_it_was() -> None:
    first = [
        line("ADDED", pod("c", 11)),
        line("DELETED", pod("a", 12)),
        line("BOOKMARK", {"metadata": {"resourceVersion": "20"}}),
    ]
    cluster = FakeWatches([[pod("a", 1), pod("b", 2)]], [first])
    kept, heard = informer(cluster)
    kept.start()
    eventually("it watches again", lambda: len(cluster.asked) == 3)
    assert kept.synced
    assert cluster.asked == [("list", ""), ("watch", "10"), ("watch", "20")]
    assert heard.told == [("a", True), ("b", True), ("c", True), ("a", False)], (
        "the store is changed before anybody is told"
    )
    assert sorted(obj["metadata"]["name"] for obj in heard.store.all()) == ["b", "c"]
    assert all("managedFields" not in obj["metadata"] for obj in heard.store.all())
    cluster.over.set()
    kept.stop()


@pytest.mark.parametrize(
    "end",
    [
        ApiError("watch", "pods", 410, "Expired", "too old resource version"),
        ApiError("watch", "pods", 504, "Timeout", "Too large resource version: 99, current: 10"),
        [line("ERROR", {"code": 410, "reason": "Expired", "message": "too old"})] * 2,
    ],
    ids=["expired", "restored from a backup", "expired in the stream"],
)
def test_after_an_expired_watch_everything_is_listed_and_what_is_gone_is_missed_by_nobody(end: Any) -> None:
    ends = [end, end] if isinstance(end, list) else [end]
    cluster = FakeWatches([[pod("a", 1), pod("b", 2)], [pod("b", 2), pod("c", 9)]], ends)
    kept, heard = informer(cluster)
    kept.start()
    eventually(
        "it has listed again", lambda: cluster.asked.count(("list", "")) == 2 and cluster.asked[-1][0] == "watch"
    )
    assert heard.told == [("a", True), ("b", True), ("a", False), ("c", True)], "b is the same as before"
    cluster.over.set()
    kept.stop()


def test_a_source_that_fails_is_asked_ever_more_seldom() -> None:
    waits: list[float] = []
    refused = ApiError("watch", "pods", 0, "NewConnectionError", "refused")
    source = Source(FakeWatches([], [refused] * 12), POD, None, "", ManualClock(1000.0), Random(1))  # type: ignore[arg-type]
    source._leaving = SimpleNamespace(wait=waits.append)  # type: ignore[assignment]
    for _ in range(12):
        with pytest.raises(ApiException):
            source.ask(watch=True, resource_version="1")
    assert len(waits) == 11
    assert waits[1] < 1 < 7 < waits[-1] <= 15


def test_an_informer_that_asks_for_nothing_any_more_is_ailing() -> None:
    clock = ManualClock(1000.0)
    source = Source(FakeWatches([], []), MACHINE, None, "", clock, Random(1))  # type: ignore[arg-type]
    kept = Informer(source, MACHINE, Store(), lambda *_: None)
    assert kept.ailing(clock.monotonic() + WATCH_S) == ""
    assert "nodes has asked for nothing" in kept.ailing(clock.monotonic() + 3 * WATCH_S)


# --- leadership -----------------------------------------------------------------------------------------------------

TERMS = Terms("lease", "ns", "me", lease_s=15, renew_s=8, retry_s=2)


@dataclass
class FakeLease:
    """A Cluster that has one Lease; ``fails`` is raised by every request while it is set."""

    lease: dict[str, Any] | None = None
    fails: ApiError | None = None
    before: Callable[[], object] = lambda: None

    def get(self, kind: Kind, namespace: str, name: str, answer_s: float) -> Mapping[str, Any]:
        self._raise()
        if self.lease is None:
            raise ApiError("get", "Lease lease", 404, "NotFound", "no such Lease")
        return self.lease

    def create(self, kind: Kind, namespace: str, body: dict[str, Any]) -> Mapping[str, Any]:
        return self.update(kind, namespace, "", body)

    def update(
        self, kind: Kind, namespace: str, name: str, body: dict[str, Any], answer_s: float = 10
    ) -> Mapping[str, Any]:
        self._raise()
        self.before()
        self.lease = body
        return body

    def _raise(self) -> None:
        if self.fails is not None:
            raise self.fails


def record(holder: str) -> LeaderElectionRecord:
    return LeaderElectionRecord(holder, "15", "2026-01-01 10:00:00.5", "2026-01-01 10:00:01")


@pytest.fixture
def lost() -> list[str]:
    return []


def lock(cluster: FakeLease, clock: ManualClock, lost: list[str]) -> Lock:
    return Lock(cluster, TERMS, clock, lost.append)  # type: ignore[arg-type]


def test_a_lease_is_good_for_as_long_as_it_lasts_from_before_it_was_asked_for(lost: list[str]) -> None:
    clock, cluster = ManualClock(), FakeLease()
    mine = lock(cluster, clock, lost)
    with pytest.raises(NotLeading):
        mine.check()
    cluster.before = lambda: clock.advance(2.0)  # the answer takes so long
    assert mine.create("lease", "ns", record("me"))
    mine.check()
    clock.advance(9.9)
    mine.check()
    clock.advance(0.2)
    with pytest.raises(NotLeading):
        mine.check()


def test_a_request_without_an_answer_does_not_renew(lost: list[str]) -> None:
    clock, cluster = ManualClock(), FakeLease()
    mine = lock(cluster, clock, lost)
    mine.create("lease", "ns", record("me"))
    cluster.fails = ApiError("get", "Lease lease", 0, "ReadTimeoutError", "no answer")
    clock.advance(10.0)
    assert mine.get("lease", "ns")[0] is False
    assert not mine.update("lease", "ns", record("me"))
    clock.advance(5.0)
    with pytest.raises(NotLeading):
        mine.check()
    assert lost == [], "the election itself says when it gives up"


def test_somebody_elses_name_in_the_lease_ends_leadership_at_once(lost: list[str]) -> None:
    cluster = FakeLease()
    mine = lock(cluster, ManualClock(), lost)
    mine.create("lease", "ns", record("me"))
    assert cluster.lease is not None
    cluster.lease["spec"]["holderIdentity"] = "other"
    mine.get("lease", "ns")
    assert lost == ["other has taken the Lease ns/lease"]


def test_a_wall_clock_that_jumps_takes_no_lease_from_a_leader_that_renews(lost: list[str]) -> None:
    """The election believes that the lease is over, and asks for it."""
    clock, cluster = ManualClock(), FakeLease()
    others = lock(cluster, clock, lost)
    others.identity = "other"
    others.create("lease", "ns", record("other"))
    mine = lock(cluster, clock, lost)
    mine.get("lease", "ns")
    clock.advance(10.0)
    assert not mine.update("lease", "ns", record("me"))
    others.update("lease", "ns", LeaderElectionRecord("other", "15", "2026-01-01 10:00:00", "2026-01-01 10:00:10"))
    mine.get("lease", "ns")
    clock.advance(14.9)
    assert not mine.update("lease", "ns", record("me"))
    clock.advance(0.2)
    assert mine.update("lease", "ns", record("me"))


def test_a_released_lease_is_nobodys_and_is_not_renewed_any_more(lost: list[str]) -> None:
    cluster = FakeLease()
    mine = lock(cluster, ManualClock(), lost)
    mine.create("lease", "ns", record("me"))
    mine.release()
    assert cluster.lease is not None
    assert cluster.lease["spec"]["holderIdentity"] == ""
    assert not mine.update("lease", "ns", record("me"))
    with pytest.raises(NotLeading):
        mine.check()
    known, found = mine.get("lease", "ns")
    assert known
    assert isinstance(found, LeaderElectionRecord)
    assert found.holder_identity is None
    assert lost == []


def test_times_in_the_lease_are_utc_whatever_they_were_read_as(lost: list[str]) -> None:
    cluster = FakeLease()
    mine = lock(cluster, ManualClock(), lost)
    mine.create("lease", "ns", LeaderElectionRecord("me", "15", "2026-01-01T10:00:00.5Z", "2026-01-01T12:00:01+02:00"))
    assert cluster.lease is not None
    spec = cluster.lease["spec"]
    assert (spec["acquireTime"], spec["renewTime"]) == ("2026-01-01T10:00:00.500000Z", "2026-01-01T10:00:01.000000Z")


# --- workers --------------------------------------------------------------------------------------------------------


class Passes:
    """Passes that do what they are told, by job."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.go, self.beat = threading.Event(), threading.Event()
        self.request: Callable[[], None] = lambda: None

    def __call__(self, key: Key) -> Passed:
        self.done.append(key.name)
        if key.name == "takes-long":
            self.beat.wait(10)
            self.request()
        if key.name in ("hangs", "takes-long"):
            self.go.wait(10)
        if key.name == "broken" and self.done.count("broken") == 1:
            raise KeyError("a bug")
        if key.name == "not-ours":
            raise NotLeading("somebody else leads")
        if key.name == "put-off":
            raise ApiError("create", "Pod x", 429, "TooManyRequests", "tomorrow", retry_after_s=86400.0)
        if key.name == "throttled" and self.done.count("throttled") == 1:
            raise ApiError("create", "Pod x", 429, "TooManyRequests", "later", retry_after_s=0.0)
        return Passed()


@pytest.fixture
def running() -> Iterator[tuple[WorkQueue[Key], Passes, Workers, Metrics, ManualClock]]:
    clock, passes, metrics = ManualClock(), Passes(), Metrics()
    queue: WorkQueue[Key] = WorkQueue(_Quick(), Random(1))
    workers = Workers(queue, passes, metrics, clock, 2)
    passes.request = workers.goes_on
    workers.start()
    yield queue, passes, workers, metrics, clock
    passes.go.set()
    workers.stop(5)


class _Quick(ManualClock):
    """A clock on which a second takes a hundredth."""

    def monotonic(self) -> float:
        import time

        return time.monotonic() * 100


def test_a_broken_pass_is_counted_repeated_and_stops_nobody_else(
    running: tuple[WorkQueue[Key], Passes, Workers, Metrics, ManualClock],
) -> None:
    queue, passes, workers, metrics, clock = running
    for name in ("broken", "throttled", "not-ours", "fine"):
        queue.add(Key("d", name))
    eventually("both are repeated", lambda: passes.done.count("broken") == 2 and passes.done.count("throttled") == 2)
    assert "fine" in passes.done
    assert list(workers.ailing(clock.monotonic())) == []
    errors = {
        kind: metrics.registry.get_sample_value("outlast_operator_errors_total", {"kind": kind})
        for kind in ("bug", "retry")
    }
    assert errors == {"bug": 1, "retry": 1}


def test_nobody_is_put_off_for_longer_than_a_back_off(
    running: tuple[WorkQueue[Key], Passes, Workers, Metrics, ManualClock],
) -> None:
    queue, _, _, _, _ = running
    queue.add(Key("d", "put-off"))
    due = eventually("it is to be tried again", queue._backlog.next_due)
    assert due <= _Quick().monotonic() + LONGEST_BACKOFF_S


def test_a_pass_that_hangs_is_told(running: tuple[WorkQueue[Key], Passes, Workers, Metrics, ManualClock]) -> None:
    queue, passes, workers, _, clock = running
    queue.add(Key("d", "hangs"))
    eventually("it hangs", lambda: "hangs" in passes.done)
    assert list(workers.ailing(clock.monotonic() + HUNG_S - 1)) == []
    (told,) = workers.ailing(clock.monotonic() + HUNG_S + 1)
    assert "no request for d/hangs" in told


def test_a_long_pass_that_makes_requests_does_not_hang(
    running: tuple[WorkQueue[Key], Passes, Workers, Metrics, ManualClock],
) -> None:
    queue, passes, workers, _, clock = running
    queue.add(Key("d", "takes-long"))
    eventually("it is handled", lambda: "takes-long" in passes.done)
    clock.advance(HUNG_S - 1)
    passes.beat.set()
    eventually("it has made a request", lambda: not list(workers.ailing(clock.monotonic() + 10)))


def test_threads_that_have_ended_are_told(
    running: tuple[WorkQueue[Key], Passes, Workers, Metrics, ManualClock],
) -> None:
    _, _, workers, _, clock = running
    workers.stop(5)
    assert list(workers.ailing(clock.monotonic())) == ["worker-0 has ended", "worker-1 has ended"]
