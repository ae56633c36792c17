"""The commands for jobs in a cluster. Each one's work is in a module that only it imports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from trainctl.arguments import Context, Form, Job, Kubeconfig, Namespace, where_of
from trainctl.completion import complete_jobs

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


class DryRun(StrEnum):
    """Who looks at a job that is not to be made."""

    NONE = "none"
    CLIENT = "client"
    SERVER = "server"


class _Submit(TyperCommand):
    """``--dry-run`` by itself means client, as kubectl once had it; a value may stand behind it, or an equals sign."""

    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, list(_with_value(args[:end])) + args[end:])


def _with_value(words: Sequence[str]) -> Iterator[str]:
    """The words, ``--dry-run`` and its value as one of them."""
    taken = False
    for word, after in zip(words, [*words, ""][1:], strict=True):
        if taken:
            taken = False
        elif word == "--dry-run":
            taken = after in list(DryRun)
            yield f"{word}={after if taken else DryRun.CLIENT.value}"
        else:
            yield word


@app.command("submit", cls=_Submit)
def submit(
    ctx: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(metavar="JOB.yaml|SCRIPT.py", help="A TrainingJob, - for one on standard input, or a script."),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGS]", help="The script's arguments.")] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The job's name; overrides the file's.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set a field, such as spec.workers.spares=2; repeatable."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Nodes that train.", show_default=False)] = None,
    spares: Annotated[int | None, typer.Option(metavar="N", help="Nodes that wait for a lost one's place.")] = None,
    min_nodes: Annotated[int | None, typer.Option(metavar="N", help="The fewest nodes to go on with.")] = None,
    procs_per_node: Annotated[int | None, typer.Option(metavar="N", help="Ranks on a node [its GPUs, else 1].")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="GPUs of a node (nvidia.com/gpu).")] = None,
    cpu: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Processors requested for a node, such as 4.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Memory of a node, requested and limit, such as 16Gi.")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="IMAGE", help="The training image [the operator's own].")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of every rank; repeatable.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A Secret whose entries become variables, such as the store's credentials; repeatable.",
        ),
    ] = None,
    store: Annotated[str | None, typer.Option(metavar="URL", help="Checkpoints go there: s3://bucket/prefix.")] = None,
    snapshot_every: Annotated[
        str | None, typer.Option(metavar="STEPS|auto", help="From one snapshot to the next.")
    ] = None,
    checkpoint_every: Annotated[
        str | None, typer.Option(metavar="STEPS|TIME|auto", help="From one checkpoint to the next.")
    ] = None,
    code: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Send the files of this folder; ranks start in it.")
    ] = None,
    no_code: Annotated[bool, typer.Option("--no-code", help="Send nothing: the script is in the image.")] = False,
    dry_run: Annotated[
        DryRun,
        typer.Option(
            "--dry-run", help="Make nothing: print the YAML (client), or have the server check it (--dry-run=server)."
        ),
    ] = DryRun.NONE,
    replacing: Annotated[bool, typer.Option("--replace", help="Delete a job of the same name first.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", "--wait", help="Follow the job to its end; exit status 1 if it fails.")
    ] = False,
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Submit a training job to a cluster: from a YAML file, or a script and flags.

    A script, or with --code a folder, is sent along as a ConfigMap when it is small (900 KiB).
    """
    from trainctl.submission import Flags, Submission
    from trainctl.submit import submit as send

    flags = Flags(
        nodes,
        spares,
        min_nodes,
        procs_per_node,
        gpus,
        cpu,
        memory,
        image,
        tuple(env or ()),
        tuple(secret or ()),
        store,
        snapshot_every,
        checkpoint_every,
    )
    where = where_of(ctx, namespace, context, kubeconfig)
    asked = Submission(
        source=source,
        name=name,
        namespace=where.namespace,
        overrides=tuple(override or ()),
        flags=flags,
        arguments=tuple(arguments or ()),
        code=code,
        no_code=no_code,
    )
    dry = "" if dry_run is DryRun.NONE else dry_run.value
    raise typer.Exit(send(where, asked, dry_run=dry, replacing=replacing, follow=watch, form=output))


@app.command("status")
def status(
    ctx: typer.Context,
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="[JOB]", help="The job's name [all jobs].", autocompletion=complete_jobs, show_default=False
        ),
    ] = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="The jobs of all namespaces.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing what changes; of one job until it ends.")
    ] = False,
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show how one job is, or list all of them."""
    from trainctl.showing import show_job, show_jobs

    where = where_of(ctx, namespace, context, kubeconfig)
    if job is None:
        show_jobs(where, everywhere=everywhere, watch=watch, form=output)
    else:
        show_job(where, job, everywhere=everywhere, watch=watch, form=output)


@app.command("describe")
def describe(
    ctx: typer.Context,
    job: Job,
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Tell everything about a job: what is wanted, how it is, its nodes, recoveries, failures, checkpoints, events."""
    from trainctl.story import describe as tell

    tell(where_of(ctx, namespace, context, kubeconfig), job, output)


@app.command("logs")
def logs(
    ctx: typer.Context,
    job: Job,
    rank: Annotated[
        int | None, typer.Argument(metavar="[RANK]", min=0, help="Which rank [0].", show_default=False)
    ] = None,
    all_ranks: Annotated[
        bool, typer.Option("--all-ranks", help="All ranks, each line with its rank before it.")
    ] = False,
    head: Annotated[bool, typer.Option("--head", help="Not ranks: Ray's head and the controller.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on to the job's end, across restarts and lost nodes.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(metavar="A", min=1, help="Of that attempt [the newest].", show_default=False)
    ] = None,
    previous: Annotated[bool, typer.Option("--previous", "-p", help="Of the attempt before.")] = False,
    tail: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="The last N lines alone.", show_default=False)
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Lines so recent, such as 10m.", show_default=False)
    ] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="When each line was written.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print what a rank wrote; of Pods that are gone, from the job's store."""
    from trainctl.logs import log_request, show_logs

    asked = log_request(
        rank,
        all_ranks=all_ranks,
        head=head,
        follow=follow,
        attempt=attempt,
        previous=previous,
        tail=tail,
        since=since,
        timestamps=timestamps,
    )
    show_logs(where_of(ctx, namespace, context, kubeconfig), job, asked)


@app.command("events")
def events(
    ctx: typer.Context,
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until interrupted.")] = False,
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Tell what has happened to a job: Kubernetes' Events and the controller's, in the order of time."""
    from trainctl.story import show_events

    show_events(where_of(ctx, namespace, context, kubeconfig), job, follow=follow, form=output)


Wait = Annotated[bool, typer.Option("--wait", help="Return when it is so.")]
Timeout = Annotated[str, typer.Option("--timeout", metavar="DURATION", help="How long --wait waits.")]


@app.command("suspend")
def suspend(
    ctx: typer.Context,
    job: Job,
    wait: Wait = False,
    timeout: Timeout = "5m",
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Checkpoint a job and give back its Pods, until it is resumed."""
    from trainctl.lifecycle import limit_of, set_suspend

    where = where_of(ctx, namespace, context, kubeconfig)
    set_suspend(where, job, True, wait_s=limit_of(wait, timeout), form=output)


@app.command("resume")
def resume(
    ctx: typer.Context,
    job: Job,
    wait: Wait = False,
    timeout: Timeout = "15m",
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Let a suspended job go on."""
    from trainctl.lifecycle import limit_of, set_suspend

    where = where_of(ctx, namespace, context, kubeconfig)
    set_suspend(where, job, False, wait_s=limit_of(wait, timeout), form=output)


@app.command("scale")
def scale(
    ctx: typer.Context,
    job: Job,
    nodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Nodes that train.", show_default=False)] = None,
    min_nodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The fewest to go on with.", show_default=False)
    ] = None,
    spares: Annotated[int | None, typer.Option(metavar="N", min=0, help="Nodes that wait.", show_default=False)] = None,
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Give a job more nodes, or fewer."""
    from trainctl.lifecycle import scale as change

    change(where_of(ctx, namespace, context, kubeconfig), job, nodes, min_nodes, spares, form=output)


@app.command("delete")
def delete(
    ctx: typer.Context,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="The jobs' names.", autocompletion=complete_jobs)],
    wait: Annotated[bool, typer.Option("--wait", help="Return when they and their Pods are gone.")] = False,
    timeout: Timeout = "5m",
    output: Form = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete jobs, at once. Their checkpoints stay in their store."""
    from trainctl.lifecycle import delete as remove
    from trainctl.lifecycle import limit_of

    where = where_of(ctx, namespace, context, kubeconfig)
    remove(where, jobs, wait_s=limit_of(wait, timeout), form=output)


@app.command("fault")
def fault(
    ctx: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="KIND[:TARGET]",
            help="With a rank: rank-crash:1, hang:1. With a seat: node-loss:2, node-leave:2, corrupt:2/header (/data, "
            "/parity, /trailer), keeper-crash:2, agent-crash:2, pod-delete:2. With none: controller-crash, head-loss.",
        ),
    ],
    job: Job,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Break something in a running job on purpose. Refused unless the job has spec.faults.allow."""
    from trainctl.breaking import inject

    inject(where_of(ctx, namespace, context, kubeconfig), job, what)
