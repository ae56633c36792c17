"""``trainctl checkpoints``: what a job has in its store.

URL is a job's own: ``<spec.checkpoint.url>/<namespace>/<name>``. Of a place above it ``ls`` tells which jobs there are.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Look at, check, keep, clean up and export the checkpoints in a store.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str, typer.Argument(metavar="URL", help="A job's checkpoints: s3://bucket/prefix/NAMESPACE/NAME, or file:///...")
]
Step = Annotated[
    int | None, typer.Argument(metavar="[STEP]", help="Which checkpoint [the newest].", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]


class Format(StrEnum):
    """What an export is for."""

    SAFETENSORS = "safetensors"
    DCP = "dcp"


@app.command("ls")
def list_them(url: Url, json: Json = False) -> None:
    """List a job's checkpoints, or the jobs of a store."""
    from trainctl.catalogue import list_checkpoints

    list_checkpoints(url, json)


@app.command("show")
def show(url: Url, step: Step = None, json: Json = False) -> None:
    """Show what a checkpoint consists of and where it comes from."""
    from trainctl.catalogue import show_checkpoint

    show_checkpoint(url, step, json)


@app.command("verify")
def verify(url: Url, step: Step = None, json: Json = False) -> None:
    """Read every byte of a checkpoint and compare every checksum. Exit status 1: something is wrong."""
    from trainctl.transfers import verify_checkpoint

    raise typer.Exit(verify_checkpoint(url, step, json))


@app.command("gc")
def gc(
    url: Url,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this it is only shown.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="DURATION", help="Leave alone what was written so recently: it may be in use.")
    ] = "1h",
    json: Json = False,
) -> None:
    """Find what no checkpoint needs: left by uploads that never became one, and by branches given up."""
    from trainctl.catalogue import collect_garbage

    collect_garbage(url, grace, delete, json)


@app.command("repair")
def repair(
    url: Url,
    write: Annotated[bool, typer.Option("--write", help="Write the head; without this it is only shown.")] = False,
    json: Json = False,
) -> None:
    """Make a lost or unreadable head.json anew out of the manifests whose images verify. Let no job run on it."""
    from trainctl.transfers import repair_head

    raise typer.Exit(repair_head(url, write, json))


@app.command("pin")
def pin(url: Url, step: Step = None, json: Json = False) -> None:
    """Keep a checkpoint, whatever the job's retention says."""
    from trainctl.catalogue import set_pin

    set_pin(url, step, True, json)


@app.command("unpin")
def unpin(url: Url, step: Step = None, json: Json = False) -> None:
    """Leave a checkpoint to the job's retention again."""
    from trainctl.catalogue import set_pin

    set_pin(url, step, False, json)


@app.command("export")
def export(
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
) -> None:
    """Write a checkpoint for those who have no outlast: whole tensors, every byte verified."""
    from trainctl.transfers import export_checkpoint

    raise typer.Exit(export_checkpoint(url, step, form.value, to, shard_size, json))
