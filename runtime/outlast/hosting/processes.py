"""The processes below this one, by pid: who they are, ending them for certain, and collecting what became of them.

The supervisor is a *child subreaper* (prctl(2)): whatever loses its parent becomes its child, so that nothing that it
started, directly or not, can escape it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from outlast.errors import OutlastError

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02
_KILL_LIMIT_S = 10.0


def become_subreaper() -> None:
    """Adopt every orphan among the descendants. Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def children(pid: int) -> list[int]:
    """The direct children of ``pid``, zombies too; empty when it is gone."""
    found: list[int] = []
    try:
        threads = [entry.name for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return found
    for thread in threads:
        try:
            found += [int(child) for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()]
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """Everything below ``pid``, parents before children."""
    found: list[int] = []
    queue = children(pid)
    while queue:
        child = queue.pop(0)
        found.append(child)
        queue += children(child)
    return found


def command_of(pid: int) -> str:
    """The command line of ``pid``, or "" when it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether ``pid`` exists and is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal each of ``pids``; those that are gone already are passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


async def ended(pids: Iterable[int]) -> None:
    """Return when one of ``pids`` has ended, or was gone already; it need not be a child."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    watches: list[int] = []
    try:
        for pid in pids:
            try:
                watch = os.pidfd_open(pid)
            except ProcessLookupError:
                return
            watches.append(watch)
            loop.add_reader(watch, gone.set)
        await gone.wait()
    finally:
        for watch in watches:
            loop.remove_reader(watch)
            os.close(watch)


def reap(spare: Collection[int] = ()) -> None:
    """Collect this process's dead children, except those of ``spare`` that somebody else waits for."""
    for pid in children(os.getpid()):
        if pid in spare or is_running(pid):
            continue
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


async def kill_all(select: Callable[[], Sequence[int]], spare: Collection[int] = ()) -> None:
    """SIGKILL what ``select`` names, again and again, until it names none that runs.

    Raises OutlastError when some are still there after ten seconds (a process in uninterruptible sleep).
    """
    deadline = time.monotonic() + _KILL_LIMIT_S
    while left := [pid for pid in select() if is_running(pid)]:
        send(left, signal.SIGKILL)
        await asyncio.sleep(_POLL_S)
        reap(spare)
        if time.monotonic() > deadline:
            raise OutlastError(f"processes {left} do not end: they may be waiting for a device")
    reap(spare)


def launch(
    command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start ``command`` with its output appended to ``log``, in a session of its own."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command, env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


async def wait_for(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """The exit status of ``process``, negative for a signal. After ``limit_s`` it is killed: TimeoutError."""
    deadline = time.monotonic() + limit_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise TimeoutError(f"{process.args!r} took more than {limit_s:g} s")
        await asyncio.sleep(_POLL_S)
    return process.returncode
