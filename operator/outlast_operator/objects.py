"""A job's objects beside its Pods: Service, Secret, NetworkPolicy, disruption budget. Pure.

What is made is compared with what is there by the fields that are made (``agrees``): the API server fills in many
others, and a pass that applied for their sake would never end.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from outlast import kube
from outlast.api import API_VERSION, KIND, TrainingJob
from outlast_operator.model import Object, Settings


def job_labels(job: TrainingJob) -> dict[str, str]:
    """What everything of a job bears."""
    return {kube.JOB_LABEL: job.metadata.name, kube.MANAGED_BY_LABEL: kube.MANAGED_BY}


def node_selector(job: TrainingJob) -> dict[str, str]:
    """The labels of the job's node Pods."""
    return {kube.JOB_LABEL: job.metadata.name, kube.ROLE_LABEL: kube.NODE_ROLE}


def head_host(job: TrainingJob) -> str:
    """The host name under which the head in force is found."""
    return f"{kube.service_name(job.metadata.name)}.{job.metadata.namespace}.svc"


def metadata_of(job: TrainingJob, name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """An owned object's metadata. The owner's deletion is not blocked: that would need a right on its finalizers, and
    nothing of a job may stand in the way of its deletion."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid or "",
        "controller": True,
        "blockOwnerDeletion": False,
    }
    return {
        "name": name,
        "namespace": job.metadata.namespace,
        "labels": {**job_labels(job), **(labels or {})},
        "ownerReferences": [owner],
    }


def service(job: TrainingJob, head: str) -> dict[str, Any]:
    """The headless Service of the head Pod in force. Its addresses are published before the head is ready: nodes begin
    to connect when its ports are there."""
    ports = [
        {"name": "gcs", "port": kube.GCS_PORT, "targetPort": kube.GCS_PORT, "protocol": "TCP"},
        {"name": "controller", "port": kube.CONTROLLER_PORT, "targetPort": kube.CONTROLLER_PORT, "protocol": "TCP"},
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata_of(job, kube.service_name(job.metadata.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {kube.JOB_LABEL: job.metadata.name, kube.POD_LABEL: head},
            "ports": ports,
        },
    }


def secret(job: TrainingJob, token: str) -> dict[str, Any]:
    """The job's Secret. Raises ValueError without a token: it guards the job's controller, and Ray."""
    if not token:
        raise ValueError(f"no token for job {job.metadata.namespace}/{job.metadata.name}: Observed.new_token is empty")
    data = {kube.TOKEN_KEY: _encoded(token), kube.JOB_KEY: _encoded(job_json(job))}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata_of(job, kube.secret_name(job.metadata.name)),
        "type": "Opaque",
        "data": data,
    }


def job_json(job: TrainingJob) -> str:
    """The TrainingJob as its Pods read it: who it is and what is wanted, and nothing that changes by itself.

    Without defaults: an image that is older than the operator refuses a field that it does not know, and the definition
    writes every field that has a default into every job.
    """
    identity = job.metadata.model_dump(mode="json", by_alias=True, include={"name", "namespace", "uid", "labels"})
    tree = {
        "apiVersion": job.api_version,
        "kind": job.kind,
        "metadata": {key: value for key, value in identity.items() if value is not None},
        "spec": job.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True),
    }
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def kept_job(found: Object | None) -> str | None:
    """The ``job.json`` in a job's Secret; None when there is none that can be read."""
    return _decoded(found, kube.JOB_KEY)


def kept_token(found: Object | None) -> str | None:
    """The token in a job's Secret."""
    return _decoded(found, kube.TOKEN_KEY)


def network_policy(job: TrainingJob, settings: Settings) -> dict[str, Any]:
    """Who may reach the job's Pods: each other on all ports, the operator's on the controller's."""
    own = {"matchLabels": {kube.JOB_LABEL: job.metadata.name}}
    rules: list[dict[str, Any]] = [{"from": [{"podSelector": own}]}]
    if settings.operator_namespace:
        namespace = {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}}
        operator = {"namespaceSelector": namespace, "podSelector": {"matchLabels": dict(settings.operator_labels)}}
        rules.append({"from": [operator], "ports": [{"port": kube.CONTROLLER_PORT, "protocol": "TCP"}]})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata_of(job, job.metadata.name),
        "spec": {"podSelector": own, "policyTypes": ["Ingress"], "ingress": rules},
    }


def disruption_budget(job: TrainingJob) -> dict[str, Any]:
    """How many node Pods may be evicted at a time: as many as there are spares, one at least. A Pod that is not ready
    may always be: it holds nothing up, and would hold up the drain of its machine."""
    workers = job.spec.workers
    wanted = workers.replicas + workers.spares
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata_of(job, job.metadata.name),
        "spec": {
            "minAvailable": wanted - max(1, workers.spares),
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": node_selector(job)},
        },
    }


def agrees(wanted: Any, found: Any) -> bool:
    """Whether ``found`` has everything that ``wanted`` says: fields that only ``found`` has are somebody else's.

    The API server leaves out what is empty.
    """
    if isinstance(wanted, Mapping):
        there = {} if found is None else found
        return isinstance(there, Mapping) and all(agrees(value, there.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list):
        return _is_list(found) and len(wanted) == len(found) and all(map(agrees, wanted, found))
    return bool(wanted == found)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(found: Object | None, key: str) -> str | None:
    data = (found or {}).get("data") or {}
    try:
        return base64.b64decode(data[key], validate=True).decode() or None
    except (KeyError, ValueError, TypeError):
        return None
