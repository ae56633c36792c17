"""Passes against a real API server: Pods made, seen, replaced; controllers asked; statuses written; refusals told."""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from outlast.clock import ManualClock
from outlast_operator.applying import Applier
from outlast_operator.caches import Caches
from outlast_operator.events import Events
from outlast_operator.expectations import Expectations
from outlast_operator.kinds import EVENT, JOB, POD, SERVICE
from outlast_operator.model import Controller, Key, Object, Observed, Plan
from outlast_operator.poller import Poller, PollSettings
from outlast_operator.pruning import pruned
from outlast_operator.reconciler import Passed, Reconciler
from support.apiserver import eventually
from support.controllers import Controllers
from support.operators import World
from support.tinyplan import plan

pytestmark = pytest.mark.timeout(120)

FULL = ("head-0", "node-1", "node-2", "node-3")


def _events(place: World) -> list[Object]:
    return [event for page in place.cluster.pages(EVENT, place.namespace, "") for event in page["items"]]


def test_pods_are_made_once_and_replaced_under_new_names(place: World) -> None:
    operator = place.start()
    place.submit()
    place.wait_for_pods(*FULL)
    eventually("the status is written", lambda: place.status().get("nextPod") == 4)
    place.delete_pod("job-node-2")
    place.wait_for_pods("head-0", "node-1", "node-3", "node-4")
    place.set_pod("job-node-1", phase="Failed")
    place.wait_for_pods("head-0", "node-3", "node-4", "node-5")
    place.delete_pod("job-head-0")
    place.wait_for_pods("head-6", "node-3", "node-4", "node-5")
    eventually("the new head is in force", lambda: place.status().get("head") == "job-head-6")
    service = place.cluster.get(SERVICE, place.namespace, "job-head")
    assert service["spec"]["selector"] == {"outlast.dev/pod": "job-head-6"}
    owners = [pod["metadata"]["ownerReferences"][0]["uid"] for pod in place.pods().values()]
    assert set(owners) == {place.job()["metadata"]["uid"]}
    assert operator.calls()["create", "pods", "201"] == 7


def test_the_controller_is_asked_with_the_jobs_token_and_its_phase_is_written_at_once(
    place: World, controllers: Controllers
) -> None:
    operator = place.start(controller_port=controllers.port)
    place.submit()
    place.wait_for_pods(*FULL)
    ip = place.run_head(controllers, 1, phase="Starting", step=0)
    eventually("the phase is written", lambda: place.status().get("phase") == "Starting", 5)
    began = time.monotonic()
    controllers.tell(ip, phase="Running", step=10)
    eventually("the phase is written", lambda: place.status().get("phase") == "Running", 5)
    assert time.monotonic() - began < 5
    assert place.status()["step"] == 10
    controllers.tell(ip, outcome="succeeded", phase="Succeeded")
    eventually(
        "the controller may end", lambda: ("POST", "/stop", {"reason": "it is over"}) in controllers[ip].calls, 10
    )
    told = {("Running", "Normal"), ("Succeeded", "Normal")}
    eventually("events tell of it", lambda: told <= {(event["reason"], event["type"]) for event in _events(place)})
    assert operator.metrics()['outlast_operator_controller_polls_total{result="ok"}'] >= 3


def test_only_the_head_in_force_is_obeyed(place: World, controllers: Controllers) -> None:
    place.start(controller_port=controllers.port)
    place.submit()
    place.wait_for_pods(*FULL)
    old = place.run_head(controllers, 1, phase="Running", step=5)
    eventually("the old head is heard", lambda: place.status().get("phase") == "Running", 5)
    place.delete_pod("job-head-0")
    place.wait_for_pods("head-4", "node-1", "node-2", "node-3")
    eventually("the new head is in force", lambda: place.status().get("head") == "job-head-4")
    new = place.run_head(controllers, 2, "job-head-4", phase="Recovering", step=5)
    eventually("the new head is heard", lambda: place.status().get("phase") == "Recovering", 5)
    controllers.tell(old, phase="Failed", outcome="failed")
    controllers.tell(new, phase="Running", step=6)
    eventually("the new head is heard", lambda: place.status().get("phase") == "Running", 5)
    assert controllers[old].calls == []


def test_steps_alone_are_one_write_in_each_period_and_nothing_else(place: World, controllers: Controllers) -> None:
    operator = place.start(controller_port=controllers.port, progress_s=2)
    place.submit()
    place.wait_for_pods(*FULL)
    ip = place.run_head(controllers, 1, phase="Running", step=1)
    eventually("the phase is written", lambda: place.status().get("phase") == "Running", 5)
    time.sleep(2.5)  # what was under way is done
    before, began, step = operator.calls(), time.monotonic(), 1
    while time.monotonic() - began < 10:
        step += 1
        controllers.tell(ip, step=step)
        time.sleep(0.05)
    seconds = time.monotonic() - began
    new = {key: count - before.get(key, 0) for key, count in operator.calls().items() if count > before.get(key, 0)}
    leases = [new.pop(key) for key in list(new) if key[1] == "leases"]
    assert set(new) == {("patch", "trainingjobs", "200")}, new
    assert 3 <= new["patch", "trainingjobs", "200"] <= seconds / 2 + 1
    assert sum(leases) <= seconds / 2 * 2 + 4


def test_others_writes_and_ours_do_not_overwrite_each_other(place: World, controllers: Controllers) -> None:
    operator = place.start(controller_port=controllers.port, progress_s=0.1)
    place.submit()
    place.wait_for_pods(*FULL)
    ip = place.run_head(controllers, 1, phase="Running")
    for number in range(60):
        place.cluster.patch(JOB, place.namespace, "job", {"metadata": {"labels": {f"l{number}": "x"}}})
        controllers.tell(ip, step=number, phase=("Running", "Recovering")[number % 2])
    controllers.tell(ip, phase="Running", step=777)
    eventually("the last step is written", lambda: place.status().get("step") == 777)
    assert len(place.job()["metadata"]["labels"]) == 60
    assert operator.process.poll() is None


QUOTA = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}, "spec": {"hard": {"pods": "2"}}}


def condition(place: World, name: str = "job") -> dict[str, Any]:
    found = place.status(name).get("conditions") or [{}]
    return dict(found[0])


def test_an_exhausted_quota_is_told_and_mended(place: World) -> None:
    place.api.kubectl("-n", place.namespace, "apply", "-f", "-", stdin=json.dumps(QUOTA))
    status = {"status": {"hard": {"pods": "2"}, "used": {"pods": "0"}}}
    place.api.kubectl(
        "-n",
        place.namespace,
        "patch",
        "resourcequota",
        "small",
        "--subresource=status",
        "--type=merge",
        "-p",
        json.dumps(status),
    )
    place.start()
    place.submit()
    eventually("the quota is told", lambda: condition(place).get("reason") == "QuotaExceeded")
    assert "exceeded quota: small" in condition(place)["message"]
    assert len(place.names()) == 2
    assert place.status()["nextPod"] <= 2, "indices are not used up by Pods that were not made"
    place.api.kubectl("-n", place.namespace, "delete", "resourcequota", "small")
    place.cluster.patch(JOB, place.namespace, "job", {"spec": {"activeDeadlineSeconds": 1000}})
    place.wait_for_pods(*FULL)
    eventually("the condition is gone", lambda: place.status().get("conditions") == [] or None)


@pytest.mark.parametrize(
    ("bad", "code", "words"),
    [
        ({"resources": {"limits": {"cpu": "-1"}}}, "422", "must be greater than or equal to 0"),
        ({"resources": {"limits": {"cpu": "lots"}}}, "400", "quantities must match the regular expression"),
        ({"imagee": "misspelt"}, "400", 'unknown field "spec.containers[0].imagee"'),
    ],
)
def test_a_template_that_the_api_server_refuses_is_told_in_its_words(
    place: World, bad: dict[str, Any], code: str, words: str
) -> None:
    operator = place.start()
    place.submit(workers={"template": {"spec": {"containers": [{"name": "outlast", "image": "i", **bad}]}}})
    eventually("the refusal is told", lambda: condition(place).get("reason") == "InvalidPod")
    assert words in condition(place)["message"]
    place.submit("fine")
    place.wait_for_pods(*FULL, job="fine")
    time.sleep(3)
    tries = operator.calls()["create", "pods", code]
    assert 0 < tries <= 5, "retries back off"
    place.cluster.patch(JOB, place.namespace, "job", {"spec": {"suspend": True}})
    place.cluster.patch(JOB, place.namespace, "job", {"status": {"phase": "Suspended"}}, "status")
    place.cluster.patch(JOB, place.namespace, "job", {"spec": {"workers": {"template": None}}})
    place.wait_for_pods("head-0", "node-1", "node-2", "node-3")


def test_what_belongs_to_somebody_else_is_left_alone(place: World) -> None:
    spec = {"selector": {"app": "web"}, "ports": [{"port": 80}]}
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "job-head"}, "spec": spec}
    place.cluster.create(SERVICE, place.namespace, theirs)
    place.start()
    place.submit()
    eventually("it is told", lambda: condition(place).get("reason") == "NameTaken")
    assert "Service job-head" in condition(place)["message"]
    assert place.cluster.get(SERVICE, place.namespace, "job-head")["spec"]["selector"] == {"app": "web"}


@dataclass
class ByHand:
    """Passes without informers: the caches show what the test puts into them."""

    place: World
    caches: Caches
    reconciler: Reconciler
    clock: ManualClock

    def look(self) -> Passed:
        return self.reconciler.reconcile(Key(self.place.namespace, "job"))

    def job_arrives(self) -> None:
        self.caches.stores[JOB].put(pruned(JOB, dict(self.place.job())))

    def pods_arrive(self) -> None:
        for pod in self.place.pods().values():
            self.caches.stores[POD].put(pruned(POD, pod))


@pytest.fixture
def by_hand(place: World) -> ByHand:
    place.submit()
    clock, asked = ManualClock(), list[Key]()
    caches, expectations = Caches(asked.append, asked.append), Expectations(patience_s=10)
    poller = Poller(PollSettings(), asked.append, asked.append, clock, Random(1), lambda _: None)
    applier = Applier(place.cluster, caches, expectations, poller, clock, lambda: None)
    events = Events(place.cluster, clock, "x", lambda: None)
    reconciler = Reconciler(caches, place.cluster, expectations, poller, applier, events, plan, clock, Random(1), 30.0)
    made = ByHand(place, caches, reconciler, clock)
    made.job_arrives()
    made.look()
    place.wait_for_pods(*FULL)
    return made


def test_a_pass_on_a_cache_that_is_behind_makes_nothing_twice(place: World, by_hand: ByHand) -> None:
    for _ in range(3):
        assert by_hand.look().again_in_s is not None
        by_hand.job_arrives()  # the status has arrived, the Pods have not
        by_hand.clock.advance(11)
    assert place.names() == [f"job-{name}" for name in FULL]
    place.delete_pod("job-node-3")  # made and gone without the cache ever seeing it
    by_hand.pods_arrive()
    by_hand.clock.advance(11)
    by_hand.look()
    by_hand.look()
    place.wait_for_pods("head-0", "node-1", "node-2", "node-4")


def test_what_arrives_while_a_pass_reads_its_caches_is_not_made_again(
    place: World, by_hand: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand.job_arrives()
    reads = by_hand.caches.observe

    def read_then_arrive(key: Key) -> Observed | None:
        found = reads(key)
        by_hand.pods_arrive()
        return found

    monkeypatch.setattr(by_hand.caches, "observe", read_then_arrive)
    by_hand.look()
    assert place.names() == [f"job-{name}" for name in FULL]


def test_a_controller_whose_answer_breaks_the_plan_counts_as_silent(
    by_hand: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Controller] = []

    def decide(observed: Observed, now: float) -> Plan:
        seen.append(observed.controller)
        if observed.controller.status is not None:
            raise ZeroDivisionError("what it said")
        return Plan()

    answer = Controller("job-head-0", {"step": "many"}, heard_at=1.0)
    monkeypatch.setattr(by_hand.reconciler, "_decide", decide)
    monkeypatch.setattr(by_hand.reconciler._poller, "heard", lambda key: answer)
    by_hand.job_arrives()
    by_hand.pods_arrive()
    assert by_hand.look().refused is False
    assert (seen[1].status, seen[1].failing_since) == (None, by_hand.clock.wall())
    assert "what it said" in seen[1].trouble


def test_readiness_waits_for_all_caches_and_health_says_what_is_wrong(place: World) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody"}}
    place.cluster.create(_ACCOUNT, place.namespace, account)
    token = place.api.kubectl("-n", place.namespace, "create", "token", "nobody").stdout.strip()
    operator = place.start(kubeconfig=place.api.write_kubeconfig("nobody", token))
    eventually("the operator answers", lambda: operator.check("/healthz")[0] == 200)
    status, text = operator.check("/readyz")
    assert status == 503
    assert "trainingjobs are not listed yet" in text
    assert "pods is forbidden" in eventually(
        "the reason is logged", lambda: "pods is forbidden" in operator.log() and operator.log()
    )


def test_sigterm_ends_in_order(place: World) -> None:
    operator = place.start()
    operator.acting()
    assert place.holder() == "one"
    follower = place.start("two")
    follower.ready()
    follower.signal(signal.SIGTERM)
    assert follower.ended() == 0
    assert place.holder() == "one"
    operator.signal(signal.SIGTERM)
    assert operator.ended() == 0
    assert place.holder() == ""


_ACCOUNT = type(POD)("ServiceAccount", "v1", "serviceaccounts")


def test_the_job_can_be_deleted_while_its_controller_is_asked(place: World, controllers: Controllers) -> None:
    operator = place.start(controller_port=controllers.port)
    job: Object = place.submit()
    place.wait_for_pods(*FULL)
    place.run_head(controllers, 1, phase="Running")
    eventually("the controller is heard", lambda: place.status().get("phase") == "Running", 5)
    place.cluster.delete(JOB, place.namespace, "job", job["metadata"]["uid"], None)
    eventually("nobody is asked", lambda: operator.metrics()["outlast_operator_controllers"] == 0)
    threading.Event().wait(0.5)
    assert operator.metrics()["outlast_operator_queue_depth"] == 0
