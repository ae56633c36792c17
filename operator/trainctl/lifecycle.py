"""Changing a job that is there: suspend, resume, scale, delete. Each change names its field and touches no other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from outlast.errors import RequestError
from outlast.quantities import parse_duration
from trainctl.cluster.connection import Cluster, Json
from trainctl.cluster.refusals import Absent, ClusterError
from trainctl.cluster.resources import JobRef, Object
from trainctl.cluster.where import Where
from trainctl.columns import counted, facts, printable
from trainctl.jobview import ENDED, phase_of, unseen, why
from trainctl.merging import Ended, Merged
from trainctl.output import Form, dumped, name_of, plain


def limit_of(wait: bool, timeout: str) -> float | None:
    """How long to wait, in seconds; None: not at all. Raises RequestError when ``timeout`` is no duration."""
    try:
        limit_s = parse_duration(timeout)
    except ValueError as error:
        raise RequestError(f"--timeout: {error}") from error
    return limit_s if wait else None


def set_suspend(where: Where, name: str, suspend: bool, *, wait_s: float | None, form: Form | None) -> None:
    """Suspend or resume a job; ``wait_s``: see it done, within so long."""
    with Cluster(where) as cluster:
        job = JobRef(cluster, cluster.namespace, name)
        before = job.get()
        word = "suspended" if suspend else "resumed"
        if phase_of(before) in ENDED:
            raise RequestError(f'the TrainingJob "{name}" has ended ({phase_of(before)}): it cannot be {word}')
        already = bool(before["spec"].get("suspend", False)) == suspend
        after = before if already else job.change({"spec": {"suspend": suspend}})
        if wait_s is None or form in (None, Form.WIDE):
            _say(after, form, f"{name_of(after)} {'is ' + word + ' already' if already else word}")
        if suspend and not already and not before["spec"].get("checkpoint"):
            print("note: the job has no store (spec.checkpoint): what its memory holds is lost", file=sys.stderr)
        if wait_s is not None:
            done = _suspended if suspend else _going
            generation = int(after["metadata"].get("generation") or 0)
            seen = _wait(job, lambda seen: done(seen, generation), wait_s, f"to be {word}")
            _say(seen, form, f"{name_of(seen)} is {phase_of(seen)}" + (f" ({why(seen)})" if why(seen) else ""))
            if phase_of(seen) == "Failed" or (suspend and phase_of(seen) in ENDED):
                raise ClusterError(f'the TrainingJob "{name}" has ended ({phase_of(seen)}): it is not {word}')


def scale(
    where: Where,
    name: str,
    nodes: int | None,
    least: int | None,
    spares: int | None,
    *,
    form: Form | None,
) -> None:
    """Set the numbers of nodes that are given."""
    change = {"replicas": nodes, "minReplicas": least, "spares": spares}
    given = {field: number for field, number in change.items() if number is not None}
    if not given:
        raise RequestError("scale: say how many: --nodes, --min-nodes or --spares")
    with Cluster(where) as cluster:
        job = JobRef(cluster, cluster.namespace, name)
        before = job.get()
        if phase_of(before) in ENDED:
            raise RequestError(f'the TrainingJob "{name}" has ended ({phase_of(before)}): it has no nodes to scale')
        workers = {"replicas": 1, "spares": 0, **(before["spec"].get("workers") or {})}
        if all(workers.get(field) == number for field, number in given.items()):
            _say(before, form, f"{name_of(before)} has {_numbers(before)} already")
            return
        if set(given) == {"replicas"}:
            job.change({"spec": {"replicas": nodes}}, "scale")
            after = job.get()
        else:
            after = job.change({"spec": {"workers": given}})
        _say(after, form, f"{name_of(after)} scaled: {_numbers(before)} -> {_numbers(after)}")


def delete(where: Where, names: list[str], *, wait_s: float | None, form: Form | None) -> None:
    """Delete jobs, each once, naming what goes and what stays."""
    if form not in (None, Form.NAME):
        raise RequestError(f"delete -o {form}: write name or nothing")
    with Cluster(where) as cluster:
        jobs = [JobRef(cluster, cluster.namespace, name) for name in dict.fromkeys(names)]
        found = [(job, job.get()) for job in jobs]
        for job, resource in found:
            delete_job(job, resource)
            if form is Form.NAME:
                print(name_of(resource))
            else:
                print(f"{name_of(resource)} deleted")
                print(facts(what_goes(resource), indent="  "), flush=True)
        for job, resource in found if wait_s is not None else ():
            assert wait_s is not None
            wait_gone(job, resource, wait_s)


def delete_job(job: JobRef, resource: Object) -> None:
    """Delete this very job, not another that has taken its name since."""
    options = {"propagationPolicy": "Background", "preconditions": {"uid": resource["metadata"]["uid"]}}
    job.cluster.delete(job.path, options)


def what_goes(resource: Object) -> list[tuple[str, str]]:
    """What a deletion takes along, and what it leaves (pure)."""
    meta, spec, status = resource["metadata"], resource["spec"], resource.get("status") or {}
    workers = spec.get("workers") or {}
    nodes = int(workers.get("replicas", 1)) + int(workers.get("spares", 0))
    goes = f"its Pods ({nodes} nodes and the head), Service, Secret, NetworkPolicy and disruption budget"
    rows = [("goes", goes + ("; its packed code" if meta.get("annotations", {}).get("outlast.dev/code") else ""))]
    store = (spec.get("checkpoint") or {}).get("url")
    if status.get("step") is not None and phase_of(resource) not in ENDED:
        rows.append(("lost", f"{_what_is_lost(store, status)} (it is at step {status['step']})"))
    if store:
        url = f"{store.rstrip('/')}/{meta.get('namespace', 'default')}/{meta['name']}"
        rows.append(("stays", f"its checkpoints and logs at {url}"))
    return rows


def _what_is_lost(store: str | None, status: Object) -> str:
    if status.get("checkpoint"):
        return "what it has done since its newest checkpoint"
    return "all that it has done: it has no checkpoint" + ("" if store else ", for it has no store")


def wait_gone(job: JobRef, resource: Object, limit_s: float) -> None:
    """Wait until the job and its Pods are gone. Raises ClusterError that names what is still there."""
    merged = Merged()
    merged.add("job", _until_another(job, resource["metadata"]["uid"]))
    merged.add("pods", _until_none(job, resource["metadata"]["uid"]))
    left: dict[str, object] = {"job": [job.name], "pods": ["?"]}
    deadline = time.monotonic() + limit_s
    while merged.open:
        arrived = merged.next(max(0.0, deadline - time.monotonic()))
        if arrived is None:
            still = ", ".join(f"{what} {names}" for what, names in left.items() if what in merged.open)
            raise ClusterError(f'after {limit_s:g} s the TrainingJob "{job.name}" is not gone: {still}')
        what, item = arrived
        if isinstance(item, Ended):
            if item.error is not None and not isinstance(item.error, Absent):
                raise item.error
        else:
            left[what] = item


def _until_another(job: JobRef, uid: str) -> Iterator[list[str]]:
    for resource in job.watch_itself():
        if resource["metadata"]["uid"] != uid:
            return
        yield [job.name]


def _until_none(job: JobRef, uid: str) -> Iterator[list[str]]:
    """Names of the Pods that this job owns, until there are none."""
    for pods in job.watch_pods():
        mine = [
            pod["metadata"]["name"]
            for pod in pods
            if any(owner.get("uid") == uid for owner in pod["metadata"].get("ownerReferences") or ())
        ]
        if not mine:
            return
        yield mine


def _wait(job: JobRef, done: Callable[[Object], bool], limit_s: float, what: str) -> Json:
    """The resource, once ``done`` says so. Raises ClusterError after ``limit_s``."""
    merged = Merged()
    merged.add("job", job.watch_itself())
    deadline = time.monotonic() + limit_s
    seen: Any = None
    while (arrived := merged.next(max(0.0, deadline - time.monotonic()))) is not None:
        _, item = arrived
        if isinstance(item, Ended):
            raise item.error or ClusterError(f'the watch on the TrainingJob "{job.name}" ended')
        seen = item
        if done(item):
            return dict(item)
    state = "it has not been seen" if seen is None else _state(seen, time.time())
    raise ClusterError(f'after {limit_s:g} s the TrainingJob "{job.name}" is not seen {what}: {state}')


def _state(resource: Object, now: float) -> str:
    told = [text for text in (why(resource), unseen(resource, now)) if text]
    return f"it is {phase_of(resource)}" + (f": {'; '.join(told)}" if told else "")


def _suspended(resource: Object, generation: int) -> bool:
    return phase_of(resource) in ENDED or (phase_of(resource) == "Suspended" and _knows(resource, generation))


def _going(resource: Object, generation: int) -> bool:
    return phase_of(resource) in ENDED or (phase_of(resource) == "Running" and _knows(resource, generation))


def _knows(resource: Object, generation: int) -> bool:
    """Whether its status was written by who had seen that generation of the specification."""
    return int((resource.get("status") or {}).get("observedGeneration") or 0) >= generation


def _numbers(resource: Object) -> str:
    workers = resource["spec"].get("workers") or {}
    least, spares = workers.get("minReplicas"), workers.get("spares", 0)
    return (
        counted(workers.get("replicas", 1), "node")
        + (f", at least {least}" if least is not None else "")
        + (f", {counted(spares, 'spare')}" if spares else "")
    )


def _say(resource: Object, form: Form | None, text: str) -> None:
    match form:
        case Form.JSON | Form.YAML:
            print(dumped(plain(resource), form))
        case Form.NAME:
            print(name_of(resource))
        case _:
            print(printable(text), flush=True)
