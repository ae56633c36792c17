"""What people want to know of a TrainingJob, as text: a line of a list, and the facts of one (pure).

``resource`` is the API server's JSON, ``live`` the controller's /status where it could be had: what that says is newer,
but what the resource adds up over all controllers of the job is the resource's. ``now`` is in wall seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trainctl.catalogue import ago
from trainctl.columns import NOTHING, table
from trainctl.status import summarize

Object = Mapping[str, Any]

COLUMNS = ("NAME", "PHASE", "STEP", "NODES", "GOODPUT", "RESTARTS", "SNAPSHOT", "CHECKPOINT", "AGE")
WIDE = ("ATTEMPT", "STARTED", "ENDED", "WHY", "STORE")
ENDED = ("Succeeded", "Failed")
LAST_RECOVERIES = 10
LOOKED_AT_WITHIN_S = 10.0
"""After so long a specification that no operator has looked at is told."""


def job_table(resources: Sequence[Object], now: float, *, namespaces: bool = False, wide: bool = False) -> str:
    """One line for each job, in the order of namespace and name."""
    ordered = sorted(resources, key=lambda item: (item["metadata"].get("namespace", ""), item["metadata"]["name"]))
    columns = (*(("NAMESPACE",) if namespaces else ()), *COLUMNS, *(WIDE if wide else ()))
    return table(columns, [job_cells(item, now, namespaces=namespaces, wide=wide) for item in ordered])


def job_cells(resource: Object, now: float, *, namespaces: bool = False, wide: bool = False) -> list[str]:
    """A job's cells in ``job_table``."""
    meta, status = resource["metadata"], resource.get("status") or {}
    cells = [
        meta["name"],
        phase_of(resource),
        _progress(status.get("step"), status.get("totalSteps")),
        _workers(resource),
        _percent(status.get("goodput")),
        str(status.get("restartCount", 0)),
        _newest(status.get("snapshot"), now),
        _newest(status.get("checkpoint"), now),
        age(meta.get("creationTimestamp"), now),
    ]
    if namespaces:
        cells.insert(0, meta.get("namespace", ""))
    return cells + _wide(resource, now) if wide else cells


def phase_of(resource: Object) -> str:
    """The phase; of a job that the operator has not looked at yet, Pending."""
    return str((resource.get("status") or {}).get("phase") or "Pending")


def why(resource: Object) -> str:
    """The reason and message of the condition that matters in this phase; nothing when all is well."""
    conditions = {item["type"]: item for item in (resource.get("status") or {}).get("conditions") or ()}
    for kind in ("Failed", "Suspended", "Recovering", "Succeeded"):
        found = conditions.get(kind)
        if found and found["status"] == "True":
            return _told(found)
    ready = conditions.get("Ready")
    return _told(ready) if ready and ready["status"] != "True" else ""


def unseen(resource: Object, now: float) -> str:
    """That no operator has looked at the job's specification since it was written; nothing when one has, or may yet."""
    meta, status = resource["metadata"], resource.get("status") or {}
    written = _written_at(meta)
    if meta.get("deletionTimestamp") or written is None or now - written <= LOOKED_AT_WITHIN_S:
        return ""
    observed, generation = status.get("observedGeneration"), int(meta.get("generation") or 0)
    if observed is not None and int(observed) >= generation:
        return ""
    return (
        f"no operator has looked at it for {ago(now - written)}: does one run? "
        "(kubectl get pods -A -l app.kubernetes.io/name=outlast)"
    )


def job_facts(resource: Object, live: Mapping[str, Any] | None, now: float) -> list[tuple[str, str]]:
    """(name, value) of one job, in the order to show them. Of a job that has ended the resource has the last word."""
    live = None if phase_of(resource) in ENDED else live
    status = resource.get("status") or {}
    rows = [("job", f"{resource['metadata'].get('namespace', 'default')}/{resource['metadata']['name']}")]
    if live is not None:
        summary = dict(summarize(_over_all_controllers(live, status)).rows())
        rows += [(name, value) for name, value in summary.items() if value != NOTHING]
    else:
        rows += _facts_of_status(resource, now)
    told = {"why": why(resource) if live is None or status.get("phase") else "", "note": unseen(resource, now)}
    rows[2:2] = [(name, value) for name, value in told.items() if value]
    restarts = status.get("restarts") or (live or {}).get("restarts") or {}
    if restarts:
        rows.append(("restarts", ", ".join(f"{count} x {cause}" for cause, count in sorted(restarts.items()))))
    digest = (live or {}).get("weights_digest") or status.get("weightsDigest")
    if digest:
        rows.append(("weights", str(digest)))
    return rows


def node_table(live: Mapping[str, Any] | None, pods: Sequence[Object]) -> str:
    """The job's Pods with what the controller makes of them: those with seats first. Nothing when there are none."""
    nodes = {str(node["node"]): node for node in ((live or {}).get("nodes") or {}).values()}
    by_name = {pod["metadata"]["name"]: pod for pod in pods}
    rows = [
        _node_cells(name, nodes.get(name), by_name.get(name))
        for name in sorted({*nodes, *by_name}, key=lambda name: _node_order(name, nodes.get(name)))
    ]
    return table(("POD", "SEAT", "STATE", "POD PHASE", "MACHINE", "DOMAIN", "KEEPER"), rows) if rows else ""


def recovery_table(live: Mapping[str, Any] | None) -> str:
    """The last recoveries, the newest last. Nothing when there were none, or nobody can tell."""
    records = ((live or {}).get("recoveries") or [])[-LAST_RECOVERIES:]
    rows = [
        (
            str(record.get("attempt", NOTHING)),
            str(record.get("kind", "")),
            seconds(record.get("total_s")),
            str(record["lost_steps"]) if record.get("lost_steps") is not None else "",
            ", ".join(f"{count} {source}" for source, count in (record.get("restore_sources") or {}).items()),
            str(record.get("cause", "")),
        )
        for record in records
    ]
    return table(("ATTEMPT", "KIND", "TOOK", "LOST STEPS", "STATE FROM", "CAUSE"), rows) if rows else ""


def age(time: str | None, now: float) -> str:
    """How long ago an RFC 3339 time is."""
    return NOTHING if not time else ago(max(0.0, now - wall(time)))


def wall(time: str) -> float:
    """Wall seconds of an RFC 3339 time."""
    return datetime.fromisoformat(time).timestamp()


def seconds(value: object) -> str:
    """Such as "1.23 s"."""
    return f"{value:.2f} s" if isinstance(value, int | float) else NOTHING


def pod_state(pod: Object) -> str:
    """A Pod's phase, or what holds it: the reason of its scheduling or of its containers."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    for container in status.get("containerStatuses") or ():
        waiting = (container.get("state") or {}).get("waiting")
        if waiting and waiting.get("reason"):
            return str(waiting["reason"])
    unscheduled = [
        item["reason"]
        for item in status.get("conditions") or ()
        if item["type"] == "PodScheduled" and item["status"] == "False" and item.get("reason")
    ]
    return str(unscheduled[0] if unscheduled else status.get("reason") or status.get("phase") or NOTHING)


def _wide(resource: Object, now: float) -> list[str]:
    status = resource.get("status") or {}
    store = (status.get("checkpoint") or {}).get("url") or (resource["spec"].get("checkpoint") or {}).get("url")
    return [
        str(status.get("attempt") or NOTHING),
        age(status.get("startTime"), now),
        age(status.get("completionTime"), now),
        why(resource).partition(":")[0],
        store or "",
    ]


def _written_at(meta: Object) -> float | None:
    """When the specification was last written, in wall seconds; who writes a status has no part in it."""
    times = [
        item["time"]
        for item in meta.get("managedFields") or ()
        if item.get("time") and item.get("subresource") != "status" and "f:spec" in (item.get("fieldsV1") or {})
    ]
    is_edited = int(meta.get("generation") or 0) > 1
    if times and is_edited:
        return max(map(wall, times))
    return wall(meta["creationTimestamp"]) if meta.get("creationTimestamp") else None


def _over_all_controllers(live: Mapping[str, Any], status: Object) -> dict[str, Any]:
    """What the controller says, but for what the resource knows of those before it too. One that has just taken over
    has counted nothing yet, and knows neither step nor attempt."""
    known = {
        "phase": status.get("phase"),
        "goodput": status.get("goodput"),
        "total": live.get("total") or status.get("totalSteps"),
    }
    is_behind = _is_behind(live, status)
    known |= {name: status.get(name) for name in ("step", "attempt") if is_behind or not live.get(name)}
    return {**live, **{name: value for name, value in known.items() if value is not None}}


def _is_behind(live: Mapping[str, Any], status: Object) -> bool:
    """Whether the resource has heard more of this very controller. A later attempt may begin at an earlier step."""
    identity = live.get("controller")
    if not identity or identity != (status.get("controller") or {}).get("identity"):
        return False
    here, there = ((told.get("attempt") or 0, told.get("step") or 0) for told in (live, status))
    return bool(here < there)


def _facts_of_status(resource: Object, now: float) -> list[tuple[str, str]]:
    status = resource.get("status") or {}
    return [
        ("phase", phase_of(resource)),
        ("step", _progress(status.get("step"), status.get("totalSteps"))),
        ("nodes", _workers(resource)),
        ("attempt", str(status.get("attempt") or NOTHING)),
        ("snapshot", _newest(status.get("snapshot"), now)),
        ("checkpoint", _newest(status.get("checkpoint"), now)),
        ("goodput", _percent(status.get("goodput"))),
    ]


def _node_cells(name: str, node: Object | None, pod: Object | None) -> list[str]:
    told = node or {}
    seat = told.get("seat")
    return [
        name,
        NOTHING if seat is None else str(seat),
        str(told.get("state", "")) + (f" ({told['reason']})" if told.get("reason") else ""),
        pod_state(pod) if pod else "gone",
        str((pod or {}).get("spec", {}).get("nodeName") or ""),
        str(told.get("domain") or ""),
        str(told.get("keeper", "")),
    ]


def _node_order(name: str, node: Object | None) -> tuple[float, int, str]:
    seat = (node or {}).get("seat")
    index = name.rpartition("-")[2]
    return (float("inf") if seat is None else float(seat), int(index) if index.isdecimal() else 0, name)


def _told(condition: Object) -> str:
    message = condition.get("message", "")
    return f"{condition['reason']}: {message}" if message else str(condition["reason"])


def _progress(step: object, total: object) -> str:
    return NOTHING if step is None else f"{step}/{total}" if total else str(step)


def _workers(resource: Object) -> str:
    """Nodes that train or could at once, of those wanted, and spares: "3/4 +1"."""
    workers = (resource.get("status") or {}).get("workers") or {}
    wanted = workers.get("wanted") or (resource["spec"].get("workers") or {}).get("replicas", 1)
    spares = workers.get("spares", 0)
    return f"{workers.get('ready', 0)}/{wanted}" + (f" +{spares}" if spares else "")


def _percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else NOTHING


def _newest(kept: Object | None, now: float) -> str:
    if not kept:
        return NOTHING
    return f"step {kept.get('step', NOTHING)}, {age(kept.get('time'), now)} ago"
