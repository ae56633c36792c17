"""What happens to a job in a cluster: containers, Pods, machines, its head and its operator, and how it is made good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from outlast import kube
from support.trainingjobs import Job


class Faults:
    """What happens to the job, and how it is made good."""

    def __init__(self, victim: Job) -> None:
        self._job, self._lab = victim, victim.lab
        self._off: list[str] = []
        self._drained: list[str] = []

    def in_turn(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("container killed", self.kill_a_container),
            ("head deleted", self.delete_the_head),
            ("Pod deleted", self.delete_a_pod),
            ("node powered off", self.power_off_a_machine),
            ("node drained", self.drain_a_machine),
            ("operator deleted while recovering", self.delete_a_pod_and_the_operator),
        ]

    def await_spare(self) -> None:
        """Three nodes train and one waits: the operator has replaced what was lost."""
        self._job.watch_steps("whole again", 240, lambda s: s["stage"] == "running" and s["workers"]["spares"] >= 1)

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

    def lose_the_head(self) -> None:
        """As with its machine: without a word, and the Pod is gone at once."""
        self._delete(self._job.head(), "--grace-period=0", "--force")

    def kill_the_heads_container(self) -> None:
        self._lab.kill_container(self._job.head(), kube.CONTAINER)

    def delete_a_pod_and_the_operator(self) -> None:
        self._delete(self._job.seated()[2], "--grace-period=1")
        self._job.watch_steps("stopping", 30, lambda status: status["stage"] != "running")
        where = ["-n", "outlast-system", "-l", "app.kubernetes.io/name=outlast"]
        self._lab.kubectl("delete", "pod", *where, "--grace-period=0", "--force", "--wait=false")

    def _machine_without_head(self) -> str:
        """One where a node trains, and as little else of the job as there is: three machines carry five Pods."""
        head = self._job.head()["spec"]["nodeName"]
        machines = Counter(pod["spec"]["nodeName"] for pod in self._job.pods(kube.NODE_ROLE))
        seated = {pod["spec"]["nodeName"] for pod in self._job.seated()} - {head}
        return min(sorted(seated), key=lambda machine: machines[machine])

    def _delete(self, pod: dict[str, Any], *options: str) -> None:
        name = pod["metadata"]["name"]
        self._lab.kubectl("-n", self._job.namespace, "delete", "pod", name, "--wait=false", *options)
