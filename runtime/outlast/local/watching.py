"""The supervisor's watches while a job runs: Ray's head, the controller's events and its status, the nodes' images.

Each is a coroutine that runs until the job is over (``StatusWatch.run``) or until it is cancelled, and raises
OutlastError when the run cannot go on. A controller that does not answer is no error here: it is being started again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlast.errors import TransferError
from outlast.hosting.client import ControllerClient
from outlast.hosting.raynode import RayHead
from outlast.local.board import Board
from outlast.local.faultgate import FaultPlan
from outlast.local.faults import Phase
from outlast.local.history import RESTORED
from outlast.local.injury import Injury
from outlast.local.nodes import LocalNodes
from outlast.snapshot.imagefiles import PARITIES, SHARDS, being_written

HEAD_EVERY_S = 0.1
STATUS_EVERY_S = 0.25
RETRY_S = 0.1
EVENTS_WAIT_S = 10.0
CONTROLLER_LIMIT_S = 30.0
"""A controller that has not answered for so long, while Ray's head lives, is launched again."""

IMAGES_EVERY_S = 0.002

PHASE_FILES = {Phase.COPY: SHARDS, Phase.ENCODE: PARITIES}


async def watch_head(ray: RayHead, revive: Callable[[], Awaitable[None]]) -> None:
    """Call ``revive`` whenever the GCS or the raylet is gone."""
    while True:
        await asyncio.sleep(HEAD_EVERY_S)
        if not ray.alive():
            await revive()


async def watch_events(client: ControllerClient, on_event: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Pass events on, each once."""
    seen = 0
    while True:
        try:
            events = await client.events(seen, EVENTS_WAIT_S)
        except TransferError:
            await asyncio.sleep(RETRY_S)
            continue
        for event in events:
            seen = max(seen, int(event["seq"]))
            await on_event(event)


class StatusWatch:
    """Reads the status now and then; ``board`` is the newest."""

    def __init__(self, client: ControllerClient) -> None:
        self._client = client
        self.board = Board()

    async def run(
        self, on_status: Callable[[Board], Awaitable[None]], relaunch: Callable[[], Awaitable[None]]
    ) -> Board:
        """Watch until the job is over. ``relaunch`` is called when the controller stays silent."""
        heard = time.monotonic()
        while self.board.outcome is None:
            try:
                self.board = Board(await self._client.status())
                heard = time.monotonic()
                await on_status(self.board)
            except TransferError:
                if time.monotonic() - heard > CONTROLLER_LIMIT_S:
                    await relaunch()
                    heard = time.monotonic()
            await asyncio.sleep(STATUS_EVERY_S)
        return self.board


class PhaseFaults:
    """Performs the faults of a phase as soon as it is under way."""

    def __init__(self, plan: FaultPlan, injury: Injury, nodes: LocalNodes) -> None:
        self._plan = plan
        self._injury = injury
        self._nodes = nodes

    async def watch_images(self) -> None:
        """See copies and encodings in the nodes' memory, where they show at once; ends when no fault waits for one."""
        while phases := {fault.phase for fault in self._plan.left} & PHASE_FILES.keys():
            folders = [Path(node.config.memory_dir) for node in self._nodes.present()]
            for phase in phases:
                generation = being_written(folders, PHASE_FILES[phase])
                if generation is not None:
                    await self._perform(phase, generation.step)
            await asyncio.sleep(IMAGES_EVERY_S)

    async def on_event(self, event: Mapping[str, Any]) -> None:
        """A recovery is under way when it is decided what to restore: ranks start now."""
        if event["kind"] in RESTORED and any(fault.phase is Phase.RESTART for fault in self._plan.left):
            scene = self._injury.scene()
            step = max(scene.step, self._plan.reached)  # the status may not have heard of the last steps
            await self._injury.perform(self._plan.take(Phase.RESTART, step), scene)

    async def _perform(self, phase: Phase, step: int) -> None:
        faults = self._plan.take(phase, step)
        if faults:
            await self._injury.perform(faults, replace(self._injury.scene(), step=step))
