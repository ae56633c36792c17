"""The driver with the real machine and nodes that only pretend: a job runs, loses what it may lose, and ends."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast import messages as m
from outlast.clock import SystemClock
from outlast.config import ControllerConfig, NodeConfig
from outlast.controller.driver import Driver, Logs
from outlast.controller.machine import Machine
from outlast.controller.settings import MachineConfig
from outlast.snapshot.identity import Attempt
from outlast.snapshot.inventory import Inventory
from outlast.telemetry.events import read_events
from outlast.telemetry.metrics_log import read_metrics
from support.controller_world import controller_config, node_config, until

STEP_S = 0.02


@dataclass
class PretendedNode:
    """A node of one rank that does ``total`` steps of nothing. It outlives controllers, as a real one would."""

    name: str
    total: int
    driver: Driver
    attempt: Attempt | None = None
    seat: int | None = None
    steps: int | None = None
    alive: bool = True
    registration: str = field(default_factory=lambda: secrets.token_hex(4))

    async def join(self) -> None:
        running = self.steps is not None
        joined = m.Joined(
            node=self.name,
            domain=self.name,
            host="127.0.0.1",
            attempt=self.attempt,
            seat=self.seat,
            running=running,
            keeper=("127.0.0.1", 9),
            free_port=9,
            procs=1,
            best_seen_attempt=self.attempt.number if self.attempt else 0,
            registration=self.registration,
        )
        self.say(joined)

    async def perform(self, instructions: str) -> None:
        for item in json.loads(instructions):
            await self._do(m.from_json(item))

    async def _do(self, instruction: m.Message) -> None:
        match instruction:
            case m.Stop():
                self.attempt, self.seat, self.steps = instruction.attempt, None, None
                self.say(m.Stopped(self.name, instruction.attempt, Inventory(self.name, ())))
            case m.Start():
                self.attempt, self.seat = instruction.attempt, instruction.seat
                self.say(m.RestoreReady(self.name, instruction.attempt))
            case m.Load() if self.seat is not None:
                self.steps = 0
                self.say(m.RankReady(self.name, instruction.attempt, self.seat, 0, 0.0, "none"))
            case m.Register():
                self.registration, self.seat, self.steps = secrets.token_hex(4), None, None
                await self.join()
            case _:
                pass

    def say(self, *events: m.Event) -> None:
        if self.alive:
            self.driver.receive(self.name, json.dumps([m.to_json(event) for event in events]))

    async def live(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            if self.seat is None or self.steps is None or self.attempt is None:
                self.say(m.Heartbeat(self.name, self.attempt))
                continue
            if self.steps < self.total:
                self._step(self.attempt, self.seat, self.steps + 1)
            elif self.alive:
                self.say(m.RankDone(self.name, self.attempt, self.seat, "digest", self.steps))
                self.steps = None

    def _step(self, attempt: Attempt, seat: int, steps: int) -> None:
        self.steps = steps
        self.say(m.Heartbeat(self.name, attempt, {seat: steps}, {seat: STEP_S}, total=self.total))
        told = {"attempt": str(attempt), "rank": seat, "step": steps, "total": self.total, "metrics": {"loss": 1.0}}
        if seat == 0 and self.alive:
            self.driver.receive(self.name, json.dumps([{"type": "Metrics", "node": self.name, **told}]))


@dataclass
class PretendedNodes:
    """The nodes of a job, by name."""

    total: int
    driver: Driver | None = None
    nodes: dict[str, PretendedNode] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def obtain(self, config: NodeConfig) -> PretendedNode:
        assert self.driver is not None
        if config.node not in self.nodes:
            self.nodes[config.node] = PretendedNode(config.node, self.total, self.driver)
            self.tasks.append(asyncio.create_task(self.nodes[config.node].live()))
        self.nodes[config.node].driver = self.driver
        return self.nodes[config.node]

    async def remove(self, node: str) -> None:
        self.nodes[node].alive = False


@asynccontextmanager
async def controller(config: ControllerConfig, nodes: PretendedNodes) -> AsyncIterator[Driver]:
    clock = SystemClock()
    machine = Machine(MachineConfig(replicas=2, spares=1), clock.monotonic(), lambda: secrets.token_hex(8))
    logs = Logs.open(config, clock)
    driver = Driver(config, secrets.token_hex(8), machine, nodes, logs, clock)
    nodes.driver = driver
    task = asyncio.create_task(driver.run())
    await asyncio.sleep(0)
    try:
        yield driver
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        logs.close()


def add_three(tmp_path: Path, driver: Driver) -> None:
    for number in range(3):
        driver.add_node(node_config(tmp_path, f"node-{number}"))


def of_kind(tmp_path: Path, kind: str) -> list[Any]:
    return [event for event in read_events(tmp_path / "events.jsonl") if event.kind == kind]


def test_a_job_runs_to_its_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        nodes = PretendedNodes(total=20)
        async with controller(controller_config(tmp_path), nodes) as driver:
            add_three(tmp_path, driver)
            await until(lambda: driver.finished, 20)
            status = driver.status()
            assert (status["outcome"], status["phase"], status["step"]) == ("succeeded", "Succeeded", 20)
            assert status["weights_digest"] == "digest"
            assert all(node.steps is None for node in nodes.nodes.values())

    asyncio.run(scenario())
    assert [line.step for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 21))
    assert of_kind(tmp_path, "finished")[0].fields == {"outcome": "succeeded", "unconfirmed": []}


def test_a_silent_node_is_given_up_and_a_spare_takes_its_seat(tmp_path: Path) -> None:
    async def scenario() -> None:
        nodes = PretendedNodes(total=100)
        async with controller(controller_config(tmp_path), nodes) as driver:
            add_three(tmp_path, driver)
            await until(lambda: driver.status()["step"] >= 3)
            seats = {node.seat: node for node in nodes.nodes.values()}
            seats[1].alive = False
            await until(lambda: driver.finished, 20)
            assert driver.status()["outcome"] == "succeeded"
            assert driver.status()["attempt"] == 2

    asyncio.run(scenario())
    assert len(of_kind(tmp_path, "node-lost")) == 1


def test_a_new_controller_takes_over_ranks_that_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        nodes, config = PretendedNodes(total=150), controller_config(tmp_path)
        async with controller(config, nodes) as driver:
            add_three(tmp_path, driver)
            await until(lambda: driver.status()["step"] >= 3)
            attempt = driver.status()["incarnation"]
        async with controller(config, nodes) as driver:
            await until(lambda: driver.status()["step"] >= 5)
            assert driver.status()["incarnation"] == attempt
            await until(lambda: driver.finished, 20)
            assert driver.status()["outcome"] == "succeeded"
            assert driver.status()["attempt"] == 1

    asyncio.run(scenario())
    assert of_kind(tmp_path, "restart") == []


def test_stopping_ends_all_ranks(tmp_path: Path) -> None:
    async def scenario() -> None:
        nodes = PretendedNodes(total=10_000)
        async with controller(controller_config(tmp_path), nodes) as driver:
            add_three(tmp_path, driver)
            await until(lambda: driver.status()["step"] >= 3)
            driver.request_stop("enough")
            await until(lambda: driver.finished)
            assert driver.status()["outcome"] == "stopped"
            assert all(node.steps is None for node in nodes.nodes.values())

    asyncio.run(scenario())
