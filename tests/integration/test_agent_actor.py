"""The agent as an actor of a real Ray: it comes back after a crash, finds a new controller, and ends with its node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast import messages as m
from outlast.config import agent_actor
from support.ray_head import Head, ray_head, session_pids
from support.sites import Node, alive, attempt, eventually, open_site, open_zygote

pytest.importorskip("ray", reason="needs outlast[train]")


class World:
    """A stand-in for the controller, and the journal of what the agent told it."""

    def __init__(self, head: Head, folder: Path, node: Node) -> None:
        self.journal = folder / "journal.jsonl"
        config = folder / "node.json"
        config.write_text(node.config.model_dump_json())
        where = (head.address, node.config.namespace, str(self.journal), str(config))
        command = [sys.executable, "-m", "support.stub_controller", *where]
        self.process = subprocess.Popen(
            command, env=dict(head.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._expect("ready")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self._expect("done")

    def perform(self, *instructions: m.Instruction) -> None:
        self.tell(json.dumps([m.to_json(instruction) for instruction in instructions]))

    def told(self, kind: str) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for event in map(json.loads, lines) if event["type"] == kind]

    def wait(self, kind: str, count: int) -> dict[str, Any]:
        """The ``count``-th message of that type."""
        return dict(eventually(lambda: len(self.told(kind)) >= count and self.told(kind)[count - 1], 30))

    def joined(self, count: int) -> m.Joined:
        """The ``count``-th time that the agent joined."""
        event = self.wait("Joined", count)
        joined = m.from_json({key: value for key, value in event.items() if key != "controller"})
        assert isinstance(joined, m.Joined)
        return joined

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        said = ""
        while (line := self.process.stdout.readline()) and (said := line.strip()) != word:
            continue  # Ray tells of workers that died there
        assert said == word


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("ray") / "ray.token") as running:
        yield running
    assert session_pids(running.session) == []


@pytest.fixture
def node() -> Iterator[Node]:
    with open_zygote() as zygote, open_site(zygote) as site:
        yield site.node(boot=False, faults=True)


@pytest.fixture
def world(head: Head, tmp_path: Path, node: Node) -> Iterator[World]:
    with World(head, tmp_path, node) as world:
        yield world


def test_an_agents_life_in_ray(world: World, node: Node, head: Head) -> None:
    joined = world.joined(1)
    first = node.pids()["agent"]
    assert first in head.pids()
    world.perform(node.start(keeper=joined.keeper))
    world.wait("RestoreReady", 1)
    world.perform(m.Load((node.config.node,), attempt(1)))
    assert world.wait("RankReady", 1)["attempt"] == str(attempt(1))
    rank = node.pids()["rank-0"]

    world.tell("restart")
    again = world.joined(2)
    assert (again.running, again.seat, again.attempt) == (True, 0, attempt(1))
    assert len({event["controller"] for event in world.told("Joined")}) == 2

    os.kill(first, signal.SIGKILL)
    after = world.joined(3)
    assert (after.running, after.seat, after.keeper) == (False, 0, joined.keeper)
    assert after.registration != again.registration
    assert not alive(rank)
    second = node.pids()["agent"]
    assert second != first

    os.kill(node.pids()["forkserver"], signal.SIGKILL)
    eventually(lambda: not alive(second))
    time.sleep(6)
    assert "agent" not in node.pids(), "a node without a forkserver gets no agent again"


def test_sigterm_stops_the_ranks_first(world: World, node: Node) -> None:
    world.perform(node.start(keeper=world.joined(1).keeper))
    agent, rank = node.pids()["agent"], eventually(lambda: node.pids().get("rank-0"))
    os.kill(agent, signal.SIGTERM)
    eventually(lambda: not alive(agent))
    assert not alive(rank)


GONE = """
import sys, time, ray
ray.init(address=sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
until = time.monotonic() + 20
while time.monotonic() < until:
    try:
        ray.get_actor(sys.argv[3])
    except ValueError:
        sys.exit(0)
    time.sleep(0.1)
sys.exit("the actor is still there")
"""


def test_the_agent_of_a_node_that_has_left_is_gone_for_good(world: World, node: Node, head: Head) -> None:
    world.perform(node.start(keeper=world.joined(1).keeper))
    pids = eventually(lambda: "rank-0" in node.pids() and node.pids())
    os.kill(pids["forkserver"], signal.SIGTERM)
    assert world.wait("Leaving", 1)["node"] == node.config.node
    world.perform(m.Release(node.config.node))
    eventually(lambda: not any(alive(pid) for pid in pids.values()))
    where = [head.address, node.config.namespace, agent_actor(node.config.node)]
    done = subprocess.run([sys.executable, "-c", GONE, *where], env=dict(head.env), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(world.told("Joined")) == 1
    assert "agent" not in node.pids()


def test_agent_crash_and_node_loss_on_request(world: World, node: Node) -> None:
    world.perform(node.start(keeper=world.joined(1).keeper))
    world.wait("RestoreReady", 1)
    first = eventually(lambda: "rank-0" in node.pids() and node.pids())
    world.perform(m.Injure(node.config.node, "agent-crash"))
    again = world.joined(2)
    assert again.running is False
    assert node.pids()["agent"] != first["agent"]
    assert node.pids()["keeper"] == first["keeper"]

    world.perform(node.start(2, keeper=again.keeper))
    world.wait("RestoreReady", 2)
    pids = eventually(lambda: "rank-0" in node.pids() and node.pids())
    memory = Path(node.config.memory_dir)
    (memory / "slot-0-0.img").write_bytes(b"x" * 1000)
    told = {kind: len(world.told(kind)) for kind in ("RankExited", "KeeperLost", "Note")}
    world.perform(m.Injure(node.config.node, "node-loss"))
    eventually(lambda: not any(alive(pid) for pid in pids.values()))
    assert list(memory.iterdir()) == []
    time.sleep(2)
    assert {kind: len(world.told(kind)) for kind in told} == told, "it tells nothing of its own end"
    assert len(world.told("Joined")) == 2
