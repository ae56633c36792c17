"""``trainctl fault``: something is broken in a running job on purpose, once, at once.

Most kinds are the controller's to carry out; ``head-loss`` and ``pod-delete:SEAT`` are done here, by deleting a Pod.
"""

from __future__ import annotations

from outlast.errors import RequestError
from outlast.faults import AT_ONCE, names, parse_at_once, wrong
from trainctl.cluster.connection import Cluster
from trainctl.cluster.controller import controller_of
from trainctl.cluster.refusals import ClusterError
from trainctl.cluster.resources import JobRef, Object, core_path
from trainctl.cluster.where import Where
from trainctl.jobview import ENDED, phase_of

POD_DELETE, HEAD_LOSS = "pod-delete", "head-loss"


def inject(where: Where, name: str, fault: str) -> None:
    """Break it. Raises RequestError unless the fault is one, before anything is asked, and the job allows it."""
    check_form(fault)
    with Cluster(where) as cluster:
        job = JobRef(cluster, cluster.namespace, name)
        resource = job.get()
        check_allowed(resource)
        kind, _, target = fault.partition(":")
        if kind == HEAD_LOSS:
            _delete(job, _head(resource))
        elif kind == POD_DELETE:
            _delete(job, _seated(job, resource, target))
        else:
            _through_controller(job, resource, str(parse_at_once(fault)))
            print(f"{fault} asked of {job.name}: `trainctl events {job.name} --follow` tells what comes of it")


def check_form(fault: str) -> None:
    """Raises RequestError when it is none of a running job (pure). Which ranks and seats there are is seen later."""
    kind, colon, target = fault.partition(":")
    given = f"the fault {fault or '(none)'}"
    if kind == HEAD_LOSS:
        if colon:
            raise wrong(given, f"{HEAD_LOSS} takes no target")
    elif kind == POD_DELETE:
        if not (target.isascii() and target.isdecimal()):
            raise wrong(given, f"{POD_DELETE} needs a seat: {POD_DELETE}:0")
    elif kind.replace("-", "").isalpha() and kind not in AT_ONCE:
        known = f"{names(sorted(AT_ONCE))}, {POD_DELETE}, {HEAD_LOSS}"
        raise wrong(given, f"unknown kind {kind}: a running job can be asked for {known}")
    else:
        parse_at_once(fault)


def check_allowed(resource: Object) -> None:
    """Raises RequestError when the job does not take faults, or takes none any more (pure)."""
    meta = resource["metadata"]
    if not (resource["spec"].get("faults") or {}).get("allow"):
        raise RequestError(
            f'the TrainingJob "{meta["name"]}" does not allow faults (spec.faults.allow is false): set it to true '
            "before the job starts; of one that runs, before it is suspended and resumed"
        )
    if phase_of(resource) in ENDED:
        raise RequestError(
            f'the TrainingJob "{meta["name"]}" has ended ({phase_of(resource)}): there is nothing to break'
        )


def _through_controller(job: JobRef, resource: Object, fault: str) -> None:
    """Ask it. Which ranks and seats there are now, the controller knows."""
    client = controller_of(job, resource)
    try:
        client.fault(fault)
    finally:
        client.close()


def _head(resource: Object) -> str:
    pod = (resource.get("status") or {}).get("head")
    if not pod:
        raise ClusterError(f'the TrainingJob "{resource["metadata"]["name"]}" has no head Pod to lose')
    return str(pod)


def _seated(job: JobRef, resource: Object, target: str) -> str:
    """The Pod that has a seat, as the controller says."""
    replicas = int((resource["spec"].get("workers") or {}).get("replicas", 1))
    if int(target) >= replicas:
        raise RequestError(f"{POD_DELETE}:{target}: a seat is needed, 0 to {replicas - 1}")
    client = controller_of(job, resource)
    try:
        nodes = client.status().get("nodes") or {}
    finally:
        client.close()
    found = [str(node["node"]) for node in nodes.values() if node.get("seat") == int(target)]
    if not found:
        raise ClusterError(
            f"seat {target} of {job.name} has no node now: `trainctl status {job.name}` shows who has which"
        )
    return found[0]


def _delete(job: JobRef, pod: str) -> None:
    """At once, as a lost machine would: without the grace in which a node hands over."""
    job.cluster.delete(core_path(job.namespace, "pods", pod), {"gracePeriodSeconds": 0})
    print(f"Pod {pod} deleted")
