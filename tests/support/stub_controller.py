"""``python -m support.stub_controller ADDRESS NAMESPACE JOURNAL NODECONFIG``: a stand-in for the controller.

It makes the node's agent as the real one does and appends what that says to JOURNAL. Lines on stdin: a JSON list is
handed to the agent as instructions, ``restart`` makes another controller, ``join`` asks the agent to join.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
from pathlib import Path

import ray

from outlast.config import CONTROLLER_ACTOR, NodeConfig
from outlast.controller.ray_agents import RayAgents
from outlast.errors import TransferError


class StubController:
    """Takes note of what it is told."""

    def __init__(self, journal: str) -> None:
        self._journal = Path(journal)
        self._identity = secrets.token_hex(8)

    async def notify(self, node: str, events: str) -> str:
        with self._journal.open("a") as file:
            for event in json.loads(events):
                file.write(json.dumps({**event, "controller": self._identity}) + "\n")
        return json.dumps({"controller": self._identity, "known": True})


async def main(address: str, namespace: str, journal: str, config: str) -> None:
    ray.init(address=address, namespace=namespace, log_to_driver=False)
    options = {"name": CONTROLLER_ACTOR, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    controller = ray.remote(StubController).options(**options).remote(journal)
    node = NodeConfig.model_validate_json(Path(config).read_text())
    agent = await RayAgents(namespace).obtain(node)
    print("ready", flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if line == "restart":
            ray.kill(controller, no_restart=False)
        elif line == "join":
            await agent.join()
        else:
            with contextlib.suppress(TransferError):  # it may die of what it is told before it can answer
                await agent.perform(line)
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
