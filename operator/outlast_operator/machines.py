"""What a Node object says of the machine: whether its Pods can be counted on, and its failure domain. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from outlast_operator.model import Object
from outlast_operator.timestamps import read_or_none

_GONE_TAINTS: Mapping[str, str] = {
    "node.kubernetes.io/unreachable": "is unreachable",
    "node.kubernetes.io/not-ready": "is not ready",
    "node.kubernetes.io/out-of-service": "is out of service",
    "node.cloudprovider.kubernetes.io/shutdown": "is shut down",
}
"""Taints of machines whose Pods cannot be counted on; the first two also come without NoExecute, while one starts."""


def why_lost(machine: Object) -> str:
    """Why Pods on the machine count as lost, as a predicate ("is not ready"); "" when they do not."""
    for taint in machine.get("spec", {}).get("taints") or ():
        if taint.get("key") in _GONE_TAINTS and taint.get("effect") == "NoExecute":
            return _GONE_TAINTS[taint["key"]]
    ready = _ready(machine)
    if ready is None or ready.get("status") == "True":
        return ""
    return "is unreachable" if ready.get("status") == "Unknown" else "is not ready"


def domain_of(machine: Object, label: str | None) -> str:
    """The failure domain: the value of ``label``; a machine without it, or a job that names none, is one by itself."""
    metadata = machine["metadata"]
    found = (metadata.get("labels") or {}).get(label) if label else None
    return str(found or metadata["name"])


def doubted_until(machines: Iterable[Object], heard_at: float | None, patience_s: float) -> float | None:
    """Until when it is not believed that machines are lost; None: it is.

    When *all* of a job's machines (two at least) are said to be lost at once, it is more likely that the API server has
    lost them than that they are gone (the node lifecycle controller stops evictions for the same reason). A controller
    that has answered since proves it; else it is doubted for ``patience_s`` seconds.
    """
    found = list(machines)
    if len(found) < 2 or not all(why_lost(machine) for machine in found):
        return None
    since = max((lost_since(machine) or 0.0 for machine in found), default=0.0)
    return max(since, heard_at or 0.0) + patience_s


def lost_since(machine: Object) -> float | None:
    """When a machine that is lost became so, in wall seconds, as far as it says so: its condition, else its taints."""
    ready = _ready(machine) or {}
    if ready.get("status") not in (None, "True"):
        return read_or_none(ready.get("lastTransitionTime"))
    taints = machine.get("spec", {}).get("taints") or ()
    times = [read_or_none(taint.get("timeAdded")) for taint in taints if taint.get("key") in _GONE_TAINTS]
    return max((time for time in times if time is not None), default=None)


def _ready(machine: Object) -> Object | None:
    conditions = machine.get("status", {}).get("conditions") or ()
    return next((condition for condition in conditions if condition.get("type") == "Ready"), None)
