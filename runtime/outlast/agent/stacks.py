"""The stacks of ranks that make no progress: py-spy looks from outside, also at a process that is stopped.

Where py-spy cannot look (no right to ptrace, no wheel for this machine), a Python rank is asked to write its stacks
itself, by the signal that every fork of the forkserver has faulthandler listening to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from outlast.agent.forkchild import STACKS_SIGNAL

DUMP_S = 5.0
"""How long looking at one process may take."""

_WRITING_S = 0.3


@dataclass(frozen=True)
class Subject:
    """A rank to look at. ``listens``: it writes its stacks to ``log`` when signalled (another program would die)."""

    rank: int
    pid: int
    log: Path
    listens: bool


def dump(subjects: Sequence[Subject], reason: str) -> str:
    """The stacks of all, as text; each is also appended to its rank's log. Takes about DUMP_S at most."""
    if not subjects:
        return ""
    with ThreadPoolExecutor(len(subjects)) as pool:
        return "\n".join(pool.map(lambda subject: _dump(subject, reason), subjects))


def _dump(subject: Subject, reason: str) -> str:
    text, problem = _from_outside(subject.pid)
    if text:
        with subject.log.open("a") as log:
            log.write(f"\n--- stacks of rank {subject.rank} ({reason}) ---\n{text}\n")
    elif subject.listens:
        text = _from_inside(subject)
    return f"rank {subject.rank} (pid {subject.pid}):\n{text or problem}"


def _from_outside(pid: int) -> tuple[str, str]:
    """(py-spy's report, "") or ("", why there is none)."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "", "py-spy is not installed"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DUMP_S, check=False)
    except subprocess.TimeoutExpired:
        return "", f"py-spy gave no answer within {DUMP_S:g} s"
    if done.returncode != 0:
        return "", (done.stderr.strip() or f"py-spy ended with {done.returncode}").splitlines()[0]
    return done.stdout.strip(), ""


def _from_inside(subject: Subject) -> str:
    """What the rank wrote to its log when signalled; nothing comes from one that is stopped."""
    try:
        before = subject.log.stat().st_size
        os.kill(subject.pid, STACKS_SIGNAL)
    except OSError:
        return ""
    time.sleep(_WRITING_S)
    with subject.log.open("rb") as log:
        log.seek(before)
        return log.read().decode(errors="replace").strip()
