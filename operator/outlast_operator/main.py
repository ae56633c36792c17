"""``outlast-operator``: looks after the TrainingJobs of a cluster. Flags alone say how; no environment variable does.

Exit status: 0 after SIGTERM or SIGINT, 1 when leadership was lost, 2 when it cannot begin.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from outlast.errors import OutlastError, RequestError
from outlast.kube import CONTROLLER_PORT
from outlast_operator.model import Settings
from outlast_operator.plan import plan
from outlast_operator.poller import PollSettings
from outlast_operator.replica import Options, own_identity
from outlast_operator.serving import LEVELS, Ports, serve, set_up_logging, terms_of


def labels_in(text: str) -> dict[str, str]:
    """Labels written as ``key=value,key=value``. Raises RequestError."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not key or not equals for key, equals, _ in pairs):
        raise RequestError(f"--operator-labels {text}: write key=value,key=value")
    return {key.strip(): value.strip() for key, _, value in pairs}


def main(
    training_image: Annotated[str, typer.Option(help="Image of jobs whose template names none.")],
    namespace: Annotated[
        list[str] | None, typer.Option(help="Look after the jobs of this namespace only; repeatable [all].")
    ] = None,
    image_pull_policy: Annotated[str, typer.Option(help="Of the training image.")] = "IfNotPresent",
    operator_namespace: Annotated[
        str, typer.Option(help="The operator's own namespace: jobs' NetworkPolicies let it in, and the Lease is there.")
    ] = "default",
    operator_labels: Annotated[
        str, typer.Option(metavar="K=V,K=V", help="Labels of the operator's Pods, for jobs' NetworkPolicies.")
    ] = "",
    lease: Annotated[str, typer.Option("--lease", "--lease-name", help="The Lease by which one leads.")] = (
        "outlast-operator"
    ),
    lease_namespace: Annotated[str | None, typer.Option(help="Where the Lease is [--operator-namespace].")] = None,
    lease_seconds: Annotated[int, typer.Option(min=5, help="A silent leader is replaced after so long.")] = 15,
    identity: Annotated[str | None, typer.Option(help="Tells operators apart [host name and chance].")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Jobs that are handled at a time.")] = 4,
    metrics_port: Annotated[int, typer.Option(help="/metrics.")] = 8080,
    health_port: Annotated[int, typer.Option(help="/healthz and /readyz.")] = 8081,
    controller_port: Annotated[int, typer.Option(help="Where head Pods' controllers listen.")] = CONTROLLER_PORT,
    controller_connections: Annotated[int, typer.Option(min=1, help="Controllers that are asked at a time.")] = 1000,
    kubeconfig: Annotated[str | None, typer.Option(help="The cluster [the one this Pod runs in].")] = None,
    log_level: Annotated[str, typer.Option(help=", ".join(LEVELS) + ".")] = "info",
) -> None:
    """Looks after the TrainingJobs of a cluster."""
    set_up_logging(log_level)
    settings = Settings(
        version=version("outlast"),
        training_image=training_image,
        image_pull_policy=image_pull_policy,
        operator_namespace=operator_namespace,
        operator_labels=labels_in(operator_labels),
    )
    where = lease_namespace or operator_namespace
    terms = terms_of(lease, where, identity or own_identity(), lease_seconds)
    poll = PollSettings(controller_port, controller_connections)
    options = Options(settings, terms, tuple(namespace or ()), workers, poll)
    serve(options, lambda observed, now: plan(observed, settings, now), kubeconfig, Ports(metrics_port, health_port))


def run() -> None:
    """The console script."""
    try:
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command()(main)
        app()
    except (OutlastError, OSError) as error:
        print(f"outlast-operator: {error}", file=sys.stderr)
        raise SystemExit(2) from error
