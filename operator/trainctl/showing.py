"""``trainctl status``: one job, or all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from outlast.errors import RequestError
from trainctl.cluster.connection import Cluster
from trainctl.cluster.controller import ask_status
from trainctl.cluster.resources import JobRef, Object, jobs_path, list_all
from trainctl.cluster.where import Where
from trainctl.columns import facts, printable, section
from trainctl.jobview import ENDED, job_facts, job_table, node_table, phase_of, recovery_table
from trainctl.output import Form, dumped, name_of, plain, write_objects


def show_jobs(where: Where, *, everywhere: bool, watch: bool, form: Form | None) -> None:
    """List the jobs of the namespace, or of all namespaces."""
    with Cluster(where) as cluster:
        namespace = None if everywhere else cluster.namespace
        if watch:
            from trainctl.watching import follow_jobs

            follow_jobs(cluster, namespace, form)
            return
        found = list_all(cluster, jobs_path(namespace))
        text = job_table(found, time.time(), namespaces=everywhere, wide=form is Form.WIDE)
        if not found and form in (None, Form.WIDE):
            text = "there are no TrainingJobs" + ("" if namespace is None else f' in namespace "{namespace}"')
        write_objects(found, form, lambda: text, as_list=True)


def show_job(where: Where, name: str, *, everywhere: bool, watch: bool, form: Form | None) -> None:
    """Show one job, with what its controller says where that can be asked."""
    if everywhere:
        raise RequestError(f"-A {name}: a job is looked for in one namespace: say which with -n")
    with Cluster(where) as cluster:
        job = JobRef(cluster, cluster.namespace, name)
        if watch:
            from trainctl.watching import follow_job

            follow_job(job, form)
            return
        resource = job.get()
        if form is Form.NAME:
            print(name_of(resource))
            return
        live, trouble = (None, "") if phase_of(resource) in ENDED else ask_status(job, resource)
        if form in (Form.JSON, Form.YAML):
            told = {**plain(resource), "controller": live, "controllerTrouble": trouble or None}
            print(dumped(told, form))
            return
        pods = job.pods() if form is Form.WIDE or live is not None else []
        print(job_page(resource, live, trouble, pods, time.time()))


def job_page(resource: Object, live: Mapping[str, Any] | None, trouble: str, pods: Sequence[Object], now: float) -> str:
    """One job as text (pure)."""
    heads = f"{resource['metadata']['name']}-head-"
    nodes = [pod for pod in pods if not str(pod["metadata"]["name"]).startswith(heads)]
    parts = [
        facts(job_facts(resource, live, now)),
        section("Nodes", node_table(live, nodes)),
        section("Recoveries", recovery_table(live)),
        f"(from the resource alone: {printable(trouble)})" if trouble else "",
    ]
    return "\n\n".join(part for part in parts if part)
