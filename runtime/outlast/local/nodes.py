"""Local nodes: folders, a forkserver from the zygote, and losing or draining them as machines are lost or drained.

The zygote has imported torch once; each node's forkserver is a fork of it, and keeper and ranks are forks of that. So a
node is the tree below its forkserver, and its agent, which is Ray's child.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast.agent.forkprotocol import ServerSetup
from outlast.agent.pidfiles import node_pids
from outlast.agent.shipping import SETTLE_S, under_way
from outlast.config import Isolation, MemoryShare, NodeConfig
from outlast.errors import OutlastError
from outlast.hosting import processes
from outlast.local.faults import Fault, boundary_steps
from outlast.local.folders import RunFolders

READY_LIMIT_S = 120.0
"""Importing torch takes 4 s on a warm machine, much longer on a cold one."""


@dataclass(frozen=True)
class NodeTemplate:
    """What all nodes of a run have in common."""

    job: Mapping[str, Any]
    namespace: str
    cwd: Path
    env: Mapping[str, str]
    faults: Sequence[Fault]
    threads: int | None
    share: MemoryShare | None = None

    def config(self, folders: RunFolders, node: str) -> NodeConfig:
        """The configuration of the node with this id."""
        steps = boundary_steps(self.faults)
        own = str(folders.node_memory(node))
        return NodeConfig(
            node=node,
            domain=node,
            job=dict(self.job),
            namespace=self.namespace,
            cwd=str(self.cwd),
            run_dir=str(folders.root),
            log_dir=str(folders.logs),
            memory_dir=own,
            share=self.share,
            socket_dir=str(folders.node_sockets(node)),
            token_file=str(folders.token_file),
            forkserver_socket=str(folders.node_sockets(node) / "forkserver"),
            env=dict(self.env),
            threads=self.threads,
            fault_gate=str(folders.gate_socket) if steps else None,
            fault_steps=steps,
            isolate=Isolation(base=str(folders.memory), own=own) if os.geteuid() == 0 else None,
        )


@dataclass
class LocalNode:
    """One node. ``forkserver`` is its pid; ``paused_at``: the step at which a fault stopped it; ``leave_by``: when
    (monotonic seconds) it is taken away after it was told to leave."""

    config: NodeConfig
    forkserver: int
    paused_at: int | None = None
    leave_by: float | None = None
    gone: bool = False
    stopped: list[int] = field(default_factory=list)


class LocalNodes:
    """All nodes of a run, the lost ones too. Node ids are never used again."""

    def __init__(self, folders: RunFolders, template: NodeTemplate) -> None:
        self._folders = folders
        self._template = template
        self._zygote: subprocess.Popen[bytes] | None = None
        self._nodes: dict[str, LocalNode] = {}
        self._numbers = itertools.count()

    @property
    def zygote_pid(self) -> int | None:
        return self._zygote.pid if self._zygote else None

    def __getitem__(self, node: str) -> LocalNode:
        return self._nodes[node]

    def lost(self) -> set[str]:
        """The nodes that were lost, removed or have left."""
        return {name for name, node in self._nodes.items() if node.gone}

    def leaving(self) -> set[str]:
        """The nodes that were told to leave and are still there."""
        return {name for name, node in self._nodes.items() if node.leave_by is not None and not node.gone}

    def paused(self) -> dict[str, int]:
        """The nodes that are stopped, and the step at which that was done."""
        return {name: node.paused_at for name, node in self._nodes.items() if node.paused_at is not None}

    def present(self) -> list[LocalNode]:
        """The nodes that were not lost or removed, paused ones too."""
        return [node for node in self._nodes.values() if not node.gone]

    async def start_zygote(self) -> None:
        """Start the process that all others are forked from. Raises OutlastError naming its log."""
        log = self._folders.logs / "forkserver.log"
        socket = self._folders.zygote_socket
        command = [sys.executable, "-P", "-m", "outlast.agent.forkserver", "--socket", str(socket)]
        env = {**self._template.env, "PYTHONHASHSEED": "0"}
        self._zygote = processes.launch(command, env, log, self._template.cwd)
        for _ in range(int(READY_LIMIT_S / 0.05)):
            if socket.exists():
                return
            if self._zygote.poll() is not None:
                raise OutlastError(f"the forkserver ended ({self._zygote.returncode}); see {log}")
            await asyncio.sleep(0.05)
        raise OutlastError(f"the forkserver was not ready after {READY_LIMIT_S:g} s; see {log}")

    async def create(self) -> NodeConfig:
        """Make one more node, empty. Raises OutlastError."""
        config = self._template.config(self._folders, f"node-{next(self._numbers)}")
        for folder in (config.memory_dir, config.socket_dir):
            Path(folder).mkdir(mode=0o700)
        log = self._folders.logs / f"forkserver.{config.node}.log"
        setup = ServerSetup(config.forkserver_socket, pid_dir=config.socket_dir, log=str(log))
        answer = await self._ask({"op": "fork_server", **setup.to_json()})
        if answer["op"] != "forked":
            raise OutlastError(f"{config.node} could not be made: {answer.get('text')}")
        self._nodes[config.node] = LocalNode(config, int(answer["pid"]))
        return config

    def roles(self, node: str) -> dict[str, int]:
        """Role ("agent", "forkserver", "keeper", "rank-0", ...) -> pid of the node's living processes."""
        return node_pids(Path(self._nodes[node].config.socket_dir))

    def members(self, node: str) -> list[int]:
        """The pids of everything that is this node, its agent and forkserver first."""
        forkserver = self._nodes[node].forkserver
        roles = self.roles(node)
        found = dict.fromkeys([roles.get("agent"), forkserver, *processes.descendants(forkserver), *roles.values()])
        return [pid for pid in found if pid is not None and processes.is_running(pid)]

    async def lose(self, node: str) -> list[int]:
        """Kill everything of a node at once and wipe its memory, as a lost machine would; return the pids."""
        lost = self._nodes[node]
        if lost.gone:
            return []
        lost.gone, lost.paused_at = True, None
        members = self.members(node)
        await processes.kill_all(lambda: members, self._spare())
        for folder in (lost.config.memory_dir, lost.config.socket_dir):
            shutil.rmtree(folder, ignore_errors=True)
        return members

    def pause(self, node: str, step: int) -> list[int]:
        """SIGSTOP everything of a node; return the pids."""
        paused = self._nodes[node]
        paused.paused_at = step
        paused.stopped = self.members(node)
        processes.send(paused.stopped, signal.SIGSTOP)
        return paused.stopped

    def tell_to_leave(self, node: str) -> list[int]:
        """SIGTERM, as before a machine is taken away; ``see_off`` sees to the rest. Returns the forkserver's pid."""
        leaving = self._nodes[node]
        if leaving.gone or not processes.is_running(leaving.forkserver):
            return []
        leaving.leave_by = time.monotonic() + leaving.config.grace_s
        processes.send([leaving.forkserver], signal.SIGTERM)
        return [leaving.forkserver]

    async def see_off(self) -> dict[str, bool]:
        """What became of nodes that were told to leave: True: it has ended by itself; False: its time was over, and it
        was killed. Nodes that have time left and still run are not among them."""
        seen: dict[str, bool] = {}
        for name, node in self._nodes.items():
            if node.leave_by is None or node.gone:
                continue
            ended = not self.members(name)
            if ended or time.monotonic() >= node.leave_by:
                seen[name] = ended
                await self.lose(name)
        return seen

    async def settle_logs(self) -> bool:
        """Wait for ranks' logs on their way into the store, so long at most; whether all have got there."""
        deadline = time.monotonic() + SETTLE_S
        while any(under_way(Path(node.config.socket_dir)) for node in self.present()):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    def resume(self, node: str) -> None:
        """SIGCONT everything that ``pause`` stopped."""
        paused = self._nodes[node]
        paused.paused_at = None
        processes.send(paused.stopped, signal.SIGCONT)

    def _spare(self) -> list[int]:
        return [self._zygote.pid] if self._zygote else []

    async def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One question to the zygote."""
        try:
            async with asyncio.timeout(READY_LIMIT_S):
                reader, writer = await asyncio.open_unix_connection(str(self._folders.zygote_socket))
                writer.write(json.dumps(message).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
                writer.close()
            return dict(json.loads(line))
        except (OSError, ValueError) as error:
            raise OutlastError(f"the forkserver does not answer: {error or type(error).__name__}") from error
