"""Whole runs of ``trainctl run`` for tests: start one, read what it left, and prove that nothing stays behind."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "support" / "scripts"
MARK = "OUTLAST_TEST_RUN"


def job(script: str = "train.py", *arguments: str, **spec: Any) -> dict[str, Any]:
    """A TrainingJob for a script in tests/support/scripts: 4 nodes and a spare, a snapshot every 5 steps."""
    content: dict[str, Any] = {
        "entrypoint": ["python", str(SCRIPTS / script), *arguments],
        "workers": {"replicas": 4, "spares": 1},
        "snapshot": {"everySteps": 5},
        "recovery": {"hangTimeout": "5s"},
    }
    for key, value in spec.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    return {"apiVersion": "outlast.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": "test"}, "spec": content}


def undisturbed_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What must end with the same weights as ``spec``, the soonest: the same script on as many ranks, without its
    waits, with no store, no spares and nothing that may happen to it."""
    given = spec["spec"]
    arguments = list(given["entrypoint"][2:])
    for waits in ("--pace", "--pace-until"):
        while waits in arguments:
            at = arguments.index(waits)
            del arguments[at : at + 2]
    workers = {key: value for key, value in given["workers"].items() if key in ("replicas", "procsPerWorker")}
    return job(pathlib.Path(given["entrypoint"][1]).name, *arguments, workers={**workers, "spares": 0})


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    folder: pathlib.Path
    status: int
    output: str
    report: dict[str, Any] = field(default_factory=dict)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [event for event in found if kind is None or event["kind"] == kind]

    def losses(self) -> dict[int, list[float]]:
        """Step -> the losses reported for it, one for each time it was done."""
        found: dict[int, list[float]] = {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "loss" in row:
                found.setdefault(row["step"], []).append(row["loss"])
        return found

    def faults(self) -> list[dict[str, Any]]:
        path = self.folder / "faults.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def digest(self) -> str:
        return str(self.report["weights_digest"])

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        return list(self.report["recoveries"])


@dataclass(frozen=True)
class Interrupt:
    """Ctrl-C, ``signals`` times, once the run has told ``events`` times of an event called ``after``."""

    after: str
    events: int = 1
    signals: int = 1

    def send(self, process: subprocess.Popen[bytes], output: pathlib.Path) -> None:
        deadline = time.monotonic() + 120
        while output.read_text().count(f" {self.after}: ") < self.events:
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, f"no {self.after} in 120 s:\n{tail(output)}"
            time.sleep(0.05)
        for _ in range(self.signals):
            process.send_signal(signal.SIGINT)


def trainctl_run(
    spec: Mapping[str, Any],
    folder: pathlib.Path,
    faults: Sequence[str] = (),
    options: Sequence[str] = (),
    timeout: float = 240,
    interrupt: Interrupt | None = None,
    alone: bool = True,
    within: Sequence[str] = (),
    during: Callable[[pathlib.Path], None] | None = None,
) -> Outcome:
    """``trainctl run`` in a process of its own; afterwards nothing of it may be left. ``alone`` False: another runs
    beside it, whose shared memory is none of its. ``within``: a command that becomes it. ``during``: called with the
    run's folder while it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(dict(spec), sort_keys=False))
    run = folder / "run"
    command = [*within, sys.executable, "-m", "trainctl", "run", str(file), "--dir", str(run), *options]
    for fault in faults:
        command += ["--fault", fault]
    mark = uuid.uuid4().hex
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="olt-", dir="/tmp"))
    environment = {**os.environ, "TMPDIR": str(temporary), MARK: mark}
    memory = shared_memory()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            if interrupt is not None:
                interrupt.send(process, folder / "output.txt")
            if during is not None:
                during(run)
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(30)
            raise AssertionError(f"trainctl run did not end in {timeout} s:\n{tail(folder / 'output.txt')}") from None
        except AssertionError:
            process.terminate()
            process.wait(30)
            raise
    assert processes(mark) == [], "the run left processes behind (and their sockets)"
    assert list(temporary.glob("outlast*")) == [], "the run left temporary files behind"
    assert left_in_memory(run, memory if alone else None) == set(), "the run left shared memory behind"
    shutil.rmtree(temporary)  # caches of torch
    report = run / "report.json"
    return Outcome(
        run, status, (folder / "output.txt").read_text(), json.loads(report.read_text()) if report.exists() else {}
    )


def tail(path: pathlib.Path, lines: int = 40) -> str:
    return "\n".join(path.read_text().splitlines()[-lines:])


def left_in_memory(run: pathlib.Path, before: set[str] | None) -> set[str]:
    """What the run left in shared memory: its nodes' folders, or, when it came to none, whatever was not there
    ``before`` (None: others may have put it there)."""
    nodes = run / "control" / "nodes.json"
    if nodes.exists():
        folders = {pathlib.Path(node["memory_dir"]).parent for node in json.loads(nodes.read_text())["nodes"]}
        return {folder.name for folder in folders if folder.exists()}
    return set() if before is None else shared_memory() - before


def shared_memory() -> set[str]:
    return {
        path.name for path in pathlib.Path("/dev/shm").glob("outlast-*") if not path.name.startswith("outlast-test-")
    }


def processes(mark: str) -> list[str]:
    """Processes that descend from a run: the mark in its environment is inherited by all of them, orphans too."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(f"{entry.name} {(entry / 'cmdline').read_bytes()[:150]!r}")
        except OSError:
            continue
    return found
