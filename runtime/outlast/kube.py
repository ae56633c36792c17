"""What a job's Pods and the operator promise each other: names, labels, ports, folders and variables.

Imported by the operator that makes the Pods, by ``outlast.pod`` that runs in them, and by ``trainctl``. Nothing here
imports Kubernetes.
"""

from __future__ import annotations

DOMAIN = "outlast.dev"

JOB_LABEL = f"{DOMAIN}/job"
"""On everything of a job: the job's name."""
ROLE_LABEL = f"{DOMAIN}/role"
"""On Pods: ``head`` or ``node``."""
HEAD_ROLE, NODE_ROLE = "head", "node"
POD_LABEL = f"{DOMAIN}/pod"
"""On Pods: the Pod's own name, by which the job's Service selects the head that is in force."""
MANAGED_BY_LABEL, MANAGED_BY = "app.kubernetes.io/managed-by", "outlast"
"""On everything the operator makes: what its caches hold."""
VERSION_ANNOTATION = f"{DOMAIN}/version"
"""On Pods: the version of the operator that made them."""
REPLACES_ANNOTATION = f"{DOMAIN}/replaces"
"""On Pods: the one in whose place it was made, if that was known."""
ENDED_SOON_ANNOTATION = f"{DOMAIN}/ended-soon"
"""On Pods: how many in that place, one after the other up to it, ended soon after they were made."""
CODE_ANNOTATION = f"{DOMAIN}/code"
"""On a TrainingJob: the ConfigMap that ``trainctl submit`` packed its code into."""

LONGEST_JOB_NAME = 50
"""Bytes of a job's name in Kubernetes: its Pods' names are host names, which have at most 63."""

GCS_PORT = 6379
CONTROLLER_PORT = 8470
"""The controller's HTTP in the head Pod; ``/healthz`` needs no token, everything else the job's."""
NODE_PORT = 8471
"""A node Pod's ``/healthz``: 200 once the controller knows the node, 503 before."""

CONTAINER = "outlast"
"""The container of a template that trains; if none is called so, the first one is it."""

JOB_FOLDER = "/etc/outlast"
"""The job's Secret, mounted in every Pod of it."""
TOKEN_KEY, JOB_KEY = "token", "job.json"
"""Keys of that Secret: the bearer token (also Ray's), and the TrainingJob as JSON (by alias)."""
MEMORY_FOLDER = "/dev/shm"
"""A memory-backed emptyDir in node Pods: images and parity; outlives the container."""
RUN_FOLDER = "/run/outlast"
"""An emptyDir: sockets, logs, Ray's files, the controller's folder; outlives the container."""

POD_VARIABLE = "OUTLAST_POD"
"""metadata.name: also the node's id."""
POD_IP_VARIABLE = "OUTLAST_POD_IP"
MACHINE_VARIABLE = "OUTLAST_MACHINE"
"""spec.nodeName."""
HEAD_VARIABLE = "OUTLAST_HEAD"
"""In node Pods: the host name under which the head in force is found."""
GRACE_VARIABLE = "OUTLAST_GRACE_S"
"""Seconds from SIGTERM until a Pod is killed."""
MEMORY_VARIABLE = "OUTLAST_MEMORY_BYTES"
"""In node Pods: what the memory volume holds, where that is limited."""

GRACE_S = 60
"""terminationGracePeriodSeconds of node Pods whose template names none."""


def service_name(job: str) -> str:
    """The headless Service by which the head in force is found."""
    return f"{job}-head"


def secret_name(job: str) -> str:
    """The Secret with the job's token and its TrainingJob."""
    return f"{job}-outlast"


def pod_name(job: str, role: str, index: int) -> str:
    """A Pod's name; indices grow and are not used again."""
    return f"{job}-{role}-{index}"


def pod_index(name: str) -> int:
    """The index in a Pod's name. Raises ValueError when it has none."""
    return int(name.rpartition("-")[2])
