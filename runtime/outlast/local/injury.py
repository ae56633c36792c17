"""Carries faults out: finds the processes that are meant, and kills, stops or corrupts.

All faults of one moment are resolved before the first is performed. Every one is written to DIR/faults.jsonl, whether
it found its target or not, and told to the controller's event log as far as there is a controller to tell.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from outlast.config import NodeConfig
from outlast.errors import OutlastError, TransferError
from outlast.hosting import processes
from outlast.hosting.raynode import RayHead
from outlast.local.board import Board
from outlast.local.faultgate import Scene
from outlast.local.faults import NODE_KINDS, Fault, Kind, Part, Phase
from outlast.local.nodes import LocalNodes
from outlast.snapshot.imagefiles import corrupt

TELL_LIMIT_S = 1.0


class Controller(Protocol):
    """What is asked of the controller here."""

    async def record(self, kind: str, text: str, fields: Mapping[str, Any]) -> None: ...

    def pid(self) -> int | None: ...


Introduce = Callable[[NodeConfig], Awaitable[None]]
"""Have the controller know of a node, now or as soon as there is one that answers."""
Say = Callable[[str], None]
Reached = Callable[[int], None]
"""Told how many steps were done when a fault struck, which nobody who survives it may know."""


class Injury:
    """``perform`` is the gate's performer; phase faults use it with a scene from ``scene``."""

    def __init__(
        self,
        nodes: LocalNodes,
        ray: RayHead,
        controller: Controller,
        introduce: Introduce,
        journal: Path,
        say: Say,
        reached: Reached,
    ) -> None:
        self._nodes = nodes
        self._ray = ray
        self._controller = controller
        self._introduce = introduce
        self._journal = journal
        self._say = say
        self._reached = reached
        self._board = Board()
        self.head_killed = 0.0
        """When (wall seconds) a fault last killed the head."""

    def know(self, board: Board) -> None:
        """The newest status: who has which seat."""
        self._board = board

    async def perform(self, faults: Sequence[Fault], scene: Scene) -> None:
        """Perform ``faults`` together, corruption first; returns when all are done.

        What is under way may be over in a moment: then it is told afterwards.
        """
        if not faults:
            return
        self._reached(scene.step)
        waits = all(fault.phase is Phase.BOUNDARY for fault in faults)
        if waits:
            await asyncio.gather(*(self._tell(fault, scene) for fault in faults))
        corrupting = [fault for fault in faults if fault.kind is Kind.CORRUPT]
        await self._all(corrupting, scene)
        await self._all([fault for fault in faults if fault not in corrupting], scene)
        if not waits:
            await asyncio.gather(*(self._tell(fault, scene) for fault in faults))

    def scene(self) -> Scene:
        """Who is where now: seats as the controller last said, pids as they are."""
        seats = self._board.seats()
        ranks = {rank: pid for node in seats.values() for rank, pid in _ranks(self._nodes.roles(node)).items()}
        return Scene(self._board.attempt, self._board.best_step, ranks, seats)

    async def _all(self, faults: Sequence[Fault], scene: Scene) -> None:
        await asyncio.gather(*(self._one(fault, scene) for fault in faults))

    async def _one(self, fault: Fault, scene: Scene) -> None:
        began = time.time()
        node = scene.nodes.get(fault.target) if fault.kind in NODE_KINDS and fault.target is not None else None
        detail = await self._performers[fault.kind](self, fault, scene, node)
        line = {
            "time": began,
            "fault": str(fault),
            "kind": fault.kind.value,
            "step": scene.step,
            "phase": fault.phase.value,
            "attempt": scene.attempt,
            "target": fault.target,
            "node": node,
            "done": bool(detail),
            "detail": detail,
        }
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")

    async def _tell(self, fault: Fault, scene: Scene) -> None:
        self._say(f"injecting {fault} at step {scene.step} of attempt {scene.attempt}")
        fields = {"fault": str(fault), "step": scene.step, "target": fault.target}
        try:
            async with asyncio.timeout(TELL_LIMIT_S):
                await self._controller.record("fault-injected", str(fault), fields)
        except (TransferError, TimeoutError):
            return

    # --- one method a kind: what was done, as a list; empty when its target was not there -----------------------------

    async def _signal_rank(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del node
        pid = scene.ranks.get(fault.target if fault.target is not None else -1)
        return _signal(pid, signal.SIGSTOP if fault.kind is Kind.HANG else signal.SIGKILL)

    async def _answer_rank(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del node
        return [pid for rank, pid in scene.ranks.items() if rank == fault.target]

    async def _lose_node(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del fault, scene
        return [] if node is None else list(await self._nodes.lose(node))

    async def _pause_node(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del fault
        return [] if node is None else list(self._nodes.pause(node, scene.step))

    async def _drain_node(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del fault, scene
        return [] if node is None else list(self._nodes.tell_to_leave(node))

    async def _add_node(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del fault, scene, node
        try:
            config = await self._nodes.create()
        except OutlastError as error:
            self._say(str(error))
            return []
        await self._introduce(config)
        return [config.node]

    async def _corrupt_node(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del scene
        if node is None:
            return []
        return list(corrupt(Path(self._nodes[node].config.memory_dir), fault.part or Part.DATA))

    async def _crash_member(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del scene
        role = "keeper" if fault.kind is Kind.KEEPER_CRASH else "agent"
        return [] if node is None else _signal(self._nodes.roles(node).get(role), signal.SIGKILL)

    async def _crash_controller(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del fault, scene, node
        return _signal(self._controller.pid(), signal.SIGKILL)

    async def _lose_head(self, fault: Fault, scene: Scene, node: str | None) -> list[Any]:
        del fault, scene, node
        self.head_killed = time.time()
        pids = [*self._ray.pids, *(pid for pid in (self._controller.pid(),) if pid)]
        processes.send(pids, signal.SIGKILL)
        return pids

    _Performer = Callable[["Injury", Fault, Scene, str | None], Awaitable[list[Any]]]
    _performers: Mapping[Kind, _Performer] = {
        Kind.RANK_CRASH: _signal_rank,
        Kind.HANG: _signal_rank,
        Kind.RANK_ERROR: _answer_rank,
        Kind.STRAGGLER: _answer_rank,
        Kind.NODE_LOSS: _lose_node,
        Kind.NODE_PAUSE: _pause_node,
        Kind.NODE_LEAVE: _drain_node,
        Kind.NODE_JOIN: _add_node,
        Kind.CORRUPT: _corrupt_node,
        Kind.KEEPER_CRASH: _crash_member,
        Kind.AGENT_CRASH: _crash_member,
        Kind.CONTROLLER_CRASH: _crash_controller,
        Kind.HEAD_LOSS: _lose_head,
    }


def _signal(pid: int | None, number: signal.Signals) -> list[Any]:
    if pid is None or not processes.is_running(pid):
        return []
    processes.send([pid], number)
    return [pid]


def _ranks(roles: Mapping[str, int]) -> dict[int, int]:
    """Rank -> pid, of the roles "rank-N"."""
    found = ((role.partition("-"), pid) for role, pid in roles.items())
    return {int(number): pid for (noun, _, number), pid in found if noun == "rank" and number.isdecimal()}
