"""What several commands take: which cluster, which job, which form. It imports no Kubernetes: help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainctl.cluster.where import Where
from trainctl.completion import complete_jobs
from trainctl.output import Form as OutputForm

Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", help="The namespace [the context's].", show_default=False),
]
Context = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The kubeconfig's context [the current one].", show_default=False),
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The kubeconfig [KUBECONFIG, else ~/.kube/config].", show_default=False),
]
Form = Annotated[OutputForm | None, typer.Option("--output", "-o", help="How to write it.", show_default=False)]
Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.", autocompletion=complete_jobs)]


def where_of(context: typer.Context, namespace: str | None, name: str | None, kubeconfig: Path | None) -> Where:
    """What was said at the command, and where it says nothing, before it."""
    above = context.obj if isinstance(context.obj, Where) else Where()
    return Where(namespace, name, kubeconfig).over(above)
