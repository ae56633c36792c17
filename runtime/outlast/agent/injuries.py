"""Faults that a running job is asked for, carried out on this node: only in a job whose specification allows them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from outlast import messages as m
from outlast.agent.pidfiles import node_pids, signal_node, signal_role
from outlast.config import NodeConfig
from outlast.faults import Kind, Part

Tell = Callable[[str, str], None]
"""Called with the kind and the text of a note."""


def injure(asked: m.Injure, config: NodeConfig, allowed: bool, tell: Tell) -> None:
    """Do it, and tell what was done; of some nothing is left to tell it. ``allowed``: the job takes faults.

    Call it on the reactor's thread: what the node notices of its own end waits behind it, and is never sent.
    """
    act = _ACTS.get(asked.kind)
    if not allowed or act is None:
        why = "nothing that an agent does" if allowed else "refused: the job allows no faults (spec.faults.allow)"
        tell("injury-refused", f"{asked.kind}: {why}")
        return
    done = act(asked, config)
    tell("injured" if done else "injury-missed", f"{asked.kind}: {done or 'what was meant is not there just now'}")


def _crash_rank(asked: m.Injure, config: NodeConfig) -> str:
    return _signal(config, f"rank-{asked.rank}", signal.SIGKILL)


def _hang_rank(asked: m.Injure, config: NodeConfig) -> str:
    return _signal(config, f"rank-{asked.rank}", signal.SIGSTOP)


def _crash_keeper(asked: m.Injure, config: NodeConfig) -> str:
    del asked
    return _signal(config, "keeper", signal.SIGKILL)


def _signal(config: NodeConfig, role: str, number: signal.Signals) -> str:
    pid = signal_role(Path(config.socket_dir), role, number)
    return "" if pid is None else f"{number.name} to {role} (pid {pid})"


def _corrupt(asked: m.Injure, config: NodeConfig) -> str:
    from outlast.snapshot.imagefiles import corrupt  # which imports numpy: an agent does without it

    return "; ".join(corrupt(Path(config.memory_dir), Part(asked.part or Part.DATA)))


def _leave(asked: m.Injure, config: NodeConfig) -> str:
    del asked
    pid = node_pids(Path(config.socket_dir)).get("forkserver")
    if pid is None:
        return ""
    os.kill(pid, signal.SIGTERM)
    return f"SIGTERM to the forkserver (pid {pid})"


def _lose(asked: m.Injure, config: NodeConfig) -> str:
    """Everything of the node ends, and its memory is empty, as if the machine had been lost."""
    signal_node(Path(config.socket_dir), signal.SIGKILL, spare=("agent",))
    for path in Path(config.memory_dir).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return _crash_agent(asked, config)


def _crash_agent(asked: m.Injure, config: NodeConfig) -> str:
    del asked, config
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


_ACTS: dict[str, Callable[[m.Injure, NodeConfig], str]] = {
    Kind.RANK_CRASH: _crash_rank,
    Kind.HANG: _hang_rank,
    Kind.KEEPER_CRASH: _crash_keeper,
    Kind.CORRUPT: _corrupt,
    Kind.NODE_LEAVE: _leave,
    Kind.NODE_LOSS: _lose,
    Kind.AGENT_CRASH: _crash_agent,
}
