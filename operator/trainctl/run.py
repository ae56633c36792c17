"""``trainctl run``: checks the request, starts the supervisor as a process of its own, and shows what it says.

The supervisor (``python -m outlast.local.supervisor``) needs torch and ray and so is never imported here. It writes
JSON lines to its standard output and ends when its standard input does, so that it never outlives this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from outlast.errors import OutlastError, RequestError
from outlast.local.faults import check_faults, parse_fault

INTERRUPTED = 130
_NEEDED = ("torch", "ray", "aiohttp")
_KILLS = 2
_END_LIMIT_S = 20.0


@dataclass(frozen=True)
class RunRequest:
    """The options of ``trainctl run`` as they were typed."""

    job: Path
    directory: Path | None
    faults: tuple[str, ...]
    overrides: tuple[str, ...]
    replace_after: str
    json: bool


def run_here(request: RunRequest) -> int:
    """Run the job and return the exit status.

    Raises RequestError (SpecError for the job) before anything was started, OutlastError when the supervisor breaks.
    """
    _check_installation()
    document = _load(request)
    directory = _prepare(request, document)
    command = [
        *(sys.executable, "-m", "outlast.local.supervisor", "--dir", str(directory)),
        *("--replace-after", request.replace_after, *(f"--fault={fault}" for fault in request.faults)),
    ]
    return _supervise(command, request, directory)


def _check_installation() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"trainctl run needs {', '.join(missing)}: pip install 'outlast[train]'")


def _load(request: RunRequest) -> dict[str, Any]:
    """The job with every default filled in, after all checks that need no process."""
    from outlast.api import load

    try:
        job = load(request.job.read_text(), request.overrides)
    except OSError as error:
        raise RequestError(f"{request.job}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{request.job}: it is no text") from error
    workers = job.spec.workers
    check_faults([parse_fault(text) for text in request.faults], workers.replicas, workers.procs_per_worker)
    _check_replace_after(request.replace_after)
    _check_entrypoint(job.spec.entrypoint, request.job.parent)
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)


def _check_replace_after(text: str) -> None:
    try:
        valid = text == "never" or float(text) >= 0
    except ValueError:
        valid = False
    if not valid:
        raise RequestError(f"--replace-after {text}: a number of seconds (0 or more) or never")


def _check_entrypoint(entrypoint: Sequence[str], folder: Path) -> None:
    script = next((word for word in entrypoint[1:2] if word.endswith(".py")), None)
    if script is not None and not (folder / script).exists():
        raise RequestError(
            f"spec.entrypoint: there is no {script} in {folder.resolve()}, the job file's folder, where ranks start"
        )


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
    interrupts = _Interrupts(process)
    last: dict[str, Any] = {}
    try:
        with view:
            for line in _lines(process):
                view.show(line)
                last = line
    finally:
        _end(process)
    return _exit_status(process.returncode, last, interrupts.count, directory)


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


class _Interrupts:
    """Passes Ctrl-C and SIGTERM on: the first asks the supervisor to stop the job, the second to kill it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.count += 1
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if self.count < _KILLS else signal.SIGTERM)


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The supervisor's JSON lines until it closes its output."""
    assert process.stdout is not None
    for text in process.stdout:
        try:
            value = json.loads(text)
        except ValueError:
            value = {"type": "progress", "text": text.rstrip()}
        if isinstance(value, dict):
            yield value


def _end(process: subprocess.Popen[str]) -> None:
    """Close the supervisor's input, which ends it if nothing else has, and wait for it."""
    assert process.stdin is not None
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
