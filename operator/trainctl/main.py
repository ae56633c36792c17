"""``trainctl``: what a person types.

Exit status: 0 it succeeded, 1 it failed, 2 the request was wrong, 3 ``run``'s job was suspended, 130 it was
interrupted. Commands import what they
need when they are called, so that ``trainctl --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from outlast.errors import OutlastError, RequestError, StoreDenied
from trainctl.arguments import Context, Kubeconfig, Namespace
from trainctl.checkpoints import app as checkpoints
from trainctl.cluster.where import Where
from trainctl.columns import printable
from trainctl.jobs import app as jobs

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How writing fails where there is no place for more."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"trainctl {version('outlast')}")
        raise typer.Exit


@app.callback()
def trainctl(
    ctx: typer.Context,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Runs training jobs that outlast their machines."""
    del version
    where = Where(namespace, context, kubeconfig)
    if ctx.invoked_subcommand == "run" and where != Where():
        raise typer.BadParameter("run needs no cluster: leave out --namespace, --context and --kubeconfig")
    ctx.obj = where


@app.command("run")
def run_job(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The TrainingJob to run.")],
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Where everything of the run goes [a new one in ./runs]."),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--fault",
            metavar="KIND@STEP:TARGET",
            help="Break something on purpose, such as node-loss@40:2; repeatable. Kinds with a rank: rank-crash, "
            "rank-error, hang, straggler (@40:2*3). With a seat: node-loss, node-pause, node-leave, corrupt "
            "(@40:2/header, /data, /parity, /trailer), keeper-crash, agent-crash. With none: node-join, "
            "controller-crash, head-loss. @STEP.copy, @STEP.encode, @STEP.restart: while the next of these is under "
            "way.",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Override a field, such as spec.workers.spares=2; repeatable."
        ),
    ] = None,
    replace_after: Annotated[
        str, typer.Option(metavar="SECONDS|never", help="Replace a lost node by an empty one after so long.")
    ] = "5",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the job's checkpoints in its store; refused without it.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Write the progress as JSON lines.")] = False,
) -> None:
    """Run a training job on this machine, to its end.

    One local Ray, one agent for each of the job's nodes and spares; ranks start in the job file's folder. Ctrl-C stops
    the job, a second one kills it.
    """
    from trainctl.run import RunRequest, run_here

    request = RunRequest(job, directory, tuple(fault or ()), tuple(override or ()), replace_after, json, resume)
    raise typer.Exit(run_here(request))


app.add_typer(jobs)
app.add_typer(checkpoints, name="checkpoints")


def run() -> None:
    """The console script."""
    try:
        _run_to_the_last_word()
    except (RequestError, StoreDenied) as error:
        _complain(error)
        sys.exit(2)
    except OutlastError as error:
        _complain(error)
        sys.exit(1)


def _run_to_the_last_word() -> None:
    """Run the command until what it wrote has been taken. Raises OutlastError when standard output takes no more."""
    try:
        try:
            app(prog_name=_typed_name())
        finally:
            print(end="", flush=True)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, *_FULL):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter will flush once more
        if error.errno == errno.EPIPE:
            sys.exit(1)  # who reads has gone, as click has it
        raise OutlastError(f"standard output: {error.strerror}") from error


def _typed_name() -> str | None:
    """What a person types for this program, None for its own name. Shells complete it by its own."""
    asked = {"--install-completion", "--show-completion"} & set(sys.argv)
    if Path(sys.argv[0]).name != "kubectl-outlast" or asked or "_KUBECTL_OUTLAST_COMPLETE" in os.environ:
        return None
    return "kubectl outlast"


def complete() -> None:
    """The console script by which kubectl completes ``kubectl outlast ...``.

    It gets the words, the last of them the one that is being typed, and prints what that could be and, at the end,
    whether the shell may offer files (":0") or not (":4"), as cobra's commands do. What it could be is asked for as a
    shell asks ``trainctl``.
    """
    words = sys.argv[1:] or [""]
    os.environ["_TRAINCTL_COMPLETE"] = "complete_bash"
    os.environ["COMP_WORDS"] = shlex.join(["trainctl", *words[:-1]]) + " " + words[-1]
    os.environ["COMP_CWORD"] = str(len(words))
    found = io.StringIO()
    with contextlib.redirect_stdout(found), contextlib.suppress(SystemExit):
        app(prog_name="trainctl")
    said = found.getvalue().strip()
    print(f"{said}\n:4" if said else ":0")


def _complain(error: OutlastError) -> None:
    said = "\n".join(map(printable, str(error).split("\n")))
    print(f"trainctl: {said}", file=sys.stderr)
