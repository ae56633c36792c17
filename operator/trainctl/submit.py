"""``trainctl submit``: packs the code, sends the job, makes the code the job's own, and follows it if asked to."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from outlast.errors import OutlastError, RequestError
from trainctl.cluster.connection import Cluster, Json
from trainctl.cluster.refusals import Absent, Conflict, Forbidden
from trainctl.cluster.resources import JobRef, core_path, jobs_path
from trainctl.cluster.where import Where
from trainctl.columns import facts
from trainctl.jobfile import read_text
from trainctl.lifecycle import delete_job, wait_gone
from trainctl.output import Form, dumped, name_of, plain
from trainctl.submission import Prepared, Submission, is_job_file, prepare

REPLACE_S = 300.0
"""How long ``--replace`` waits for the old job's Pods to be gone: the new ones bear their names."""


def submit(where: Where, asked: Submission, *, dry_run: str, replacing: bool, follow: bool, form: Form | None) -> int:
    """Submit a job; the exit status. ``dry_run``: nothing, "client" or "server"; ``follow``: to the job's end."""
    asked = _with_text(asked)
    if dry_run == "client":
        return _show(prepare(asked, _namespace(where, asked)), form)
    with Cluster(where) as cluster:
        prepared = prepare(asked, cluster.namespace)
        if dry_run == "server":
            made = _checked(cluster, prepared, replacing)
            _note(prepared)
            _say(made, form, f"{name_of(made)} would be created (the server has checked it)")
            return 0
        job = JobRef(cluster, prepared.namespace, prepared.name)
        _note(prepared)
        _make_room(job, prepared, replacing)
        made = _create(job, prepared)
        _say(made, form, f"{name_of(made)} created")
        return _follow(job, form) if follow else 0


def _with_text(asked: Submission) -> Submission:
    if not is_job_file(asked.source):
        return asked
    try:
        text = sys.stdin.read() if str(asked.source) == "-" else read_text(asked.source)
    except UnicodeDecodeError as error:
        raise RequestError("standard input: it is no text") from error
    return replace(asked, text=text)


def _namespace(where: Where, asked: Submission) -> str:
    """The namespace for a dry run here: no cluster is asked, and none need be."""
    from trainctl.cluster.kubeconfig import find_cluster

    if asked.namespace:
        return asked.namespace
    try:
        return find_cluster(where, credentials=False).namespace
    except RequestError:
        if where.context or where.kubeconfig:
            raise
        return "default"


def _show(prepared: Prepared, form: Form | None) -> int:
    """What would be sent: the job, and the ConfigMap with its code. kubectl applies it."""
    _note(prepared)
    objects = [prepared.job]
    if prepared.packed is not None:
        print("note: a ConfigMap that kubectl makes of this stays when the job is deleted", file=sys.stderr)
        objects.append(prepared.packed.config_map(prepared.name, prepared.namespace))
    match form:
        case Form.NAME:
            print(name_of(prepared.job))
        case Form.JSON if len(objects) > 1:
            print(dumped({"apiVersion": "v1", "kind": "List", "items": objects}, form))
        case Form.JSON:
            print(dumped(prepared.job, form))
        case _:
            print("\n---\n".join(dumped(item, Form.YAML) for item in objects))
    return 0


def _note(prepared: Prepared) -> None:
    for note in prepared.notes:
        print(f"note: {note}", file=sys.stderr)


def _say(made: Json, form: Form | None, text: str) -> None:
    match form:
        case Form.JSON | Form.YAML:
            print(dumped(plain(made), form))
        case Form.NAME:
            print(name_of(made))
        case _:
            print(text, flush=True)


def _strict(dry_run: str | None = None) -> dict[str, Any]:
    return {"fieldValidation": "Strict", "fieldManager": "trainctl", "dryRun": dry_run}


def _make_room(job: JobRef, prepared: Prepared, replacing: bool) -> None:
    """See that there is no job of this name. Raises Conflict when there is one and it shall not be replaced, and what
    the API server objects to in the new one."""
    try:
        old = job.get()
    except Absent:
        return
    phase = (old.get("status") or {}).get("phase") or "Pending"
    if not replacing:
        raise Conflict(
            f'there is a TrainingJob "{job.name}" in namespace "{job.namespace}" already ({phase}): give this one '
            "another --name, or delete that one first with --replace"
        )
    _rehearse(job, prepared)
    print(facts([("replacing", f"{name_of(old)} ({phase})")]), file=sys.stderr)
    delete_job(job, old)
    wait_gone(job, old, REPLACE_S)
    store = (old["spec"].get("checkpoint") or {}).get("url")
    if store:
        print(
            f"note: the checkpoints of the old job stay in {store}/{job.namespace}/{job.name}; a store that holds them "
            "is refused to a new job of that name, unless it says spec.checkpoint.resume: true and goes on from them",
            file=sys.stderr,
        )


def _checked(cluster: Cluster, prepared: Prepared, replacing: bool) -> Json:
    """The job as the API server would take it. Raises what its refusal is."""
    if not replacing:
        return cluster.post(jobs_path(prepared.namespace), prepared.job, _strict("All"))
    made = _rehearse(JobRef(cluster, prepared.namespace, prepared.name), prepared)
    return {**made, "metadata": {**made["metadata"], "name": prepared.name}}


def _rehearse(job: JobRef, prepared: Prepared) -> Json:
    """Have the API server check the new job, under a name that is free: the old one is not deleted for one that is
    refused. Raises what the refusal is."""
    metadata = {**prepared.job["metadata"], "name": f"{job.name[:40]}-{secrets.token_hex(4)}"}
    try:
        return job.cluster.post(jobs_path(job.namespace), {**prepared.job, "metadata": metadata}, _strict("All"))
    except Forbidden as error:
        if "exceeded quota" not in str(error):  # in which the old job counts
            raise
        return prepared.job


def _create(job: JobRef, prepared: Prepared) -> Json:
    """Code first, for Pods that start at once find it; then the job; then the code is made the job's own."""
    stored = None if prepared.packed is None else _send_code(job, prepared)
    try:
        made = job.cluster.post(jobs_path(job.namespace), prepared.job, _strict())
    except OutlastError:
        if stored is not None:
            _quietly(lambda: _delete_code(job, stored))
        raise
    if stored is not None:
        _own(job, made, stored)
    return made


def _send_code(job: JobRef, prepared: Prepared) -> Json:
    """The ConfigMap. One of the same content may be there: left over, or of a job that is gone."""
    assert prepared.packed is not None
    wanted = prepared.packed.config_map(job.name, job.namespace)
    path = core_path(job.namespace, "configmaps")
    try:
        return job.cluster.post(path, wanted)
    except Conflict:
        there = job.cluster.get(f"{path}/{wanted['metadata']['name']}")
        same = all(there.get(part) == wanted.get(part) for part in ("data", "binaryData"))
        if same and not there["metadata"].get("ownerReferences"):
            return there
        _delete_code(job, there)
        return job.cluster.post(path, wanted)


def _delete_code(job: JobRef, config_map: Json) -> None:
    meta = config_map["metadata"]
    path = core_path(job.namespace, "configmaps", meta["name"])
    try:
        job.cluster.delete(path, {"preconditions": {"uid": meta["uid"]}})
    except (Absent, Conflict):
        pass  # it is gone, or another


def _quietly(undo: Callable[[], None]) -> None:
    """Take back what was done before an error that is about to be told: a second one would hide it."""
    try:
        undo()
    except OutlastError as error:
        print(f"note: what was sent before remains: {error}", file=sys.stderr)


def _own(job: JobRef, made: Json, config_map: Json) -> None:
    """With its owner the ConfigMap goes too."""
    owner = {
        "apiVersion": made["apiVersion"],
        "kind": made["kind"],
        "name": made["metadata"]["name"],
        "uid": made["metadata"]["uid"],
    }
    path = core_path(job.namespace, "configmaps", config_map["metadata"]["name"])
    job.cluster.merge(path, {"metadata": {"ownerReferences": [owner]}})


def _follow(job: JobRef, form: Form | None) -> int:
    from trainctl.watching import follow_job

    began = time.monotonic()
    try:
        phase = follow_job(job, form)
    except KeyboardInterrupt:
        print(f"the job goes on: trainctl status {job.name} -n {job.namespace} --watch", file=sys.stderr)
        raise
    print(f"{phase} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0 if phase == "Succeeded" else 1
