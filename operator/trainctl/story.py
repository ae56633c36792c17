"""``trainctl events`` and ``describe``: what has happened to a job, and everything about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from outlast.errors import RequestError
from trainctl.cluster.connection import Cluster
from trainctl.cluster.controller import WAIT_S, ControllerClient, all_events, ask_status, controller_of
from trainctl.cluster.refusals import ClusterError
from trainctl.cluster.resources import JobRef, Object, core_path
from trainctl.cluster.resources import follow as follow_all
from trainctl.cluster.where import Where
from trainctl.columns import printable
from trainctl.describing import description
from trainctl.merging import Ended, Merged
from trainctl.output import Form, dumped, one_of_many, plain
from trainctl.timeline import Entry, line, merged, of_controller, of_kubernetes, timeline
from trainctl.watching import AGAIN_S, Latest

SHOWN = 20
"""Events at the end of a description."""


def show_events(where: Where, name: str, *, follow: bool, form: Form | None) -> None:
    """Print a job's events in the order of time."""
    if form is Form.NAME:
        raise RequestError("events -o name: write json, yaml or nothing")
    with Cluster(where) as cluster:
        job = JobRef(cluster, cluster.namespace, name)
        resource = job.get()
        log, trouble = _event_log(job, resource)
        events = job.events(resource)
        entries = merged(events, log)
        if trouble and not (follow and form):
            print(f"note: without the controller's event log: {printable(trouble)}", file=sys.stderr)
        if not follow:
            _print_all(entries, form)
            return
        for entry in entries:
            _print_one(entry, form)
        seen = {event["metadata"]["uid"]: event["metadata"]["resourceVersion"] for event in events}
        _follow(job, resource, seen, max((int(event["seq"]) for event in log), default=0), form)


def describe(where: Where, name: str, form: Form | None) -> None:
    """Print everything about one job."""
    with Cluster(where) as cluster:
        job = JobRef(cluster, cluster.namespace, name)
        resource = job.get()
        if form is Form.NAME:
            raise RequestError("describe -o name: write json, yaml or nothing")
        pods = job.pods()
        live, trouble = ask_status(job, resource)
        log, _ = _event_log(job, resource) if live is not None else ([], "")
        events = merged(job.events(resource), log)
        if form in (Form.JSON, Form.YAML):
            told = {
                "job": plain(resource),
                "pods": [plain(pod) for pod in pods],
                "controller": live,
                "controllerTrouble": trouble or None,
                "events": [entry.to_json() for entry in events],
            }
            print(dumped(told, form))
            return
        print(description(resource, pods, live, trouble, events[-SHOWN:], time.time()))


def _event_log(job: JobRef, resource: Object) -> tuple[list[dict[str, Any]], str]:
    """The controller's event log, or nothing and why."""
    client: ControllerClient | None = None
    try:
        client = controller_of(job, resource)
        return list(all_events(client)), ""
    except (ClusterError, RequestError) as error:
        return [], str(error)
    finally:
        if client is not None:
            client.close()


def _print_all(entries: Sequence[Entry], form: Form | None) -> None:
    if form in (Form.JSON, Form.YAML):
        print(dumped({"events": [entry.to_json() for entry in entries]}, form))
    else:
        print(timeline(entries) or "nothing has happened yet")


def _print_one(entry: Entry, form: Form | None) -> None:
    match form:
        case Form.JSON | Form.YAML:
            print(one_of_many(entry.to_json(), form), flush=True)
        case _:
            print(line(entry), flush=True)


def _follow(job: JobRef, resource: Object, seen: dict[str, str], after: int, form: Form | None) -> None:
    """Events as they come, until interrupted or until the job is deleted. ``seen``: versions of Events by uid."""
    sources, latest = Merged(), Latest()
    path = core_path(job.namespace, "events")
    sources.add("resource", job.watch_itself())
    sources.add("job", follow_all(job.cluster, path, {"fieldSelector": job.event_selector}))
    sources.add("pods", follow_all(job.cluster, path, {"fieldSelector": "involvedObject.kind=Pod"}))
    sources.add("log", _log_from(job, latest, after))
    while True:
        arrived = sources.next()
        assert arrived is not None
        source, item = arrived
        if isinstance(item, Ended):
            if item.error is not None:
                raise item.error
        elif source == "resource":
            latest.put(item)
        elif source == "log":
            _print_one(of_controller(item), form)
        else:
            _print_new([event for event in item.values() if job.is_about(event, resource)], seen, form)


def _print_new(events: Iterable[Object], seen: dict[str, str], form: Form | None) -> None:
    """Those of ``events`` that have not been printed in this version."""
    new = []
    for event in events:
        meta = event["metadata"]
        if seen.get(meta["uid"]) != meta["resourceVersion"]:
            seen[meta["uid"]] = meta["resourceVersion"]
            new.append(of_kubernetes(event))
    for entry in sorted(new):
        _print_one(entry, form)


def _log_from(job: JobRef, latest: Latest, after: int) -> Iterator[Mapping[str, Any]]:
    """The event log as it grows; a controller that is away is asked again when the job has changed, or soon after."""
    version = 0
    while True:
        resource, version = latest.newer(version, AGAIN_S)
        if resource is None:
            continue
        client: ControllerClient | None = None
        try:
            client = controller_of(job, resource)
            while True:
                for event in client.events(after, WAIT_S):
                    after = int(event["seq"])
                    yield event
        except (ClusterError, RequestError):
            continue
        finally:
            if client is not None:
                client.close()
