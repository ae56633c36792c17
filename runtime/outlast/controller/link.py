"""The controller's line to one node's agent: finds or makes the agent, has it join, hands it instructions in order.

Nothing here blocks the controller: ``put`` only queues. One call is under way at a time, so that instructions arrive in
the order in which they were decided, and none outlives its deadline. A call that fails says little: an agent that died
is started again by Ray and joins by itself, one that is paused or cut off is judged by its heartbeats. Only an agent
that Ray calls dead for good is reported as gone. Nor is what it carried repeated here: an agent that dies loses what it
took, a controller what it queued, so whoever decides says again what has not been answered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Protocol

from outlast.config import NodeConfig
from outlast.errors import TransferError

CALL_S = 5.0
"""Seconds that an agent has to acknowledge a call; it acts on it later."""
OBTAIN_S = 60.0
"""Seconds that finding or making an agent may take."""
RETRY_S = (0.5, 5.0)
"""Seconds before the first and the longest wait between attempts to find or make an agent."""


class AgentDied(TransferError):
    """An agent is gone for good: nothing will start it again."""


class Agent(Protocol):
    """One node's agent. Both calls return when it has taken the order, not when it has carried it out."""

    async def join(self) -> None:
        """Have it send ``Joined``. Raises TransferError, AgentDied."""
        ...

    async def perform(self, instructions: str) -> None:
        """Hand it a JSON list of instructions. Raises TransferError, AgentDied."""
        ...


class Agents(Protocol):
    """Where agents come from."""

    async def obtain(self, config: NodeConfig) -> Agent:
        """Find the node's agent, or make it. Raises TransferError."""
        ...

    async def remove(self, node: str) -> None:
        """End the node's agent for good, if there is one. Raises TransferError."""
        ...


Report = Callable[[str, str], None]
"""Called with a kind (agent-made, agent-silent, agent-answers, agent-gone) and a text."""


class AgentLink:
    """``run`` is the line's whole life; it returns when the agent is gone for good."""

    def __init__(self, config: NodeConfig, agents: Agents, report: Report) -> None:
        self.config = config
        self._agents = agents
        self._report = report
        self._pending: list[dict[str, Any]] = []
        self._join_wanted = True
        self._work = asyncio.Event()
        self._work.set()
        self._silent = False

    def put(self, instruction: dict[str, Any]) -> None:
        """Queue an instruction."""
        self._pending.append(instruction)
        self._work.set()

    def join(self) -> None:
        """Have the agent join again, before anything that is put from now on."""
        self._join_wanted = True
        self._work.set()

    def drop_pending(self) -> None:
        """Forget what was queued for a node that is given up."""
        self._pending.clear()

    async def run(self) -> None:
        """Carry instructions until the agent is gone for good."""
        try:
            agent = await self._obtain()
            while True:
                await self._work.wait()
                await self._flush(agent)
        except AgentDied as death:
            self._report("agent-gone", str(death))

    async def _obtain(self) -> Agent:
        wait = RETRY_S[0]
        while True:
            try:
                async with asyncio.timeout(OBTAIN_S):
                    return await self._agents.obtain(self.config)
            except (TransferError, TimeoutError) as error:
                self._fail(f"no agent could be made: {error or f'it took over {OBTAIN_S:g} s'}")
            await asyncio.sleep(wait)
            wait = min(2 * wait, RETRY_S[1])

    async def _flush(self, agent: Agent) -> None:
        self._work.clear()
        if self._join_wanted:
            self._join_wanted = not await self._call(agent.join())
            if self._join_wanted:
                await self._wait_and_retry()
                return
        batch, self._pending = self._pending, []
        if batch:
            await self._call(agent.perform(json.dumps(batch)))

    async def _call(self, call: Any) -> bool:
        try:
            async with asyncio.timeout(CALL_S):
                await call
        except AgentDied:
            raise
        except (TransferError, TimeoutError) as error:
            self._fail(str(error) or f"no answer within {CALL_S:g} s")
            return False
        if self._silent:
            self._silent = False
            self._report("agent-answers", "the agent answers again")
        return True

    async def _wait_and_retry(self) -> None:
        await asyncio.sleep(RETRY_S[0])
        self._work.set()

    def _fail(self, text: str) -> None:
        if not self._silent:
            self._silent = True
            self._report("agent-silent", text)
