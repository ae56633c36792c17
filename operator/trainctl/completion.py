"""Completing job names in a shell: the cluster is asked once, briefly; when it does not answer, there is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from trainctl.cluster.where import Where

PATIENCE_S = 1.5


def complete_jobs(context: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Names of jobs that begin with ``incomplete``, in the namespace of the line that is being typed."""
    del args
    from outlast.errors import OutlastError

    try:
        return [name for name in job_names(_where(context)) if name.startswith(incomplete)]
    except OutlastError:
        return []


def job_names(where: Where) -> Sequence[str]:
    """The names of a namespace's jobs. Raises OutlastError."""
    from trainctl.cluster.connection import Cluster
    from trainctl.cluster.resources import jobs_path

    with Cluster(where, patience_s=PATIENCE_S) as cluster:
        found = cluster.get(jobs_path(cluster.namespace), {"limit": 200}, verb="list")
    return [item["metadata"]["name"] for item in found.get("items") or ()]


def _where(context: typer.Context) -> Where:
    """What stands on the line already, at the command or before it."""
    found = Where()
    at: Any = context
    while at is not None:
        given = at.params
        kubeconfig = given.get("kubeconfig")
        found = found.over(
            Where(given.get("namespace"), given.get("context"), Path(kubeconfig) if kubeconfig else None)
        )
        at = at.parent
    return found
