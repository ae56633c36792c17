"""A TrainingJob in a real cluster, as tests see it: the resource, its Pods, its controller's HTTP, and what a fault costs."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from kubernetes import client, config, watch

from outlast import kube
from support.labs import Lab

PERIOD_S = 0.05
"""Between two questions to a controller: it has no event for a step."""
GROUP, VERSION, PLURAL = "outlast.dev", "v1alpha1", "trainingjobs"

Resource = Mapping[str, Any]


STEPS = 280
"""Of jobs whose weights are compared: one undisturbed run does for all of them."""
STEP_S = 0.6
"""Of a step that a test may see: a job lasts as long on every machine, and leaves it room for what else happens."""


def job(
    name: str,
    steps: int,
    *,
    replicas: int,
    spares: int = 0,
    size: str = "tiny",
    step_time: float = STEP_S,
    validate_every: int | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """The example as a job: one thread a rank, so that the bits are those of every other run of so many ranks. A step
    takes ``step_time`` seconds at least; rank 0 prints a line every ``validate_every`` steps, at the end if None."""
    options = {
        **{"--steps": steps, "--size": size, "--step-time": step_time},
        "--validate-every": validate_every or steps,
    }
    content: dict[str, Any] = {
        "entrypoint": ["python", "bytelm/train.py", *(str(part) for option in options.items() for part in option)],
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        "workers": {"replicas": replicas, "spares": spares},
        "snapshot": {"everySteps": 10, "maxMemory": "512Mi"},
        **spec,
    }
    content["workers"] = {"replicas": replicas, "spares": spares, **spec.get("workers", {})}
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainingJob", "metadata": {"name": name}, "spec": content}


def template(container: Mapping[str, Any] | None = None, **pod: Any) -> dict[str, Any]:
    """A Pod template whose training container has the bucket's credentials and a share of the machine."""
    whole = {
        "name": "outlast",
        "envFrom": [{"secretRef": {"name": "bucket"}}],
        "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}},
        **(container or {}),
    }
    return {"spec": {"containers": [whole], **pod}}


_LOCALLY = """
cp -r /opt/outlast/examples /tmp/here && cp /job/job.yaml /tmp/here && cd /tmp
trainctl run /tmp/here/job.yaml --dir /tmp/run --json >/tmp/output 2>&1 || { tail -c 3000 /tmp/output; exit 1; }
python -c 'import json; print(json.load(open("/tmp/run/report.json"))["weights_digest"])'
"""


def local_digest(lab: Lab, namespace: str, steps: int, ranks: int) -> str:
    """The weights' digest after ``trainctl run`` of the same job, undisturbed, in one Pod of the same image: the same
    corpus (Python's own sources), libraries, number of ranks and threads a rank as in the cluster."""
    name = f"undisturbed-{steps}-{ranks}"
    file = yaml.safe_dump(job("undisturbed", steps, replicas=ranks, step_time=0))
    about = {"name": name, "namespace": namespace}
    run = {
        "name": "run",
        "image": "outlast-training:dev",
        "command": ["sh", "-ec", _LOCALLY],
        "volumeMounts": [{"name": "job", "mountPath": "/job"}, {"name": "memory", "mountPath": "/dev/shm"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [run],
        "volumes": [
            {"name": "job", "configMap": {"name": name}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    lab.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"job.yaml": file}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec},
    )
    try:
        ended = ["wait", "-n", namespace, f"pod/{name}", "--timeout=420s"]
        lab.kubectl(*ended, "--for=jsonpath={.status.containerStatuses[0].state.terminated}", timeout=440)
        told = lab.kubectl("-n", namespace, "logs", name)
        (container,) = lab.get("-n", namespace, "pod", name)["status"]["containerStatuses"]
        assert container["state"]["terminated"]["exitCode"] == 0, told
        return told.split()[-1]
    finally:
        lab.kubectl("-n", namespace, "delete", f"pod/{name}", f"configmap/{name}", "--grace-period=1")


@dataclass(frozen=True)
class Cost:
    """What a fault cost, in seconds from the moment it was injected; steps are counted from before it."""

    restarted_s: float
    """Until the next attempt had finished a step."""
    new_step_s: float
    """Until the job had finished a step that it had not finished before."""
    steps_again: int
    """Steps that were done twice."""

    def to_json(self) -> dict[str, float]:
        return {
            "first_step_s": round(self.restarted_s, 2),
            "new_step_s": round(self.new_step_s, 2),
            "steps_again": self.steps_again,
        }


@dataclass
class Job:
    """One job, by its name."""

    lab: Lab
    namespace: str
    name: str
    _token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        api = config.new_client_from_config(self.lab.variables["KUBECONFIG"])
        self._jobs = client.CustomObjectsApi(api)

    # --- the resource -----------------------------------------------------------------------------------------------

    def resource(self) -> dict[str, Any]:
        return self.lab.get("-n", self.namespace, "trainingjob", self.name)

    def status(self) -> dict[str, Any]:
        return dict(self.resource().get("status", {}))

    def until(self, what: str, seconds: float, holds: Callable[[Resource], object]) -> dict[str, Any]:
        """The resource as soon as ``holds`` is true of it. Raises AssertionError at its deadline, with what it was."""
        deadline = time.monotonic() + seconds
        seen: dict[str, Any] = {}
        while (left := deadline - time.monotonic()) > 0:
            stream = watch.Watch().stream(
                self._jobs.list_namespaced_custom_object,
                GROUP,
                VERSION,
                self.namespace,
                PLURAL,
                field_selector=f"metadata.name={self.name}",
                timeout_seconds=max(1, round(left)),
            )
            for event in stream:
                seen = event["object"] if event["type"] != "DELETED" else {}
                if holds(seen):
                    return seen
                if time.monotonic() > deadline:
                    break
        raise AssertionError(
            f"{self.name}: not {what} within {seconds:g} s:\n{json.dumps(seen.get('status'), indent=1)}"
        )

    def until_phase(self, phase: str, seconds: float) -> dict[str, Any]:
        """The status once the job is in ``phase``; one that has failed will not be waited for."""

        def there(resource: Resource) -> bool:
            status = resource.get("status", {})
            assert phase == "Failed" or status.get("phase") != "Failed", status
            return bool(status.get("phase") == phase)

        return dict(self.until(phase, seconds, there)["status"])

    def until_gone(self, seconds: float) -> None:
        """Returns when the resource is no more."""
        self.lab.kubectl(
            "-n", self.namespace, "wait", "--for=delete", f"trainingjob/{self.name}", f"--timeout={seconds:g}s"
        )

    def condition(self, resource: Resource, kind: str) -> dict[str, Any]:
        conditions = resource.get("status", {}).get("conditions", [])
        return next((dict(c) for c in conditions if c["type"] == kind), {})

    # --- its Pods ---------------------------------------------------------------------------------------------------

    def pods(self, role: str) -> list[dict[str, Any]]:
        """Those that run and are not being deleted, by name."""
        selector = f"{kube.JOB_LABEL}={self.name},{kube.ROLE_LABEL}={role}"
        found = self.lab.get("-n", self.namespace, "pods", "-l", selector)["items"]
        living = [p for p in found if p["status"]["phase"] == "Running" and "deletionTimestamp" not in p["metadata"]]
        return sorted(living, key=lambda pod: kube.pod_index(pod["metadata"]["name"]))

    def head(self) -> dict[str, Any]:
        (pod,) = [p for p in self.pods(kube.HEAD_ROLE) if p["metadata"]["name"] == self.status().get("head")]
        return pod

    def seated(self) -> list[dict[str, Any]]:
        """Node Pods that train at the moment, by seat."""
        nodes = self.ask()["nodes"].values()
        seats = {node["node"]: node["seat"] for node in nodes if node["state"] == "active"}
        pods = {pod["metadata"]["name"]: pod for pod in self.pods(kube.NODE_ROLE)}
        return [pods[name] for name in sorted(seats, key=lambda name: seats[name]) if name in pods]

    # --- its controller ---------------------------------------------------------------------------------------------

    def token(self) -> str:
        if not self._token:
            secret = self.lab.get("-n", self.namespace, "secret", kube.secret_name(self.name))
            self._token = base64.b64decode(secret["data"][kube.TOKEN_KEY]).decode()
        return self._token

    def try_to_ask(self, address: str) -> dict[str, Any] | None:
        """The controller's status at the head Pod with ``address``; None where nobody answers now."""
        request = urllib.request.Request(
            f"http://{address}:{kube.CONTROLLER_PORT}/status", headers={"Authorization": f"Bearer {self.token()}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2.0) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None

    def address(self) -> str | None:
        """Of the head Pod in force, if it has one by now."""
        head = self.status().get("head")
        if not head:
            return None
        found = self.lab.run("kubectl", "-n", self.namespace, "get", "pod", head, "-o", "jsonpath={.status.podIP}")
        return found.stdout if found.returncode == 0 and found.stdout else None

    def watch_steps(self, what: str, seconds: float, holds: Callable[[Resource], object]) -> dict[str, Any]:
        """The controller's status as soon as ``holds`` is true of it, wherever the head moves meanwhile."""
        deadline = time.monotonic() + seconds
        address, seen = self.address(), None
        while time.monotonic() < deadline:
            status = self.try_to_ask(address) if address else None
            if status is None:
                address = self.address()
                time.sleep(PERIOD_S)
                continue
            seen = status
            if holds(status):
                return status
            assert status["outcome"] is None, (
                f"{self.name} ended before {what}: {status['outcome']}, {status['reason']}"
            )
            time.sleep(PERIOD_S)
        raise AssertionError(f"{self.name}: not {what} within {seconds:g} s:\n{json.dumps(seen, indent=1)}")

    def ask(self, seconds: float = 30) -> dict[str, Any]:
        return self.watch_steps("answering", seconds, lambda _: True)

    def reach(self, step: int, seconds: float = 240) -> dict[str, Any]:
        """The controller's status once so many steps are done by the attempt under way."""
        return self.watch_steps(
            f"at step {step}", seconds, lambda s: s["stage"] == "running" and (s["step"] or 0) >= step
        )

    def cost_of(self, fault: Callable[[], object], seconds: float = 240) -> Cost:
        """Inject ``fault`` into the running job, and see it go on in another attempt."""
        before = self.ask()
        top, base, restarted = before["best_step"] or 0, -1, 0.0
        began = time.monotonic()

        def goes_on(status: Resource) -> bool:
            nonlocal top, base, restarted
            step = status["step"] or 0
            if status["attempt"] <= before["attempt"]:
                top = max(top, step)
            elif status["stage"] == "running":
                base = step if base < 0 else base
                restarted = restarted or (time.monotonic() - began if step > base else 0.0)
                return step > max(top, base)
            return False

        with ThreadPoolExecutor(1) as pool:  # some commands return long after the job has gone on
            injected = pool.submit(fault)
            self.watch_steps("going on", seconds, goes_on)
            cost = Cost(restarted, time.monotonic() - began, max(0, top - base))
            injected.result()
        return cost


@contextmanager
def submitting(lab: Lab, namespace: str) -> Iterator[Callable[[dict[str, Any]], Job]]:
    """Applies jobs, and removes them afterwards: nothing of them may stay."""
    jobs: list[Job] = []

    def apply(resource: dict[str, Any]) -> Job:
        lab.apply({**resource, "metadata": {**resource["metadata"], "namespace": namespace}})
        jobs.append(Job(lab, namespace, resource["metadata"]["name"]))
        return jobs[-1]

    yield apply
    for made in jobs:
        lab.kubectl("-n", namespace, "delete", "trainingjob", made.name, "--ignore-not-found", "--wait=false")
        assert_nothing_left(lab, namespace, made.name)


def assert_nothing_left(lab: Lab, namespace: str, job: str, seconds: float = 90) -> None:
    """No object of ``job`` is left, once the garbage collector has been there."""
    kinds = "pods,services,secrets,networkpolicies,poddisruptionbudgets,configmaps"
    deadline = time.monotonic() + seconds
    while True:
        found = lab.kubectl("-n", namespace, "get", kinds, "-l", f"outlast.dev/job={job}", "-o", "name").split()
        if not found:
            return
        assert time.monotonic() < deadline, f"still there {seconds:g} s after the deletion of {job}: {found}"
        lab.run("kubectl", "-n", namespace, "wait", "--for=delete", found[0], f"--timeout={seconds:g}s")
