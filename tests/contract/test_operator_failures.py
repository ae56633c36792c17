"""An operator, its API server and the way between them that fail: the same end state, and no Pod made twice."""

from __future__ import annotations

import pathlib
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from outlast_operator.kinds import BUDGET, JOB, LEASE, POLICY, SECRET, SERVICE
from support.apiserver import ApiServer, eventually
from support.operators import World, world
from support.stores import Proxy

pytestmark = pytest.mark.timeout(180)

FULL = ("head-0", "node-1", "node-2", "node-3")


@pytest.fixture
def way(api: ApiServer) -> Iterator[Proxy]:
    """Connections to the API server that can be cut and stalled."""
    proxy = Proxy(api.url)
    yield proxy
    proxy.close()


def through(api: ApiServer, way: Proxy) -> str:
    """A kubeconfig that leads through ``way``."""
    return api.write_kubeconfig(f"way-{id(way)}", "admin-token", way.url.replace("http:", "https:"))


def settled(place: World, next_pod: int) -> None:
    """Until the status knows of every Pod that was ever made: one made twice would have taken an index more."""
    eventually(f"nextPod is {next_pod}", lambda: place.status().get("nextPod") == next_pod or None)


# --- the operator ---------------------------------------------------------------------------------------------------

WRITES = (
    "Secret",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Service",
    "head",
    "node",
    "node",
    "node",
    "status",
    "event",
)
"""What the operator writes for a new job, in no promised order."""


def _killed_after(api: ApiServer, folder: pathlib.Path, writes: int) -> None:
    """Kill the operator just after so many writes, start it again, and look for what a whole pass leaves."""
    with world(api, folder) as place:
        place.submit()
        killed = place.start("first", die_after=writes, lease_s=5, plan="real")
        assert killed.ended(40) == -signal.SIGKILL
        place.start("first", lease_s=5, plan="real")  # its own Lease: it need not wait for the end of it
        place.wait_for_pods(*FULL, within_s=40)
        settled(place, 4)
        eventually("the Service selects the head", lambda: _selected(place) == "job-head-0")
        for kind, name in ((SECRET, "job-outlast"), (POLICY, "job"), (BUDGET, "job")):
            place.cluster.get(kind, place.namespace, name)


def _selected(place: World) -> str:
    return str(place.cluster.get(SERVICE, place.namespace, "job-head")["spec"]["selector"]["outlast.dev/pod"])


def test_killed_after_any_write_and_started_again_it_comes_to_the_same_end(
    api: ApiServer, tmp_path: pathlib.Path
) -> None:
    with ThreadPoolExecutor(5) as pool:
        runs = [pool.submit(_killed_after, api, tmp_path, writes) for writes in range(1, len(WRITES) + 1)]
    for run in runs:
        run.result()


def test_when_the_leader_is_killed_the_other_takes_over(place: World) -> None:
    first = place.start("first", lease_s=5)
    first.acting()
    second = place.start("second", lease_s=5)
    second.ready()
    place.submit()
    place.wait_for_pods(*FULL)
    assert place.holder() == "first"
    first.signal(signal.SIGKILL)
    began = time.monotonic()
    place.delete_pod("job-node-2")
    place.wait_for_pods("head-0", "node-1", "node-3", "node-4", within_s=20)
    assert time.monotonic() - began < 5 + 1 + 1 + 4
    assert place.holder() == "second"
    settled(place, 5)


def test_a_leader_that_is_told_to_end_hands_over_within_seconds(place: World) -> None:
    first = place.start("first")
    first.acting()
    second = place.start("second")
    second.ready()
    place.submit()
    place.wait_for_pods(*FULL)
    first.signal(signal.SIGTERM)
    began = time.monotonic()
    eventually("the other leads", lambda: place.holder() == "second", 8)
    place.delete_pod("job-node-1")
    place.wait_for_pods("head-0", "node-2", "node-3", "node-4", within_s=8)
    assert time.monotonic() - began < 10
    assert first.ended() == 0
    assert (first.log() + second.log()).count("created job=") == 5


def test_a_leader_that_was_stopped_writes_nothing_when_it_wakes(place: World) -> None:
    first = place.start("first", lease_s=5)
    first.acting()
    second = place.start("second", lease_s=5)
    second.ready()
    first.signal(signal.SIGSTOP)
    place.submit()
    place.wait_for_pods(*FULL)
    first.signal(signal.SIGCONT)
    assert first.ended() == 1
    assert "leadership-lost" in first.log()
    assert "created" not in first.log()
    place.wait_for_pods(*FULL)


def test_a_leader_whose_lease_somebody_took_ends_at_once(place: World) -> None:
    operator = place.start()
    operator.acting()
    place.cluster.patch(LEASE, place.namespace, "outlast-operator", {"spec": {"holderIdentity": "somebody"}})
    assert operator.ended(5) == 1
    assert "somebody has taken the Lease" in operator.log()


def test_a_leader_that_cannot_renew_ends_before_its_lease_does(place: World, way: Proxy) -> None:
    operator = place.start(kubeconfig=through(place.api, way), lease_s=6)
    operator.acting()
    began = time.monotonic()
    way.mode = "stall"
    assert operator.ended(20) == 1
    assert time.monotonic() - began < 12
    assert "was not renewed" in operator.log()


# --- the API server -------------------------------------------------------------------------------------------------


def test_a_watch_that_has_expired_misses_nothing(place: World, way: Proxy) -> None:
    """Its connection is stalled while Pods and jobs come and go, etcd forgets and the API server starts anew."""
    operator = place.start(kubeconfig=through(place.api, way), lease_s=60)
    place.submit()
    place.submit("other")
    place.wait_for_pods(*FULL)
    place.wait_for_pods(*FULL, job="other")
    settled(place, 4)
    way.mode = "stall"
    place.delete_pod("job-node-2")
    place.delete_pod("job-head-0")
    place.submit("late")
    other = place.job("other")
    place.cluster.delete(JOB, place.namespace, "other", other["metadata"]["uid"], None)
    for number in range(200):  # beyond what the API server's own memory of events may hold
        place.cluster.patch(JOB, place.namespace, "late", {"metadata": {"labels": {"n": str(number)}}})
    place.api.stop_server()
    place.api.start_server()
    place.api.compact()
    way.mode = "pass"
    place.wait_for_pods("head-4", "node-1", "node-3", "node-5", within_s=40)
    place.wait_for_pods(*FULL, job="late", within_s=20)
    eventually("the deleted job is not known", lambda: _jobs(operator.metrics()) == 2)
    assert "(410)" in operator.log()
    settled(place, 6)


def _jobs(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("outlast_operator_jobs{"))


def test_the_api_server_starts_anew_under_a_running_operator(place: World) -> None:
    operator = place.start(lease_s=30)
    operator.acting()
    place.api.stop_server(hard=True)
    before = _cpu_seconds(operator.pid)
    time.sleep(4)
    assert _cpu_seconds(operator.pid) - before < 1.0, (
        "an API server that refuses connections is not asked again at once"
    )
    place.api.start_server()
    place.submit()
    place.wait_for_pods(*FULL, within_s=30)
    assert operator.process.poll() is None
    assert operator.log().count("Traceback") == 0
    settled(place, 4)


def _cpu_seconds(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
