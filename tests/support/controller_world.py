"""A driver with everything around it faked: for tests of the controller's edge, in one process and one loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast import messages as m
from outlast.clock import SystemClock
from outlast.config import ControllerConfig, NodeConfig
from outlast.controller.driver import Driver, Logs
from outlast.errors import TransferError
from outlast.snapshot.identity import Attempt
from outlast.telemetry.events import read_events

ATTEMPT = Attempt(1, "0123456789abcdef")


def node_config(tmp_path: Path, node: str) -> NodeConfig:
    place = str(tmp_path)
    return NodeConfig(
        node=node,
        domain=node,
        job={},
        namespace="test",
        cwd=place,
        run_dir=place,
        log_dir=place,
        memory_dir=place,
        socket_dir=place,
        token_file=f"{place}/token",
        forkserver_socket=f"{place}/{node}.sock",
    )


def controller_config(tmp_path: Path, job: Any = None) -> ControllerConfig:
    return ControllerConfig(
        job=job or {}, name="demo", dir=str(tmp_path), namespace="test", token_file=f"{tmp_path}/token", tick_s=0.01
    )


@dataclass
class ScriptedMachine:
    """Answers each event's type with the instructions that it was given for it."""

    answers: dict[type, list[m.Instruction]] = field(default_factory=dict)
    seen: list[m.Event] = field(default_factory=list)
    objecting: str = ""
    nodes: dict[str, dict[str, Any]] = field(default_factory=lambda: {"node-0": {"state": "working"}})

    def objection(self, request: m.Event) -> str:
        return self.objecting

    def handle(self, event: m.Event, now: float) -> list[m.Instruction]:
        self.seen.append(event)
        return self.answers.get(type(event), [])

    def status(self, now: float) -> Mapping[str, Any]:
        return {"phase": "Running", "nodes": self.nodes}

    def of(self, kind: type) -> list[m.Event]:
        return [event for event in self.seen if isinstance(event, kind)]


@dataclass
class FakeAgent:
    """Notes what it is told; ``trouble`` happens at each call instead."""

    calls: list[Any] = field(default_factory=list)
    trouble: Callable[[], Awaitable[None]] | None = None

    async def join(self) -> None:
        await self._call("join")

    async def perform(self, instructions: str) -> None:
        await self._call([item["type"] for item in json.loads(instructions)])

    async def _call(self, what: Any) -> None:
        if self.trouble is not None:
            await self.trouble()
        self.calls.append(what)


@dataclass
class FakeAgents:
    """Agents by node; ``failures`` attempts at making one fail first."""

    made: dict[str, FakeAgent] = field(default_factory=dict)
    domains: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    failures: int = 0

    async def obtain(self, config: NodeConfig) -> FakeAgent:
        if self.failures > 0:
            self.failures -= 1
            raise TransferError("no room")
        self.domains[config.node] = config.domain
        return self.made.setdefault(config.node, FakeAgent())

    async def remove(self, node: str) -> None:
        self.removed.append(node)


@dataclass
class World:
    """A driver under test with all that surrounds it."""

    driver: Driver
    machine: ScriptedMachine
    agents: FakeAgents
    config: ControllerConfig

    def send(self, *events: m.Event, node: str = "node-0") -> dict[str, Any]:
        return self.driver.receive(node, json.dumps([m.to_json(event) for event in events]))

    def kinds(self) -> list[str]:
        return [event.kind for event in read_events(self.config.events_file)]


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def world(
    tmp_path: Path, nodes: int = 1, answers: Any = None, failures: int = 0, archivist: Any = None, job: Any = None
) -> AsyncIterator[World]:
    config = controller_config(tmp_path, job)
    clock = SystemClock()
    logs = Logs.open(config, clock)
    machine, agents = ScriptedMachine(answers or {}), FakeAgents(failures=failures)
    driver = Driver(config, "c0ffee", machine, agents, logs, clock, archivist)
    task = asyncio.create_task(driver.run())
    await asyncio.sleep(0)
    for number in range(nodes):
        driver.add_node(node_config(tmp_path, f"node-{number}"))
    try:
        yield World(driver, machine, agents, config)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        logs.close()


def heartbeat(node: str = "node-0") -> m.Heartbeat:
    return m.Heartbeat(node=node, attempt=ATTEMPT, steps={0: 3}, step_seconds={0: 0.5})
