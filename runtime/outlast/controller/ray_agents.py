"""Agents as detached Ray actors: one per node, named, started again by Ray when they die.

Looking an actor up and making one are blocking calls to Ray's head, so they run in a thread; calls to an actor are not.
An agent of a node with a raylet of its own is pinned to it by the custom resource that only this raylet offers: Ray
makes it once the raylet is there, and again whenever it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from outlast.agent.actor import AgentActor
from outlast.config import NodeConfig, agent_actor
from outlast.controller.link import AgentDied
from outlast.errors import TransferError

PINNED = 0.001
"""Of the resource that pins an agent to its raylet."""


class RayAgent:
    """One agent, by its actor's handle."""

    def __init__(self, node: str, handle: Any) -> None:
        self._node = node
        self._handle = handle
        self._joining: Any = None

    async def join(self) -> None:
        """One call at a time: those to an agent that Ray has yet to make would pile up."""
        if self._joining is None:
            self._joining = self._handle.join.remote()
        try:
            await self._answer(self._joining)
        except TransferError:
            self._joining = None
            raise
        self._joining = None

    async def perform(self, instructions: str) -> None:
        await self._answer(self._handle.perform.remote(instructions))

    async def _answer(self, call: Awaitable[Any]) -> None:
        try:
            await call
        except ActorDiedError as error:
            raise AgentDied(f"the agent of {self._node} has ended for good: {_first_line(error)}") from error
        except RayActorError as error:
            raise TransferError(f"the agent of {self._node} is not there just now: {_first_line(error)}") from error
        except RayError as error:
            raise TransferError(f"the agent of {self._node} failed at a call: {_last_line(error)}") from error


class RayAgents:
    """Finds and makes agents in one job's Ray namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    async def obtain(self, config: NodeConfig) -> RayAgent:
        """Find the node's agent, or make it. Raises TransferError."""
        return RayAgent(config.node, await asyncio.to_thread(self._obtain, config))

    async def remove(self, node: str) -> None:
        """End the node's agent for good, if there is one. Raises TransferError."""
        await asyncio.to_thread(self._remove, node)

    def _obtain(self, config: NodeConfig) -> Any:
        options = {
            "name": agent_actor(config.node),
            "namespace": self._namespace,
            "lifetime": "detached",
            "max_restarts": -1,
            "num_cpus": 0,
            "get_if_exists": True,
            "resources": {config.ray_resource: PINNED} if config.ray_resource else None,
        }
        try:
            return ray.remote(AgentActor).options(**options).remote(config.model_dump_json())
        except (RayError, ValueError, RuntimeError) as error:
            raise TransferError(f"Ray made no agent for {config.node}: {_first_line(error)}") from error

    def _remove(self, node: str) -> None:
        try:
            ray.kill(ray.get_actor(agent_actor(node), namespace=self._namespace), no_restart=True)
        except ValueError:
            return
        except RayError as error:
            raise TransferError(f"Ray did not end the agent of {node}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
