"""What the caches keep of an object: what a pass may read, and nothing else. 8,000 Pods then take 65 MiB, not 250.

=========  =========================================================================================================
all        ``metadata`` without ``managedFields`` and kubectl's copy of the object; ``generation`` of jobs alone (that
           of a NetworkPolicy grows when one that is equal is applied, and a pass for its sake would apply it again)
Pod        of ``spec``: ``nodeName``, ``terminationGracePeriodSeconds``, and of its containers name, image, resources;
           of ``status``: all but image ids and addresses beside ``podIP``
Node       of ``metadata``: name, uid, labels, ``deletionTimestamp``; of ``spec``: ``taints``, ``unschedulable``; of
           ``status``: conditions without their heartbeats
=========  =========================================================================================================

Of what a job has beside its Pods, ``status`` goes. The rest is kept as it is.
``same`` tells whether anything that is kept has changed: a Node's heartbeat has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from outlast_operator.kinds import JOB, MACHINE, OWNED, POD, Kind
from outlast_operator.model import Object

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_METADATA = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "labels",
    "annotations",
    "finalizers",
    "ownerReferences",
)
_MACHINE_METADATA = ("name", "uid", "resourceVersion", "labels", "deletionTimestamp")
_POD_SPEC = ("nodeName", "terminationGracePeriodSeconds", "schedulingGates", "hostNetwork")
_CONTAINER = ("name", "image", "resources")
_POD_STATUS = ("phase", "reason", "message", "podIP", "startTime", "conditions")
_STATUSES = ("initContainerStatuses", "containerStatuses")
_CONTAINER_STATUS = ("name", "state", "lastState", "ready", "started", "restartCount")


def pruned(kind: Kind, obj: Object) -> dict[str, Any]:
    """``obj`` as the caches keep it, with its ``kind`` (which lists leave out). A new object; ``obj`` may be let go."""
    return {"kind": kind.name, "apiVersion": kind.api_version, **_PRUNERS.get(kind, _anything)(obj)}


def same(one: Object | None, other: Object) -> bool:
    """Whether two versions of an object agree in everything that is kept."""
    if one is None:
        return False
    rest = {key: value for key, value in one.items() if key != "metadata"}
    if rest != {key: value for key, value in other.items() if key != "metadata"}:
        return False
    ours, theirs = dict(one["metadata"]), dict(other["metadata"])
    ours.pop("resourceVersion", None)
    theirs.pop("resourceVersion", None)
    return ours == theirs


def _some(tree: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The names are the module's own strings, so that 8,000 objects share them."""
    return {name: tree[name] for name in names if name in tree}


def _anything(obj: Object) -> dict[str, Any]:
    rest = {key: value for key, value in obj.items() if key not in ("kind", "apiVersion", "metadata")}
    metadata = _some(obj["metadata"], _METADATA)
    annotations = metadata.get("annotations")
    if annotations and LAST_APPLIED in annotations:
        metadata["annotations"] = {key: value for key, value in annotations.items() if key != LAST_APPLIED}
    return {"metadata": metadata, **rest}


def _pod(obj: Object) -> dict[str, Any]:
    spec, status = obj.get("spec", {}), obj.get("status", {})
    kept_status = _some(status, _POD_STATUS)
    for name in _STATUSES:
        if name in status:
            kept_status[name] = [_some(container, _CONTAINER_STATUS) for container in status[name]]
    return {
        "metadata": _some(obj["metadata"], _METADATA),
        "spec": {
            **_some(spec, _POD_SPEC),
            "containers": [_some(container, _CONTAINER) for container in spec.get("containers", ())],
        },
        "status": kept_status,
    }


def _machine(obj: Object) -> dict[str, Any]:
    conditions = [
        {key: value for key, value in condition.items() if key != "lastHeartbeatTime"}
        for condition in obj.get("status", {}).get("conditions", ())
    ]
    return {
        "metadata": _some(obj["metadata"], _MACHINE_METADATA),
        "spec": _some(obj.get("spec", {}), ("taints", "unschedulable")),
        "status": {"conditions": conditions},
    }


def _owned(obj: Object) -> dict[str, Any]:
    found = _anything(obj)
    found.pop("status", None)
    return found


def _job(obj: Object) -> dict[str, Any]:
    found = _anything(obj)
    generation = obj["metadata"].get("generation", 0)
    return {**found, "metadata": {**found["metadata"], "generation": generation}}


_PRUNERS: Mapping[Kind, Callable[[Object], dict[str, Any]]] = {
    JOB: _job,
    POD: _pod,
    MACHINE: _machine,
    **dict.fromkeys(OWNED, _owned),
}
