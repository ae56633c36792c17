"""What Pods and machines say: obstacles to a start, lost machines, failure domains."""

from __future__ import annotations

from typing import Any

import pytest

from outlast_operator.machines import domain_of, why_lost
from outlast_operator.pods import Obstacle, index_of, pod_of, summed_up
from outlast_operator.timestamps import written
from support.operator_world import NOW, container, machine, node, pod

OOM = {"reason": "OOMKilled", "exitCode": 137}
CRASH = {"reason": "Error", "exitCode": 2, "message": "no module named outlast"}


@pytest.mark.parametrize(
    ("status", "reason", "passes"),
    [
        (container(ready=True), None, False),
        (container(running={}), None, False),
        (container(waiting={"reason": "ContainerCreating"}), None, False),
        (container(waiting={"reason": "PodInitializing"}), None, False),
        (container(waiting={"reason": "ErrImagePull"}), "ImagePullBackOff", False),
        (container(waiting={"reason": "ImagePullBackOff"}), "ImagePullBackOff", False),
        (container(waiting={"reason": "CreateContainerConfigError"}), "CreateContainerConfigError", False),
        (container(waiting={"reason": "CrashLoopBackOff"}, last=CRASH, restarts=4), "CrashLoopBackOff", False),
        (container(terminated=CRASH, restarts=4), "CrashLoopBackOff", False),
        (container(running={}, last=CRASH, restarts=4), "CrashLoopBackOff", False),
        (container(running={"startedAt": written(NOW - 60)}, last=CRASH, restarts=4), "CrashLoopBackOff", False),
        (container(running={"startedAt": written(NOW - 301)}, last=CRASH, restarts=4), None, False),
        (container(running={"startedAt": written(NOW - 301)}, last=OOM, restarts=1), None, False),
        (container(terminated=CRASH, restarts=1), None, False),
        (container(terminated={"exitCode": 0}, restarts=4), None, False),
        (container(terminated=OOM), "OOMKilled", False),
        (container(waiting={"reason": "CrashLoopBackOff"}, last=OOM, restarts=3), "OOMKilled", False),
        (container(ready=True, last=OOM, restarts=3), None, False),
    ],
)
def test_what_keeps_a_container_from_starting(status: dict[str, Any], reason: str | None, passes: bool) -> None:
    found = pod_of(pod(node(1), ready=False, containerStatuses=[status]), NOW).obstacles
    assert [one.reason for one in found] == ([] if reason is None else [reason])
    assert all(one.passes == passes for one in found)


def test_an_init_container_may_be_the_one_that_does_not_start() -> None:
    status = [container("fetch", waiting={"reason": "ErrImagePull", "message": "not found"})]
    (found,) = pod_of(pod(node(1), "Pending", initContainerStatuses=status), NOW).obstacles
    assert found.message == "container fetch: not found"


def test_a_pod_without_a_machine_waits_for_one() -> None:
    conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}]
    (found,) = pod_of(pod(node(1), "Pending", machine="", conditions=conditions), NOW).obstacles
    assert found == Obstacle(node(1), "Unschedulable", "0/3 nodes", passes=True)


def test_the_killed_container_and_its_limit_are_named() -> None:
    obj = pod(node(1), ready=False, containerStatuses=[container(terminated=OOM)])
    obj["spec"]["containers"] = [{"name": "outlast", "resources": {"limits": {"memory": "3Gi"}}}]
    (found,) = pod_of(obj, NOW).obstacles
    assert (
        found.message
        == "container outlast was killed for want of memory: raise its memory limit (3Gi), or lower what it uses"
    )


def test_the_last_words_of_a_crash_are_told() -> None:
    obj = pod(node(1), ready=False, containerStatuses=[container(terminated=CRASH, restarts=3)])
    (found,) = pod_of(obj, NOW).obstacles
    assert "exit code 2, 3 restarts: no module named outlast" in found.message


def test_an_ended_pod_has_an_end_and_no_obstacles() -> None:
    ended = pod_of(
        pod(node(1), "Failed", startTime="2027-01-15T08:00:00Z", reason="Evicted", message="disk pressure"), NOW
    )
    assert (ended.ended, ended.ended_at, ended.obstacles) == (True, NOW, ())
    assert ended.why == "Evicted: disk pressure"


def test_one_obstacle_speaks_for_its_kind_and_the_hopeless_first() -> None:
    waits = Obstacle("j-node-1", "Unschedulable", "0/3 nodes", passes=True)
    first, second = Obstacle("j-node-2", "OOMKilled", "killed"), Obstacle("j-node-10", "OOMKilled", "killed")
    found = summed_up([waits, second, first])
    assert found == Obstacle("j-node-2", "OOMKilled", "j-node-2 and 1 more: killed")
    refusal = Obstacle("", "InvalidPod", "the API server's words")
    assert summed_up([first, refusal]) == refusal
    assert summed_up([waits, refusal]) == refusal
    assert summed_up([]) is None


@pytest.mark.parametrize(("name", "index"), [("a-node-12", 12), ("a-head-0", 0), ("a-node-", -1), ("another", -1)])
def test_indices_in_names(name: str, index: int) -> None:
    assert index_of(name) == index


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (machine(), ""),
        (machine(ready="False"), "is not ready"),
        (machine(ready="Unknown"), "is unreachable"),
        (machine(taints=("node.kubernetes.io/unreachable",)), "is unreachable"),
        (machine(taints=("node.kubernetes.io/not-ready",)), "is not ready"),
        (machine(taints=("node.kubernetes.io/out-of-service",)), "is out of service"),
        (machine(taints=("nvidia.com/gpu", "node.kubernetes.io/unschedulable")), ""),
        ({"metadata": {"name": "new"}}, ""),
    ],
)
def test_whose_pods_cannot_be_counted_on(found: dict[str, Any], why: str) -> None:
    assert why_lost(found) == why


def test_a_cordoned_machine_that_is_tainted_without_effect_on_pods_is_not_lost() -> None:
    found = machine()
    found["spec"] = {
        "unschedulable": True,
        "taints": [{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"}],
    }
    assert why_lost(found) == ""


def test_the_failure_domain_is_the_label_or_the_machine() -> None:
    zone = "topology.kubernetes.io/zone"
    labelled = machine("m1")
    labelled["metadata"]["labels"][zone] = "north"
    assert domain_of(labelled, zone) == "north"
    assert domain_of(labelled, None) == "m1"
    assert domain_of(machine("m2"), zone) == "m2"
