"""``trainctl run``: checks the request, starts the supervisor as a process of its own, and shows what it says.

The supervisor (``python -m outlast.local.supervisor``) needs torch and ray and so is never imported here. It writes
JSON lines to its standard output and ends when its standard input does, so that it never outlives this process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.errors import OutlastError, RequestError
from outlast.local.faults import check_faults, parse_fault
from trainctl.child import INTERRUPTED, Interrupts, check_installed, lines

if TYPE_CHECKING:
    from outlast.api import TrainingJobSpec

_NEEDED = ("torch", "ray", "aiohttp")
_END_LIMIT_S = 20.0
_THIS_PYTHON = ("python", "python3", f"python3.{sys.version_info.minor}")
"""What ``outlast.agent.forkprotocol`` runs by this interpreter, whatever PATH says."""


@dataclass(frozen=True)
class RunRequest:
    """The options of ``trainctl run`` as they were typed."""

    job: Path
    directory: Path | None
    faults: tuple[str, ...]
    overrides: tuple[str, ...]
    replace_after: str
    json: bool
    resume: bool = False


def run_here(request: RunRequest) -> int:
    """Run the job and return the exit status. A request that is refused leaves nothing in the folder.

    Raises RequestError (SpecError for the job) before anything was started, OutlastError when the supervisor breaks.
    """
    check_installed("trainctl run", _NEEDED)
    document = _load(request)
    directory = _prepare(request, document)
    command = [
        *(sys.executable, "-P", "-m", "outlast.local.supervisor", "--dir", str(directory)),
        *("--replace-after", request.replace_after, *(f"--fault={fault}" for fault in request.faults)),
        *(["--resume"] if request.resume else []),
    ]
    return _supervise(command, request, directory)


def _load(request: RunRequest) -> dict[str, Any]:
    """The job with every default filled in, after all checks that need no process."""
    from trainctl.jobfile import load_named, read_text

    job = load_named(read_text(request.job), str(request.job), request.overrides)
    workers = job.spec.workers
    check_faults([parse_fault(text) for text in request.faults], workers.replicas, workers.procs_per_worker)
    _check_replace_after(request.replace_after)
    _check_entrypoint(job.spec, request.job.resolve().parent)
    if request.resume and job.spec.checkpoint is None:
        raise RequestError("--resume: the job has no spec.checkpoint, so there is no store to go on from")
    if job.spec.suspend:
        print("note: spec.suspend is for clusters: here the job runs at once", file=sys.stderr)
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)


def _check_replace_after(text: str) -> None:
    try:
        valid = text == "never" or float(text) >= 0
    except ValueError:
        valid = False
    if not valid:
        raise RequestError(f"--replace-after {text}: a number of seconds (0 or more) or never")


def _check_entrypoint(spec: TrainingJobSpec, folder: Path) -> None:
    program, *rest = spec.entrypoint
    env = {**os.environ, **{variable.name: variable.value for variable in spec.env}}
    missing = "" if program in _THIS_PYTHON else _missing(program, folder, env)
    if missing:
        raise RequestError(f"spec.entrypoint: {missing}")
    script = next((word for word in rest[:1] if word.endswith(".py")), None)
    if script is not None and not (folder / script).exists():
        raise RequestError(
            f"spec.entrypoint: there is no {script} in {folder}, the job file's folder, where ranks start"
        )


def _missing(program: str, folder: Path, env: Mapping[str, str]) -> str:
    """Why ranks could not run it, in ``folder`` and with ``env``; "" when they can."""
    if "/" not in program:
        places = [str(folder / place) for place in os.get_exec_path(env)]
        found = shutil.which(program, path=os.pathsep.join(places))
        return "" if found else f"there is no program {program} on PATH: mend its name, or install it"
    path = folder / program
    if shutil.which(path):
        return ""
    if path.is_file():
        return f"{path} is not executable: chmod +x it, or name the program that runs it"
    return f"there is no program {path} (ranks start in the job file's folder)"


def _prepare(request: RunRequest, document: dict[str, Any]) -> Path:
    """The run's folder, with the resolved job in it."""
    import yaml

    name = str(document["metadata"]["name"])
    directory = request.directory or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise RequestError(f"--dir {directory}: it is not empty; every run needs a folder of its own")
        (directory / "job.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    except OSError as error:
        raise RequestError(f"--dir {directory}: {error.strerror}") from error
    return directory.resolve()


def _supervise(command: list[str], request: RunRequest, directory: Path) -> int:
    from trainctl.live import choose_view

    view = choose_view(request.json, directory)
    process = _start(command, directory, request.job.resolve().parent)
    interrupts = Interrupts(process)
    last: dict[str, Any] = {}
    try:
        with view:
            for line in lines(process):
                view.show(line)
                last = line
    finally:
        _end(process)
    if last.get("outcome") == "refused":
        _empty(directory, request.directory is None)
    return _exit_status(process.returncode, last, interrupts.count, directory)


def _empty(directory: Path, altogether: bool) -> None:
    """Take back what was put into the folder: nothing was started."""
    shutil.rmtree(directory, ignore_errors=True)
    if not altogether:
        directory.mkdir(parents=True, exist_ok=True)


def _start(command: list[str], directory: Path, folder: Path) -> subprocess.Popen[str]:
    """The supervisor, in a session of its own: a terminal's Ctrl-C comes to it through this process alone.

    It works in the job file's folder, and so do the ranks.
    """
    log = directory / "logs" / "supervisor.log"
    log.parent.mkdir(exist_ok=True)
    pipe = subprocess.PIPE
    with log.open("a") as errors:
        return subprocess.Popen(
            command, cwd=folder, stdin=pipe, stdout=pipe, stderr=errors, text=True, start_new_session=True
        )


def _end(process: subprocess.Popen[str]) -> None:
    """Close the supervisor's input, which ends it if nothing else has, and wait for it.

    Its output is closed first, so that it does not wait for what it says to be read.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    process.stdin.close()
    try:
        process.wait(timeout=_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _exit_status(status: int, last: dict[str, Any], interrupts: int, directory: Path) -> int:
    if interrupts and last.get("outcome") != "succeeded":
        return INTERRUPTED
    if last.get("type") != "end":
        raise OutlastError(f"the supervisor ended unexpectedly ({status}); see {directory / 'logs' / 'supervisor.log'}")
    return int(last["exit"])
