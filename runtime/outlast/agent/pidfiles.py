"""Which processes make up a node: one file ``ROLE.pid`` for each in the node's folder, holding ``{"ROLE": pid}``.

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
    draft.write_text(json.dumps({role: pid}))
    draft.replace(folder / f"{role}{_SUFFIX}")


def remove_pid(folder: Path, role: str, pid: int) -> None:
    """Take it back, unless another process has the role by now."""
    path = folder / f"{role}{_SUFFIX}"
    if _read(path) == {role: pid}:
        path.unlink(missing_ok=True)


def node_pids(folder: Path) -> dict[str, int]:
    """Role -> pid of the node's processes that live (a pid that another process got since is left out)."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        for role, pid in _read(path).items():
            if _is_of(pid, path):
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


def _read(path: Path) -> dict[str, int]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {str(role): int(pid) for role, pid in value.items()}


def _is_of(pid: int, path: Path) -> bool:
    """Whether ``pid`` lives and is older than its file: a younger process only got the same number again."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[18])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        written = path.stat().st_mtime
    except (OSError, ValueError, IndexError):
        return False
    if state in "ZX":
        return False
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK") <= written + _SLACK_S
