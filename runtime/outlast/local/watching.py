"""The supervisor's watches while a job runs: Ray's head, the controller's events and its status.

Each is a coroutine that runs until the job is over (``StatusWatch.run``) or until it is cancelled, and raises
OutlastError when the run cannot go on. A controller that does not answer is no error here: it is being started again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from outlast.errors import TransferError
from outlast.local.board import Board, Replacements
from outlast.local.client import ControllerClient
from outlast.local.faultgate import FaultPlan
from outlast.local.faults import Phase
from outlast.local.injury import Injury
from outlast.local.nodes import LocalNodes
from outlast.local.output import Output
from outlast.local.raycluster import RayHead

HEAD_EVERY_S = 0.1
STATUS_EVERY_S = 0.25
RETRY_S = 0.1
EVENTS_WAIT_S = 10.0
CONTROLLER_LIMIT_S = 30.0
"""A controller that has not answered for so long, while Ray's head lives, is launched again."""

PHASE_EVENTS = {
    "snapshot-permitted": Phase.COPY,
    "encoding": Phase.ENCODE,
    "restart": Phase.RESTART,
}
"""The kinds of events that say that a phase is under way."""


async def watch_head(ray: RayHead, revive: Callable[[], Awaitable[None]]) -> None:
    """Call ``revive`` whenever the GCS or the raylet is gone."""
    while True:
        await asyncio.sleep(HEAD_EVERY_S)
        if not ray.alive():
            await revive()


async def watch_events(
    client: ControllerClient, output: Output, on_phase: Callable[[Phase, int], Awaitable[None]]
) -> None:
    """Pass events on, each once, and say which phases begin at which step."""
    seen = 0
    while True:
        try:
            events = await client.events(seen, EVENTS_WAIT_S)
        except TransferError:
            await asyncio.sleep(RETRY_S)
            continue
        for event in events:
            seen = max(seen, int(event["seq"]))
            phase = PHASE_EVENTS.get(str(event["kind"]))
            if phase is not None:
                await on_phase(phase, _step_of(event))
        for event in events:
            output.event(event)


class StatusWatch:
    """Reads the status now and then: shows it, replaces lost nodes, lets paused ones go on. ``board`` is the newest."""

    def __init__(self, client: ControllerClient, output: Output, nodes: LocalNodes, replacements: Replacements) -> None:
        self._client = client
        self._output = output
        self._nodes = nodes
        self._replacements = replacements
        self.board = Board()

    async def run(self, relaunch: Callable[[], Awaitable[None]]) -> Board:
        """Watch until the job is over. ``relaunch`` is called when the controller stays silent."""
        heard = time.monotonic()
        while self.board.outcome is None:
            try:
                self.board = Board(await self._client.status())
                heard = time.monotonic()
                self._output.status(self.board.status)
                await self._tend()
            except TransferError:
                if time.monotonic() - heard > CONTROLLER_LIMIT_S:
                    await relaunch()
                    heard = time.monotonic()
            await asyncio.sleep(STATUS_EVERY_S)
        return self.board

    async def _tend(self) -> None:
        present = {node.config.node for node in self._nodes.present()}
        lost = self.board.lost() | (set(self.board.nodes) - present)
        for node in self._replacements.due(lost, time.monotonic()):
            await self._replace(node)
        for local in self._nodes.present():
            node, paused_at = local.config.node, local.paused_at
            if paused_at is not None and node in lost and self.board.running and self.board.step > paused_at:
                self._output.progress(f"{node}, paused and given up, goes on")
                self._nodes.resume(node)

    async def _replace(self, node: str) -> None:
        """A paused node stays for its return; any other is removed as a cluster would remove it."""
        local = self._nodes[node]
        if not local.paused_at:
            await self._nodes.lose(node)
            await self._client.remove_node(node)
        config = await self._nodes.create()
        self._output.progress(f"{config.node} replaces {node}")
        await self._client.add_node(config)


class PhaseFaults:
    """Performs the faults of a phase as soon as it is under way."""

    def __init__(self, plan: FaultPlan, injury: Injury) -> None:
        self._plan = plan
        self._injury = injury

    async def __call__(self, phase: Phase, step: int) -> None:
        """``step`` of the phase's beginning."""
        faults = self._plan.take(phase, step)
        if faults:
            await self._injury.perform(faults, await self._injury.scene(step))


def _step_of(event: dict[str, Any]) -> int:
    return int((event.get("fields") or {}).get("step") or 0)
