"""A plan as small as one can be, for tests of what surrounds it: a Service, a Secret, a head Pod, node Pods.

``plan`` keeps one head and ``replicas`` node Pods, replaces what is gone, failed or being deleted, tells the step and
phase that the controller says, and asks it to stop once it says that it is over.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from outlast import kube
from outlast.api import API_VERSION, KIND, TrainingJob
from outlast.jobstatus import Condition, TrainingJobStatus, WorkersStatus
from outlast_operator.model import Action, Apply, Call, Create, Delete, Happening, Object, Observed, Plan


def plan(observed: Observed, now: float) -> Plan:
    """What the real one does, in a nutshell."""
    job = observed.job
    if job is None or observed.raw["metadata"].get("deletionTimestamp"):
        return Plan()
    old = job.status or TrainingJobStatus()
    next_pod = max([old.next_pod, *(kube.pod_index(pod["metadata"]["name"]) + 1 for pod in observed.pods)])
    live = [pod for pod in observed.pods if _lives(pod)]
    heads = [pod["metadata"]["name"] for pod in live if _role(pod) == kube.HEAD_ROLE]
    nodes = [pod["metadata"]["name"] for pod in live if _role(pod) == kube.NODE_ROLE]
    actions: list[Action] = list(_owned(observed, job, (heads or [""])[0]))
    for role, short in ((kube.HEAD_ROLE, 1 - len(heads)), (kube.NODE_ROLE, job.spec.workers.replicas - len(nodes))):
        for _ in range(short):
            actions.append(Create(_pod(job, role, next_pod)))
            if role == kube.HEAD_ROLE:
                heads.append(kube.pod_name(job.metadata.name, role, next_pod))
            next_pod += 1
    actions += [Delete("Pod", pod["metadata"]["name"], pod["metadata"]["uid"]) for pod in observed.pods if _ended(pod)]
    said = observed.controller.status or {}
    if said.get("outcome"):
        actions.append(Call("POST", "/stop", {"reason": "it is over"}))
    status = old.model_copy(
        update={
            "phase": said.get("phase", old.phase),
            "step": said.get("step", old.step),
            "next_pod": next_pod,
            "head": heads[0] if heads else None,
            "observed_generation": job.metadata.generation,
            "workers": WorkersStatus(ready=len(nodes), wanted=job.spec.workers.replicas),
            "conditions": _conditions(observed, old),
        }
    )
    return Plan(tuple(actions), status, _calm(status) != _calm(old), tuple(_happenings(old, status)))


def _lives(pod: Object) -> bool:
    return not pod["metadata"].get("deletionTimestamp") and not _ended(pod)


def _ended(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Failed", "Succeeded")


def _role(pod: Object) -> str:
    return str(pod["metadata"]["labels"][kube.ROLE_LABEL])


def _calm(status: TrainingJobStatus) -> TrainingJobStatus:
    return status.model_copy(update={"step": 0})


def _conditions(observed: Observed, old: TrainingJobStatus) -> tuple[Condition, ...]:
    trouble = observed.trouble
    if trouble is None:
        return ()
    if old.conditions and old.conditions[0].reason == trouble.reason:
        return old.conditions
    when = "2026-01-01T00:00:00Z"
    return (Condition(type="Ready", status="False", reason=trouble.reason, message=trouble.message, last_transition_time=when),)  # fmt: skip


def _happenings(old: TrainingJobStatus, new: TrainingJobStatus) -> list[Happening]:
    found = [Happening("Warning", condition.reason, condition.message) for condition in new.conditions]
    return found if new.phase == old.phase else [*found, Happening("Normal", new.phase, f"the job is {new.phase}")]


def _metadata(job: TrainingJob, name: str, **labels: str) -> dict[str, Any]:
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": job.metadata.name, "uid": job.metadata.uid}
    ours = {kube.MANAGED_BY_LABEL: kube.MANAGED_BY, kube.JOB_LABEL: job.metadata.name, **labels}
    return {"name": name, "labels": ours, "ownerReferences": [{**owner, "controller": True}]}


def _owned(observed: Observed, job: TrainingJob, head: str) -> list[Action]:
    """Service and Secret, applied when they differ."""
    name, found = job.metadata.name, observed.owned
    actions: list[Action] = []
    selector = {kube.POD_LABEL: head or "none"}
    service = found.get(("Service", kube.service_name(name)))
    if service is None or service["spec"]["selector"] != selector:
        spec = {"clusterIP": "None", "selector": selector, "ports": [{"name": "controller", "port": 8470}]}
        actions.append(Apply({"apiVersion": "v1", "kind": "Service", "metadata": _metadata(job, kube.service_name(name)), "spec": spec}))  # fmt: skip
    if ("Secret", kube.secret_name(name)) not in found:
        data = {kube.TOKEN_KEY: base64.b64encode(observed.new_token.encode()).decode()}
        actions.append(Apply({"apiVersion": "v1", "kind": "Secret", "metadata": _metadata(job, kube.secret_name(name)), "data": data}))  # fmt: skip
    return actions


def _pod(job: TrainingJob, role: str, index: int) -> Mapping[str, Any]:
    name = kube.pod_name(job.metadata.name, role, index)
    given = job.spec.workers.template.get("spec", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(job, name, **{kube.ROLE_LABEL: role, kube.POD_LABEL: name}),
        "spec": {"containers": [{"name": "outlast", "image": "training"}], **given},
    }
