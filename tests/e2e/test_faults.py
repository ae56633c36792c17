"""One job through everything that happens to Pods and machines, and the same weights as if nothing had."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from outlast import kube
from support.labs import Lab
from support.trainingjobs import Job, job, template

Submit = Callable[[dict[str, Any]], Job]

STEPS = 700
APART = 40
"""Steps of rest between two faults: there are snapshots again, and parity."""


def test_a_job_goes_on(
    submit: Submit, bucket: str, undisturbed: Callable[[int, int], str], timings: dict[str, Any]
) -> None:
    expected = undisturbed(STEPS, 3)
    pod = template()
    resource = job(
        "bytelm",
        STEPS,
        replicas=3,
        spares=1,
        workers={"template": pod, "failureDomain": "topology.kubernetes.io/zone"},
        head={"template": template({"resources": {"requests": {"cpu": "100m"}}})},
        checkpoint={"url": bucket, "interval": 100},
        recovery={"maxRestarts": 50},
    )
    began = time.monotonic()
    bytelm = submit(resource)
    bytelm.reach(1, seconds=180)
    timings["apply_to_first_step_s"] = round(time.monotonic() - began, 2)
    faults = Faults(bytelm)
    costs = timings["faults"] = {}
    for name, fault in faults.in_turn():
        bytelm.reach((bytelm.ask()["best_step"] or 0) + APART)
        faults.await_spare()
        costs[name] = cost = bytelm.cost_of(fault).to_json()
        assert name != "node drained" or cost["steps_again"] == 0, "a drain hands over: nothing is done twice"
        faults.repair()
    status = bytelm.until_phase("Succeeded", 240)
    assert status["step"] == STEPS
    assert status["weightsDigest"] == expected
    assert status["checkpoint"]["step"] == STEPS, "the last step is always checkpointed"
    assert status["restartCount"] >= len(costs) - 2, "every fault but those that hand over is a restart"
    timings["steps"], timings["goodput"] = STEPS, status["goodput"]


class Faults:
    """What happens to the job, and how it is made good."""

    def __init__(self, victim: Job) -> None:
        self._job, self._lab = victim, victim.lab
        self._off: list[str] = []
        self._drained: list[str] = []

    def in_turn(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("container killed", self.kill_a_container),
            ("Pod deleted", self.delete_a_pod),
            ("node powered off", self.power_off_a_machine),
            ("node drained", self.drain_a_machine),
            ("head deleted", self.delete_the_head),
            ("operator deleted while recovering", self.delete_a_pod_and_the_operator),
        ]

    def await_spare(self) -> None:
        """Three nodes train and one waits: the operator has replaced what was lost."""
        self._job.watch_steps("whole again", 120, lambda s: s["stage"] == "running" and s["workers"]["spares"] >= 1)

    def repair(self) -> None:
        for machine in self._off:
            self._lab.power_on(machine)
        for machine in self._drained:
            self._lab.kubectl("uncordon", machine)
        self._off, self._drained = [], []

    def kill_a_container(self) -> None:
        self._lab.kill_container(self._job.seated()[1], kube.CONTAINER)

    def delete_a_pod(self) -> None:
        self._delete(self._job.seated()[0], "--grace-period=1")

    def power_off_a_machine(self) -> None:
        machine = self._machine_without_head()
        self._lab.power_off(machine)
        self._off.append(machine)

    def drain_a_machine(self) -> None:
        machine = self._machine_without_head()
        self._drained.append(machine)
        self._lab.kubectl("drain", machine, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s")

    def delete_the_head(self) -> None:
        self._delete(self._job.head())

    def delete_a_pod_and_the_operator(self) -> None:
        self._delete(self._job.seated()[2], "--grace-period=1")
        self._job.watch_steps("stopping", 30, lambda status: status["stage"] != "running")
        where = ["-n", "outlast-system", "-l", "app.kubernetes.io/name=outlast"]
        self._lab.kubectl("delete", "pod", *where, "--grace-period=0", "--force", "--wait=false")

    def _machine_without_head(self) -> str:
        head = self._job.head()["spec"]["nodeName"]
        return next(p["spec"]["nodeName"] for p in self._job.seated() if p["spec"]["nodeName"] != head)

    def _delete(self, pod: dict[str, Any], *options: str) -> None:
        name = pod["metadata"]["name"]
        self._lab.kubectl("-n", self._job.namespace, "delete", "pod", name, "--wait=false", *options)


def test_pods_have_what_they_need_and_no_more(release: Lab, submit: Submit) -> None:
    """The namespace enforces restricted Pod security: that they run at all is a part of the proof."""
    small = submit(job("bounds", 100000, replicas=2, workers={"template": template()}))
    small.reach(1, seconds=180)
    for pod in [*small.pods(kube.NODE_ROLE), small.head()]:
        (container,) = pod["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert not any("serviceaccount" in mount for mount in mounts), "training Pods have no rights to the API"
        assert pod["metadata"]["ownerReferences"][0]["name"] == "bounds"
    selector = f"{kube.JOB_LABEL}=bounds"
    (policy,) = release.get("-n", small.namespace, "networkpolicies", "-l", selector)["items"]
    (deployment,) = release.get("-n", "outlast-system", "deployments")["items"]
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"] if "namespaceSelector" in peer]
    assert peers == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "outlast-system"}},
            "podSelector": {"matchLabels": deployment["spec"]["selector"]["matchLabels"]},
        }
    ]
