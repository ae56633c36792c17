"""Everything about one job on one page (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainctl.catalogue import amount
from trainctl.columns import counted, facts, printable, section, table
from trainctl.jobview import age, job_facts, node_table, recovery_table
from trainctl.timeline import Entry, timeline

Object = Mapping[str, Any]

LAST_FAILURES = 10


def description(
    resource: Object,
    pods: Sequence[Object],
    live: Mapping[str, Any] | None,
    trouble: str,
    events: Sequence[Entry],
    now: float,
) -> str:
    """The page. ``live``: the controller's status; ``trouble``: why there is none."""
    status = resource.get("status") or {}
    heads = [pod for pod in pods if pod["metadata"]["name"].rpartition("-")[0].endswith("-head")]
    nodes = [pod for pod in pods if pod not in heads]
    note = f"\n(from the resource alone: {printable(trouble)})" if trouble else ""
    parts = [
        facts(_identity(resource, now)),
        section("Wanted", facts(spec_facts(resource["spec"]))),
        section("Now", facts(job_facts(resource, live, now)[1:]) + note),
        section("Conditions", _conditions(status.get("conditions") or (), now)),
        section("Head", node_table(None, heads)),
        section("Nodes", node_table(live, nodes)),
        section("Recoveries", recovery_table(live)),
        section("Failures", _failures(status.get("failures") or (), now)),
        section("Checkpoints", _checkpoints(resource, live, now)),
        section("Events", timeline(events)),
    ]
    return "\n\n".join(part for part in parts if part)


def spec_facts(spec: Object) -> list[tuple[str, str]]:
    """The specification in short: what a person asks first, and what was set besides."""
    workers, recovery = spec.get("workers") or {}, spec.get("recovery") or {}
    checkpoint, erasure = spec.get("checkpoint"), (spec.get("snapshot") or {}).get("erasure") or {}
    rows = [
        ("entrypoint", " ".join(map(str, spec.get("entrypoint") or ()))),
        ("environment", ", ".join(f"{item['name']}={item.get('value', '')}" for item in spec.get("env") or ())),
        ("image", ", ".join(_images(workers.get("template") or {}))),
        ("nodes", _nodes(workers)),
        ("ranks", f"{workers.get('replicas', 1) * workers.get('procsPerWorker', 1)}"),
        ("failure domain", str(workers.get("failureDomain") or "")),
        ("snapshots", _every((spec.get("snapshot") or {}).get("everySteps", "auto"), " steps") + _parity(erasure)),
        ("checkpoints", _store(checkpoint) if checkpoint else "none: snapshots in memory alone"),
        ("restarts", _restarts(recovery)),
        ("deadline", _seconds(spec.get("activeDeadlineSeconds"))),
        ("kept after end", _seconds(spec.get("ttlSecondsAfterFinished"))),
        ("faults", "allowed" if (spec.get("faults") or {}).get("allow") else ""),
        ("suspended", "yes" if spec.get("suspend") else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _identity(resource: Object, now: float) -> list[tuple[str, str]]:
    meta = resource["metadata"]
    labels = ", ".join(f"{key}={value}" for key, value in sorted((meta.get("labels") or {}).items()))
    rows = [
        ("Name", str(meta["name"])),
        ("Namespace", str(meta.get("namespace", "default"))),
        ("Created", f"{meta.get('creationTimestamp', '-')} ({age(meta.get('creationTimestamp'), now)} ago)"),
        ("Labels", labels),
        ("Code", str((meta.get("annotations") or {}).get("outlast.dev/code", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def _images(template: Object) -> list[str]:
    containers = (template.get("spec") or {}).get("containers") or ()
    return [str(container["image"]) for container in containers if container.get("image")]


def _nodes(workers: Object) -> str:
    least, spares = workers.get("minReplicas"), workers.get("spares", 0)
    procs = workers.get("procsPerWorker", 1)
    text = f"{workers.get('replicas', 1)} of {counted(procs, 'rank')} each"
    return (
        text
        + (f", at least {least}" if least is not None else "")
        + (f", {counted(spares, 'spare')}" if spares else "")
    )


def _parity(erasure: Object) -> str:
    told = [
        f"{name} {erasure[key]}" for key, name in (("parity", "parity"), ("groupSize", "groups of")) if key in erasure
    ]
    return f", {', '.join(told)}" if told else ""


def _store(checkpoint: Object) -> str:
    from_, interval = checkpoint.get("restoreFrom"), checkpoint.get("interval", "auto")
    every = _every(interval, " steps" if isinstance(interval, int) else "")
    kept = f", the last {checkpoint['keepLast']} kept" if "keepLast" in checkpoint else ""
    began = f", begun from {from_}" if from_ else ""
    return f"{checkpoint.get('url')}, {every}{kept}{began}"


def _every(interval: object, unit: str) -> str:
    return "at intervals chosen by measurement" if interval == "auto" else f"every {interval}{unit}"


def _restarts(recovery: Object) -> str:
    if "maxRestarts" not in recovery:
        return ""
    return f"at most {recovery['maxRestarts']} within {recovery.get('window', '1h')}"


def _seconds(value: object) -> str:
    return f"{value} s" if value is not None else ""


def _conditions(conditions: Sequence[Object], now: float) -> str:
    rows = [
        (
            item["type"],
            item["status"],
            item["reason"],
            age(item.get("lastTransitionTime"), now),
            item.get("message", ""),
        )
        for item in conditions
    ]
    return table(("TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"), rows) if rows else ""


def _failures(failures: Sequence[Object], now: float) -> str:
    rows = [
        (
            f"{age(item.get('time'), now)} ago",
            str(item.get("cause", "")),
            str(item.get("node") or ""),
            "" if item.get("rank") is None else str(item["rank"]),
            "" if item.get("step") is None else str(item["step"]),
            " ".join(str(item.get("message", "")).split()),
        )
        for item in failures[-LAST_FAILURES:]
    ]
    return table(("WHEN", "CAUSE", "NODE", "RANK", "STEP", "WHAT"), rows) if rows else ""


def _checkpoints(resource: Object, live: Mapping[str, Any] | None, now: float) -> str:
    newest = (resource.get("status") or {}).get("checkpoint")
    told = (live or {}).get("checkpoint") or {}
    rows = []
    if newest:
        rows.append(("newest", f"step {newest['step']}, {age(newest.get('time'), now)} ago, {newest.get('url', '')}"))
    if told:
        counts = (
            f"{told.get('count', 0)} made",
            f"{told.get('skipped', 0)} skipped",
            f"{told.get('failed', 0)} failed",
        )
        rows.append(("in this run", f"{', '.join(counts)}, {amount(told.get('bytes') or 0)} sent"))
    if told.get("last_error"):
        rows.append(("last trouble", str(told["last_error"])))
    return facts(rows)
