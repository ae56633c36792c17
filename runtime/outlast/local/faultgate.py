"""The gate at which ranks ask before a step that has faults, and the list of what is still to break.

A rank connects to an AF_UNIX socket, writes ``{"rank", "world", "node", "attempt", "step"}`` as a line of JSON before
each of its fault steps and waits for ``{"go": true}``, ``{"raise": text}`` or ``{"slow": factor}``. Faults of one
boundary are performed together when every rank of the attempt has arrived there (then all of the previous step's
collectives are over, so that what is lost is the same in every run), and only then is any rank let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast.hosting import processes
from outlast.local.faults import Fault, Kind, Phase, due

GATHER_LIMIT_S = 30.0
"""How long ranks wait at a boundary for others that do not come (they died, or use another script's path)."""


@dataclass(frozen=True)
class Scene:
    """Who was where when the faults happen. ``ranks``: rank -> pid, as far as known; ``nodes``: seat -> node."""

    attempt: int
    step: int
    ranks: Mapping[int, int]
    nodes: Mapping[int, str]


Performer = Callable[[Sequence[Fault], Scene], Awaitable[None]]
"""Carries out the faults that are not the rank's own to carry out, and records all of them; raises nothing."""


class FaultPlan:
    """The faults that have not happened yet; each is handed out once."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._left = list(faults)
        self.reached = 0
        """The latest step at which faults were asked for."""

    @property
    def left(self) -> tuple[Fault, ...]:
        return tuple(self._left)

    def take(self, phase: Phase, step: int) -> list[Fault]:
        """Those due now, in the order to perform them; from now on they have happened."""
        self.reached = max(self.reached, step)
        found = due(self._left, phase, step)
        self._left = [fault for fault in self._left if fault not in found]
        return found


@dataclass
class _Gathering:
    """The ranks of one attempt that wait before one step."""

    pids: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    answers: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class FaultGate:
    """Serves the gate for a job with ``procs`` ranks on each node; each attempt may have another number of ranks."""

    def __init__(self, path: Path, plan: FaultPlan, procs: int, perform: Performer) -> None:
        self.path = path
        self._plan = plan
        self._procs = procs
        self._perform = perform
        self._gatherings: dict[tuple[int, int], _Gathering] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path=str(self.path))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid = _peer_pid(writer.get_extra_info("socket"))
        with contextlib.suppress(ConnectionError, ValueError, KeyError):
            while line := await reader.readline():
                answer = await self._arrive(json.loads(line), pid)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _arrive(self, asked: Mapping[str, Any], pid: int) -> dict[str, Any]:
        step, attempt, rank = int(asked["step"]), int(asked["attempt"]), int(asked["rank"])
        if not due(self._plan.left, Phase.BOUNDARY, step):
            return {"go": True}
        gathering = self._gatherings.setdefault((attempt, step), _Gathering())
        gathering.pids[rank] = pid
        gathering.nodes[rank // self._procs] = str(asked["node"])
        loop = asyncio.get_running_loop()
        answer = gathering.answers.setdefault(rank, loop.create_future())
        if gathering.timer is None:
            gathering.timer = loop.call_later(GATHER_LIMIT_S, self._expire, attempt, step)
        if len(gathering.answers) == int(asked["world"]):
            self._fire(attempt, step)
        return await asyncio.shield(answer)

    def _expire(self, attempt: int, step: int) -> None:
        """Not all came: do it without the others, unless the attempt is over (some of those that came are dead)."""
        if all(processes.is_running(pid) for pid in self._gatherings[attempt, step].pids.values()):
            self._fire(attempt, step)
        else:
            _let_go(self._gatherings.pop((attempt, step)), {})

    def _fire(self, attempt: int, step: int) -> None:
        """The boundary is reached: perform its faults, then let the ranks go."""
        gathering = self._gatherings.pop((attempt, step))
        if gathering.timer is not None:
            gathering.timer.cancel()
        task = asyncio.get_running_loop().create_task(self._execute(attempt, step, gathering))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _execute(self, attempt: int, step: int, gathering: _Gathering) -> None:
        faults = self._plan.take(Phase.BOUNDARY, step)
        await self._perform(faults, Scene(attempt, step, gathering.pids, gathering.nodes))
        _let_go(gathering, {fault.target: _answer(fault) for fault in faults if _answer(fault)})


def _answer(fault: Fault) -> dict[str, Any]:
    """What the target rank is told to do itself; empty when there is nothing."""
    if fault.kind is Kind.RANK_ERROR:
        return {"raise": f"injected by --fault {fault}"}
    if fault.kind is Kind.STRAGGLER:
        return {"slow": fault.factor}
    return {}


def _let_go(gathering: _Gathering, answers: Mapping[int | None, dict[str, Any]]) -> None:
    for rank, future in gathering.answers.items():
        if not future.done():
            future.set_result(answers.get(rank) or {"go": True})


def _peer_pid(peer: socket.socket) -> int:
    """The process at the other end, from the kernel (SO_PEERCRED, unix(7))."""
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(pid)
