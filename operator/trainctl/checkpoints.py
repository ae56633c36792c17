"""``trainctl checkpoints``: what a job has in its store.

It is named by its URL, ``<spec.checkpoint.url>/<namespace>/<name>``, or by the job's name, and the cluster is asked for
the URL; the store itself is asked from here, with the caller's credentials. Of a place above a job ``ls`` tells which
jobs there are.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from outlast.errors import RequestError
from trainctl.arguments import Context, Kubeconfig, Namespace, where_of
from trainctl.cluster.where import Where
from trainctl.completion import complete_jobs

app = typer.Typer(
    no_args_is_help=True,
    help="Look at, check, keep, clean up and export the checkpoints in a store.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str,
    typer.Argument(
        metavar="URL|JOB",
        help="A job's checkpoints: s3://bucket/prefix/NAMESPACE/NAME, file:///..., or a job's name in the cluster.",
        autocompletion=complete_jobs,
    ),
]
Step = Annotated[
    int | None, typer.Argument(metavar="[STEP]", help="Which checkpoint [the newest].", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
GRACE = "1d"
"""As ``outlast.checkpoint.archive.GRACE_S``, which is not imported for ``--help``: an upload may take hours."""


class Format(StrEnum):
    """What an export is for."""

    SAFETENSORS = "safetensors"
    DCP = "dcp"


@app.command("ls")
def list_them(
    ctx: typer.Context,
    url: Url,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List a job's checkpoints, or the jobs of a store."""
    from trainctl.catalogue import list_checkpoints

    place = whole_place("ls", url, where_of(ctx, namespace, context, kubeconfig))
    list_checkpoints(place, json)


@app.command("show")
def show(
    ctx: typer.Context,
    url: Url,
    step: Step = None,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show what a checkpoint consists of and where it comes from."""
    from trainctl.catalogue import show_checkpoint

    place = store_place(url, where_of(ctx, namespace, context, kubeconfig))
    show_checkpoint(place, step, json)


@app.command("verify")
def verify(
    ctx: typer.Context,
    url: Url,
    step: Step = None,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Read every byte of a checkpoint and compare every checksum. Exit status 1: something is wrong."""
    from trainctl.transfers import verify_checkpoint

    place = store_place(url, where_of(ctx, namespace, context, kubeconfig))
    raise typer.Exit(verify_checkpoint(place, step, json))


@app.command("gc")
def gc(
    ctx: typer.Context,
    url: Url,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this it is only shown.")] = False,
    grace: Annotated[
        str,
        typer.Option(
            metavar="DURATION",
            help="Leave alone what was written so recently: it may be in use. "
            "Less than an upload takes is for jobs that do not run.",
        ),
    ] = GRACE,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Find what no checkpoint needs: left by uploads that never became one, and by branches given up."""
    from trainctl.catalogue import collect_garbage

    place = whole_place("gc", url, where_of(ctx, namespace, context, kubeconfig))
    collect_garbage(place, grace, delete, json)


@app.command("repair")
def repair(
    ctx: typer.Context,
    url: Url,
    write: Annotated[bool, typer.Option("--write", help="Write the head; without this it is only shown.")] = False,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Make a lost or unreadable head.json anew out of the manifests whose images verify. Let no job run on it."""
    from trainctl.transfers import repair_head

    place = whole_place("repair", url, where_of(ctx, namespace, context, kubeconfig))
    raise typer.Exit(repair_head(place, write, json))


@app.command("pin")
def pin(
    ctx: typer.Context,
    url: Url,
    step: Step = None,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Keep a checkpoint, whatever the job's retention says."""
    from trainctl.catalogue import set_pin

    place = store_place(url, where_of(ctx, namespace, context, kubeconfig))
    set_pin(place, step, True, json)


@app.command("unpin")
def unpin(
    ctx: typer.Context,
    url: Url,
    step: Step = None,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Leave a checkpoint to the job's retention again."""
    from trainctl.catalogue import set_pin

    place = store_place(url, where_of(ctx, namespace, context, kubeconfig))
    set_pin(place, step, False, json)


@app.command("export")
def export(
    ctx: typer.Context,
    url: Url,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A folder that is not there yet, or empty.")],
    step: Step = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="safetensors: the weights in Hugging Face's layout; dcp: weights and optimizer as "
            "torch.distributed.checkpoint loads them.",
        ),
    ] = Format.SAFETENSORS,
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="BYTES", help="The most in one safetensors file.")
    ] = "5G",
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Write a checkpoint for those who have no outlast: whole tensors, every byte verified."""
    from trainctl.transfers import export_checkpoint

    place = store_place(url, where_of(ctx, namespace, context, kubeconfig))
    raise typer.Exit(export_checkpoint(place, step, form.value, to, shard_size, json))


def store_place(text: str, where: Where) -> str:
    """The URL that ``text`` is, or that the job of this name has; a step after @ stays.

    Raises RequestError for a URL that is none and for a job without a store, and what the cluster refuses.
    """
    if "/" in text:
        _check_url(text)
        return text
    from trainctl.cluster.connection import Cluster
    from trainctl.cluster.resources import JobRef
    from trainctl.logs import job_store

    name, at, step = text.partition("@")
    with Cluster(where) as cluster:
        url = job_store(JobRef(cluster, cluster.namespace, name).get())
    if url is None:
        raise RequestError(f'the TrainingJob "{name}" has no store (spec.checkpoint): it makes no checkpoints')
    return f"{url}{at}{step}"


def whole_place(command: str, text: str, where: Where) -> str:
    """As ``store_place``, for a command that is about all of a job's checkpoints. Raises RequestError for a step."""
    place, step = _parted(text)
    if step is not None:
        raise RequestError(
            f"checkpoints {command} takes no step: write {place}, or look at that one: checkpoints show {text}"
        )
    return store_place(text, where)


def _parted(text: str) -> tuple[str, str | None]:
    """What is before the step, and the step, if there is one; another @ is part of a name."""
    place, at, step = text.rstrip("/").rpartition("@")
    return (place, step) if at and step.isascii() and step.isdecimal() else (text, None)


def _check_url(text: str) -> None:
    """Raises RequestError, naming ``text``, when it is no store's URL, with or without a step."""
    from outlast.storeurl import parse_store_url

    try:
        parse_store_url(_parted(text)[0])
    except ValueError as error:
        named = str(error).startswith(f'"{text}"')
        raise RequestError(str(error) if named else f"{text}: {error}") from error
