"""A job's Pods out of its templates. Pure; ``DESIGN.md`` says what is added, ``template`` what is refused.

The container that trains gets the command, variables, mounts and probes; whatever else a template has stays as it is.
Both probes of a node are lenient: a machine that is busy is not dead, and a node that waits for its head is well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outlast import kube
from outlast.api import TrainingJob
from outlast_operator import memory, template
from outlast_operator.headtemplate import head_template
from outlast_operator.model import Settings
from outlast_operator.objects import head_host, metadata_of, node_selector
from outlast_operator.restricted import restrict
from outlast_operator.template import Problem, containers, main_index, pod_spec

_COMMANDS = {kube.HEAD_ROLE: "outlast.pod.head", kube.NODE_ROLE: "outlast.pod.node"}
_PORTS = {kube.HEAD_ROLE: kube.CONTROLLER_PORT, kube.NODE_ROLE: kube.NODE_PORT}
_DEFAULT_DOMAIN = "kubernetes.io/hostname"
_READABLE = 0o444
"""The Secret's files: the Pod's user is the template's choice, and nobody else is in the container."""


def problems(job: TrainingJob) -> list[Problem]:
    """Why no Pods can be made for the job: its templates, and the sum of memory."""
    found = template.problems(job)
    if found:
        return found
    spec = pod_spec(job.spec.workers.template)
    at = main_index(containers(spec))
    path = f"{template.WORKERS_PATH}.spec.containers[{at}].resources.limits.memory"
    try:
        wrong = _memory(job, containers(spec)[at]).problem
    except ValueError as error:
        wrong = str(error)
    return [(path, wrong)] if wrong else []


def node_pod(
    job: TrainingJob, settings: Settings, index: int, notes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A node Pod with the annotations ``notes``. The job must have no ``problems``."""
    return _pod(job, settings, kube.NODE_ROLE, index, job.spec.workers.template, notes or {})


def head_pod(
    job: TrainingJob, settings: Settings, index: int, notes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A head Pod with the annotations ``notes``. The job must have no ``problems``."""
    return _pod(job, settings, kube.HEAD_ROLE, index, head_template(job.spec), notes or {})


def _pod(
    job: TrainingJob, settings: Settings, role: str, index: int, source: Mapping[str, Any], notes: Mapping[str, str]
) -> dict[str, Any]:
    name, given = kube.pod_name(job.metadata.name, role, index), source.get("metadata") or {}
    metadata = metadata_of(job, name, {kube.ROLE_LABEL: role, kube.POD_LABEL: name})
    metadata["labels"] = {**(given.get("labels") or {}), **metadata["labels"]}
    metadata["annotations"] = {**(given.get("annotations") or {}), kube.VERSION_ANNOTATION: settings.version, **notes}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": _spec(job, settings, role, pod_spec(source)),
    }


def _spec(job: TrainingJob, settings: Settings, role: str, given: Mapping[str, Any]) -> dict[str, Any]:
    found = [dict(one) for one in containers(given)]
    main = found[main_index(found)]
    size = _memory(job, main).volume if role == kube.NODE_ROLE else None
    spec = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": kube.GRACE_S,
        **given,
        "restartPolicy": "OnFailure",
        "containers": found,
        "volumes": [*(given.get("volumes") or ()), *_volumes(job, role, size)],
    }
    if role == kube.NODE_ROLE:
        spec["topologySpreadConstraints"] = _spread(job, given.get("topologySpreadConstraints") or ())
    _fill_main(main, job, settings, role, spec["terminationGracePeriodSeconds"], size)
    restrict(spec, main)
    return spec


def _memory(job: TrainingJob, main: Mapping[str, Any]) -> memory.MemorySum:
    return memory.memory_sum(job.spec.snapshot.max_memory, main.get("resources") or {})


def _volumes(job: TrainingJob, role: str, size: int | None) -> list[dict[str, Any]]:
    source = {"secretName": kube.secret_name(job.metadata.name), "defaultMode": _READABLE}
    volumes: list[dict[str, Any]] = [
        {"name": template.JOB_VOLUME, "secret": source},
        {"name": template.RUN_VOLUME, "emptyDir": {}},
    ]
    if role == kube.NODE_ROLE:
        limit = {} if size is None else {"sizeLimit": str(size)}
        volumes.append({"name": template.MEMORY_VOLUME, "emptyDir": {"medium": "Memory", **limit}})
    return volumes


def _spread(job: TrainingJob, given: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Nodes in different failure domains, as far as there is room; unless the template says how."""
    key = job.spec.workers.failure_domain or _DEFAULT_DOMAIN
    if any(one.get("topologyKey") == key for one in given):
        return list(given)
    own = {
        "maxSkew": 1,
        "topologyKey": key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": node_selector(job)},
    }
    return [*given, own]


def _fill_main(
    main: dict[str, Any], job: TrainingJob, settings: Settings, role: str, grace: int, size: int | None
) -> None:
    """What the container that trains gets, whether or not the template has it."""
    if not main.get("image"):
        main["image"] = settings.training_image
        main.setdefault("imagePullPolicy", settings.image_pull_policy)
    # -P: a secrets.py or logging.py of the user's, in the working directory, is theirs alone.
    main["command"] = ["python", "-P", "-m", _COMMANDS[role]]
    main["env"] = [*_variables(job, role, grace, size), *(main.get("env") or ())]
    folders = template.VOLUMES.items()
    mounts = [
        {"name": name, "mountPath": folder, **({"readOnly": True} if name == template.JOB_VOLUME else {})}
        for name, folder in folders
        if role == kube.NODE_ROLE or name != template.MEMORY_VOLUME
    ]
    main["volumeMounts"] = [*(main.get("volumeMounts") or ()), *mounts]
    for name, probe in _probes(role).items():
        main.setdefault(name, probe)


def _variables(job: TrainingJob, role: str, grace: int, size: int | None) -> list[dict[str, Any]]:
    fields = {
        kube.POD_VARIABLE: "metadata.name",
        kube.POD_IP_VARIABLE: "status.podIP",
        kube.MACHINE_VARIABLE: "spec.nodeName",
    }
    texts = {kube.GRACE_VARIABLE: str(grace)}
    if role == kube.NODE_ROLE:
        texts[kube.HEAD_VARIABLE] = head_host(job)
        texts |= {} if size is None else {kube.MEMORY_VARIABLE: str(size)}
    references = [
        {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}
        for name, path in fields.items()
    ]
    return [*references, *({"name": name, "value": text} for name, text in texts.items())]


def _probes(role: str) -> dict[str, dict[str, Any]]:
    """A node's /healthz is 503 until the controller knows it: its liveness asks only whether anybody listens."""
    port = _PORTS[role]
    asked = {"httpGet": {"path": "/healthz", "port": port, "scheme": "HTTP"}}
    listening = {"tcpSocket": {"port": port}} if role == kube.NODE_ROLE else asked
    return {
        "readinessProbe": {**asked, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 5},
        "livenessProbe": {**listening, "periodSeconds": 20, "timeoutSeconds": 15, "failureThreshold": 15},
    }
