"""A job without an operator: the resource, its Secret, and Pods in which ``scripts/stand_in.py`` plays the controller and
the nodes. What is real is what is between them and ``trainctl``: API server, kubelet, containers, port-forward, logs."""

from __future__ import annotations

import json
import pathlib
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outlast import kube
from support.labs import Lab

IMAGE = "tctl-stand-in:dev"
TOKEN = "the-token-of-this-job"
SCRIPT = pathlib.Path(__file__).with_name("scripts") / "stand_in.py"


def build_stand_in(lab: Lab, folder: pathlib.Path) -> None:
    """The image of all stand-ins, in every node of the lab."""
    shutil.copy(SCRIPT, folder / "stand_in.py")
    (folder / "Dockerfile").write_text("FROM python:3.11-slim-bookworm\nCOPY stand_in.py /stand_in.py\n")
    lab.kubelab("build", "--name", lab.name, IMAGE, str(folder), timeout=300)


@dataclass
class StandInJob:
    """One job. ``labels`` and names are those that the operator gives."""

    lab: Lab
    name: str
    namespace: str = "default"
    spec: Mapping[str, Any] = field(default_factory=dict)
    _uid: str = ""

    def create(self) -> StandInJob:
        about = {"name": self.name, "namespace": self.namespace}
        spec = {"entrypoint": ["python", "train.py"], **self.spec}
        resource = {"apiVersion": "outlast.dev/v1alpha1", "kind": "TrainingJob", "metadata": about, "spec": spec}
        self.lab.apply(resource)
        self._uid = self.lab.get("-n", self.namespace, "trainingjob", self.name)["metadata"]["uid"]
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": self._owned(kube.secret_name(self.name)),
            "stringData": {kube.TOKEN_KEY: TOKEN},
        }
        self.lab.apply(secret)
        return self

    def add_pod(self, role: str, index: int) -> str:
        """A Pod that is running; its name."""
        name = kube.pod_name(self.name, role, index)
        meta = self._owned(name)
        meta["labels"] |= {kube.ROLE_LABEL: role, kube.POD_LABEL: name}
        container = {
            "name": kube.CONTAINER,
            "image": IMAGE,
            "command": ["python", "/stand_in.py"],
            "env": [{"name": "TOKEN", "value": TOKEN}, {"name": kube.POD_VARIABLE, "value": name}],
            "readinessProbe": {"tcpSocket": {"port": kube.CONTROLLER_PORT}, "periodSeconds": 1},
        }
        spec = {"restartPolicy": "OnFailure", "terminationGracePeriodSeconds": 1, "containers": [container]}
        self.lab.apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        self.wait_ready(name)
        return name

    def wait_ready(self, pod: str) -> None:
        self.lab.kubectl("-n", self.namespace, "wait", f"pod/{pod}", "--for=condition=Ready", "--timeout=60s")

    def set_status(self, **status: Any) -> None:
        """What the operator would write."""
        patch = json.dumps({"status": status})
        where = ["-n", self.namespace, "trainingjob", self.name, "--subresource=status", "--type=merge"]
        self.lab.kubectl("patch", *where, "-p", patch)

    def say(self, pod: str, *lines: str) -> None:
        """Have a Pod write lines."""
        self._tell(pod, "/say", {"lines": lines})

    def exit(self, pod: str, status: int) -> None:
        """Have a Pod's container end."""
        self._tell(pod, "/exit", {"status": status})

    def restart(self, pod: str) -> None:
        """Have a Pod's container fail, for the first time, and wait until its next one is ready."""
        self.exit(pod, 1)
        again = "--for=jsonpath={.status.containerStatuses[0].restartCount}=1"
        self.lab.kubectl("-n", self.namespace, "wait", f"pod/{pod}", again, "--timeout=60s")
        self.wait_ready(pod)

    def set_controller(self, head: str, status: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """What the controller in ``head`` answers from now on."""
        self._tell(head, "/state", {"status": status, "events": events})

    def faults(self, head: str) -> list[str]:
        """The faults that the controller has been asked for."""
        return list(self._tell(head, "/state", {})["faults"])

    def delete_pod(self, name: str) -> None:
        self.lab.kubectl("-n", self.namespace, "delete", "pod", name, "--wait=true", "--grace-period=1")

    def delete(self) -> None:
        self.lab.kubectl("-n", self.namespace, "delete", "trainingjob", self.name, "--ignore-not-found", "--wait=true")

    def _owned(self, name: str) -> dict[str, Any]:
        owner = {"apiVersion": "outlast.dev/v1alpha1", "kind": "TrainingJob", "name": self.name, "uid": self._uid}
        return {
            "name": name,
            "namespace": self.namespace,
            "labels": {kube.JOB_LABEL: self.name},
            "ownerReferences": [owner],
        }

    def _tell(self, pod: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The lab's Pods are reached directly, so that what is tested is not used to drive the test."""
        address = self.lab.get("-n", self.namespace, "pod", pod)["status"]["podIP"]
        request = urllib.request.Request(f"http://{address}:{kube.CONTROLLER_PORT}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            told: dict[str, Any] = json.load(answer)
            return told


def node_status(nodes: Mapping[str, int | None], **more: Any) -> dict[str, Any]:
    """A controller's /status in which each node has a seat (None: it is a spare)."""
    told = {
        name: {
            "node": name,
            "seat": seat,
            "state": "spare" if seat is None else "active",
            "domain": "zone-1",
            "keeper": "up",
        }
        for name, seat in nodes.items()
    }
    return {"phase": "Running", "step": 7, "total": 100, "attempt": 1, "nodes": told, **more}
