"""The kinds of objects that the operator reads and writes, and where the API server has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outlast.api import API_VERSION, KIND


@dataclass(frozen=True)
class Kind:
    """``api_version`` as in manifests; ``ours``: only those that the operator made are of interest."""

    name: str
    api_version: str
    plural: str
    namespaced: bool = True
    ours: bool = True

    def path(self, namespace: str | None = None, name: str = "", part: str = "") -> str:
        """The path of all of them (in one namespace), of one of them, or of its ``part`` (``status``)."""
        root = "/api/" if "/" not in self.api_version else "/apis/"
        within = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{root}{self.api_version}{within}/{self.plural}" + "".join(f"/{x}" for x in (name, part) if x)


JOB = Kind(KIND, API_VERSION, "trainingjobs", ours=False)
POD = Kind("Pod", "v1", "pods")
SERVICE = Kind("Service", "v1", "services")
SECRET = Kind("Secret", "v1", "secrets")
POLICY = Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies")
BUDGET = Kind("PodDisruptionBudget", "policy/v1", "poddisruptionbudgets")
MACHINE = Kind("Node", "v1", "nodes", namespaced=False, ours=False)
EVENT = Kind("Event", "v1", "events")
LEASE = Kind("Lease", "coordination.k8s.io/v1", "leases")

OWNED = (SERVICE, SECRET, POLICY, BUDGET)
"""What a job has beside its Pods."""
CACHED = (JOB, POD, *OWNED, MACHINE)
BY_NAME: Mapping[str, Kind] = {kind.name: kind for kind in (*CACHED, EVENT, LEASE)}


def kind_of(obj: Mapping[str, Any]) -> Kind:
    """The kind that ``obj`` names. Raises KeyError for one that the operator never writes."""
    return BY_NAME[obj["kind"]]
