"""Which processes make up a node: one file ``ROLE.pid`` for each in the node's folder, ``{"ROLE": [pid, started]}``.

``started``, in the kernel's ticks, tells the process from a later one of the same number, whatever the wall clock does.
Whoever starts a process of the node writes its file: the forkserver for itself, the keeper and the ranks, the agent for
itself. ``signal_node`` treats all of them as one, as the loss or the pause of a machine would.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Collection
from pathlib import Path

_SUFFIX = ".pid"
_SLACK_S = 2.0
"""The boot time in /proc/stat has whole seconds."""


def write_pid(folder: Path, role: str, pid: int) -> None:
    """Say that ``pid`` has ``role`` in the node whose folder this is."""
    draft = folder / f".{role}.{os.getpid()}"
    draft.write_text(json.dumps({role: [pid, _started(pid)]}))
    draft.replace(folder / f"{role}{_SUFFIX}")


def remove_pid(folder: Path, role: str, pid: int) -> None:
    """Take it back, unless another process has the role by now."""
    path = folder / f"{role}{_SUFFIX}"
    if _read(path).get(role, (0, None))[0] == pid:
        path.unlink(missing_ok=True)


def node_pids(folder: Path) -> dict[str, int]:
    """Role -> pid of the node's processes that live (a pid that another process got since is left out)."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        for role, (pid, started) in _read(path).items():
            if _is_of(pid, started, path):
                found[role] = pid
    return found


def signal_role(folder: Path, role: str, number: signal.Signals) -> int | None:
    """Signal one process of the node, with its process group where it leads one. Returns its pid, if there is one."""
    pid = node_pids(folder).get(role)
    if pid is not None:
        _signal_group(pid, number)
    return pid


def signal_node(folder: Path, number: signal.Signals, spare: Collection[str] = ()) -> dict[str, int]:
    """Signal every process of the node but the roles to ``spare``, with its process group where it leads one. Returns
    role -> pid.

    The agent and the forkserver come first, so that neither sees the others go and reports it.
    """
    pids = {role: pid for role, pid in node_pids(folder).items() if role not in spare}
    for role in sorted(pids, key=lambda role: (role != "agent", role != "forkserver", role)):
        _signal_group(pids[role], number)
    return pids


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        return


def _read(path: Path) -> dict[str, tuple[int, int | None]]:
    """Role -> pid and when it started. Older versions wrote ``{"ROLE": pid}``."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    pairs = {role: item if isinstance(item, list) else (item, None) for role, item in value.items()}
    return {str(role): (int(pid), started) for role, (pid, started) in pairs.items()}


def _is_of(pid: int, started: int | None, path: Path) -> bool:
    """Whether ``pid`` lives and is the one that was meant: another process may have got the same number since."""
    try:
        state, ticks = _stat(pid)
        return state not in "ZX" and (_is_older(ticks, path) if started is None else ticks == started)
    except (OSError, ValueError, IndexError):
        return False


def _is_older(ticks: int, path: Path) -> bool:
    """Whether what started then is older than its file, which does not say when that was."""
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK") <= path.stat().st_mtime + _SLACK_S


def _started(pid: int) -> int | None:
    """When it started; None: there is no such process."""
    try:
        return _stat(pid)[1]
    except OSError:
        return None


def _stat(pid: int) -> tuple[str, int]:
    """Its state, and when it started: ticks since the machine's boot."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return state, int(fields[18])
