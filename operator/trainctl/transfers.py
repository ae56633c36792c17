"""``trainctl checkpoints verify``, ``export`` and ``repair``: processes of their own, since they need numpy and torch.

``python -m outlast.checkpoint.verify``, ``.export`` and ``.repair`` write JSON lines, which are shown here as a
progress bar, as plain lines where there is no terminal, or, with ``--json``, not until the last.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from outlast.errors import OutlastError
from trainctl.catalogue import amount, locate
from trainctl.child import INTERRUPTED, Interrupts, check_installed, lines
from trainctl.terminal import is_drawable

SAY_EVERY_S = 5.0
"""How often a plain view says how far it is."""
_SHOWN = 20


def verify_checkpoint(url: str, step: int | None, as_json: bool) -> int:
    """Check every byte; the exit status."""
    check_installed("trainctl checkpoints verify", ("numpy", "xxhash"))
    url, step = locate(url, step)
    status, end = _run("verify", [url, *_step(step)], as_json, "verifying")
    for problem in [] if as_json else end.get("problems", [])[:_SHOWN]:
        print(f"  {problem['key']}: {problem['text']}")
    return status


def export_checkpoint(url: str, step: int | None, form: str, to: Path, shard_size: str, as_json: bool) -> int:
    """Write a checkpoint for others; the exit status."""
    check_installed("trainctl checkpoints export", ("torch", "numpy", "xxhash"))
    url, step = locate(url, step)
    options = ["--format", form, "--to", str(to), "--shard-size", shard_size]
    return _run("export", [url, *_step(step), *options], as_json, "exporting")[0]


def repair_head(text: str, write: bool, as_json: bool) -> int:
    """Make the head anew; the exit status."""
    from outlast.checkpoint.manifest import parse_reference

    check_installed("trainctl checkpoints repair", ("numpy", "xxhash"))
    url, _ = parse_reference(text)
    status, end = _run("repair", [url, *(["--write"] if write else [])], as_json, "verifying")
    for item in [] if as_json else end.get("quarantined", [])[:_SHOWN]:
        print(f"  step {item['entry']['step']} goes into quarantine: {item['reason']}")
    for entry in [] if as_json else end.get("abandoned", [])[:_SHOWN]:
        print(f"  step {entry['step']} ({entry['generation']}) is of a branch that was given up")
    return status


def _step(step: int | None) -> list[str]:
    return [] if step is None else ["--step", str(step)]


def _run(module: str, arguments: Sequence[str], as_json: bool, doing: str) -> tuple[int, dict[str, Any]]:
    """Run it to its end: the exit status and the last line. Raises OutlastError when it broke."""
    command = [sys.executable, "-P", "-m", f"outlast.checkpoint.{module}", *arguments]
    end: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        interrupts = Interrupts(process)
        with _choose_bar(as_json, doing) as bar:
            for line in lines(process):
                if line.get("type") == "progress" and "total" in line:
                    bar.show(int(line["bytes"]), int(line["total"]))
                elif line.get("type") == "end":
                    end = line
        process.wait()
        if interrupts.count:
            return INTERRUPTED, end
        if not end:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["no reason given"]
            raise OutlastError(f"{doing} ended unexpectedly ({process.returncode}): {last[0]}")
    _tell(end, as_json)
    return int(end["exit"]), end


def _tell(end: Mapping[str, Any], as_json: bool) -> None:
    """What was found goes to standard output, also when it is that something is wrong."""
    if end["exit"] != 0 and "problems" not in end:
        print(f"trainctl: {end['text']}", file=sys.stderr)
    elif as_json:
        print(json.dumps({key: value for key, value in end.items() if key != "type"}, indent=2))
    else:
        print(end["text"])


class Bar(Protocol):
    """Shows how far it is."""

    def show(self, done: int, total: int) -> None: ...


class _Silent:
    def show(self, done: int, total: int) -> None:
        del done, total


class _Lines:
    """A line now and then."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._said = time.monotonic()

    def show(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= SAY_EVERY_S:
            self._said = time.monotonic()
            print(f"{self._doing}: {amount(done)} of {amount(total)}", flush=True)


class _Drawn:
    """A progress bar."""

    def __init__(self, doing: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        text = TextColumn("{task.description}")
        columns = (text, BarColumn(), DownloadColumn(binary_units=True), Speed(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task(doing, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


def _choose_bar(as_json: bool, doing: str) -> AbstractContextManager[Bar]:
    if as_json:
        return nullcontext(_Silent())
    return _Drawn(doing) if is_drawable() else nullcontext(_Lines(doing))
