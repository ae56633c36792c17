"""Nodes with real forkservers, keepers and agents in one process; the controller is a queue of what was sent."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast import messages as m
from outlast.agent.forkclient import ForkClient, launch
from outlast.agent.forkprotocol import ServerSetup
from outlast.agent.node_agent import NodeAgent
from outlast.agent.pidfiles import node_pids
from outlast.config import NodeConfig
from outlast.errors import RequestError
from outlast.snapshot.identity import Attempt

WAIT = 20.0

PRELUDE = """
import json, os, signal, socket, sys, time
link = socket.socket(socket.AF_UNIX)
link.connect(os.environ["OUTLAST_AGENT"])
heard = link.makefile()
def say(op, **fields):
    link.sendall(json.dumps({"op": op, **fields}).encode() + b"\\n")
def hear():
    return json.loads(heard.readline())
rank = int(os.environ["RANK"])
say("hello", rank=rank, pid=os.getpid())
"""
WAITS = PRELUDE + "print(json.dumps(hear()))\nsay('ready', restored_step=0, restore_s=0.1, source='none')\nhear()\n"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(check: Callable[[], Any], seconds: float = WAIT) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return found


def attempt(number: int, letter: str = "a") -> Attempt:
    return Attempt(number, letter * 16)


class Site:
    """A zygote, the folders of nodes, and all agents, which are closed at the end."""

    def __init__(self, zygote: ForkClient) -> None:
        self.zygote = zygote
        self.base = Path(tempfile.mkdtemp(prefix="ol-"))
        self.memory = Path(tempfile.mkdtemp(prefix="ol-", dir="/dev/shm"))
        (self.base / "token").write_text("secret")
        self.nodes: list[Node] = []

    def node(self, script: str = WAITS, procs: int = 1, *, boot: bool = True, **changes: Any) -> Node:
        """A further node with a forkserver of its own, whose ranks run ``script``; ``boot``: with an agent."""
        name = f"node-{len(self.nodes)}"
        sockets, memory = self.base / name, self.memory / name
        for folder in (sockets, memory, self.base / "logs"):
            folder.mkdir(exist_ok=True, mode=0o700)
        path = self.base / f"{name}.py"
        path.write_text(script)
        entrypoint = changes.pop("entrypoint", ["python", str(path)])
        spec = {"entrypoint": entrypoint, "workers": {"replicas": 2, "procsPerWorker": procs}}
        spec["faults"] = {"allow": changes.pop("faults", False)}
        spec["env"] = [{"name": "FROM_JOB", "value": "yes"}]
        config = NodeConfig(
            node=name,
            domain=name,
            job={"apiVersion": "outlast.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": "j"}, "spec": spec},
            namespace=self.base.name,
            cwd=str(self.base),
            run_dir=str(self.base),
            log_dir=str(self.base / "logs"),
            memory_dir=str(memory),
            socket_dir=str(sockets),
            token_file=str(self.base / "token"),
            forkserver_socket=str(sockets / "fork"),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            threads=1,
            **changes,
        )
        self.zygote.fork_server(ServerSetup(config.forkserver_socket, pid_dir=str(sockets)))
        node = Node(config)
        self.nodes.append(node)
        return node.boot() if boot else node

    def close(self) -> None:
        pids = [pid for node in self.nodes for role, pid in node.pids().items() if role != "agent"]
        try:
            for node in self.nodes:
                node.close()
            for child in self.zygote.state().children:
                with suppress(RequestError):  # it has ended since
                    self.zygote.kill(child.id, signal.SIGHUP)  # at once, whoever attends
            eventually(lambda: not self.zygote.state().children)
            assert not [pid for pid in pids if alive(pid)], "a process of a node is left"
        finally:
            shutil.rmtree(self.base)
            shutil.rmtree(self.memory)


class Node:
    """One node's agent, and what it sent."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.agents: list[NodeAgent] = []
        self.ended: list[str] = []

    def boot(self) -> Node:
        """A (further) agent, as Ray would start it again."""
        self.sent: queue.Queue[dict[str, Any]] = queue.Queue()
        self.agent = NodeAgent(self.config, self.sent.put, self.ended.append)
        self.agents.append(self.agent)
        self.agent.start()
        return self

    def crash(self) -> None:
        """End the agent as SIGKILL would: its connections break, nothing else happens."""
        self.agent._reactor.end()
        self.agent._forks.close()
        self.agents.remove(self.agent)

    def close(self) -> None:
        for agent in self.agents:
            agent.close()

    def do(self, *instructions: m.Instruction) -> None:
        self.agent.perform([json.loads(json.dumps(m.to_json(instruction))) for instruction in instructions])

    def raw(self, kind: str, seconds: float = WAIT) -> dict[str, Any]:
        """The next message of that type; others are passed over."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.sent.get(timeout=max(deadline - time.monotonic(), 0.001))
            if found["type"] == kind:
                return json.loads(json.dumps(found))

    def next(self, kind: str, seconds: float = WAIT) -> Any:
        return m.from_json(self.raw(kind, seconds))

    def none_of(self, kind: str, seconds: float = 0.3) -> None:
        with pytest.raises(queue.Empty):
            self.raw(kind, seconds)

    def join(self) -> m.Joined:
        self.agent.join()
        return self.next("Joined")

    def log(self, rank: int, number: int) -> str:
        path = Path(self.config.log_dir) / f"rank-{rank}.attempt-{number}.log"
        return path.read_text() if path.exists() else ""

    def pids(self) -> dict[str, int]:
        return node_pids(Path(self.config.socket_dir))

    def start(self, number: int = 1, seat: int = 0, keeper: m.Address | None = None, **changes: Any) -> m.Start:
        """Start instruction for this node alone, unless told otherwise."""
        keeper = keeper or eventually(lambda: self.agent._host.serving).address
        start = m.Start(
            node=self.config.node,
            attempt=attempt(number),
            seat=seat,
            world_nodes=1,
            procs=int(self.config.job["spec"]["workers"]["procsPerWorker"]),  # type: ignore[call-overload,index]
            master_host="127.0.0.1",
            master_port=1,
            restore=None,
            peers={seat: keeper},
            keepers={self.config.node: keeper},
            restart_count=number - 1,
        )
        return replace(start, **changes)

    def run(self, number: int = 1, **changes: Any) -> m.Start:
        """Start the ranks and let them load."""
        start = self.start(number, **changes)
        self.do(start)
        self.next("RestoreReady")
        self.do(m.Load((self.config.node,), start.attempt))
        return start


@contextmanager
def open_zygote() -> Iterator[ForkClient]:
    """A forkserver that has imported what the tests' ranks and keepers need."""
    with tempfile.TemporaryDirectory(prefix="ol-") as name:
        preload = ("numpy", "torch", "torch.distributed", "outlast.snapshot.keeper")
        process = launch(f"{name}/z", log=Path(name) / "log", preload=preload)
        try:
            client = ForkClient(f"{name}/z", timeout=60)
            yield client
            client.close()
        finally:
            process.terminate()
            assert process.wait(10) == 0


@contextmanager
def open_site(zygote: ForkClient) -> Iterator[Site]:
    """A site that leaves nothing behind."""
    site = Site(zygote)
    try:
        yield site
    finally:
        site.close()
