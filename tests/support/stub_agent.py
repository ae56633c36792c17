"""``python -m support.stub_agent ADDRESS NAMESPACE FOLDER NODE...``: stand-ins for agents, under the agents' names.

A controller finds them as its own. Each writes what it is told to FOLDER/NODE.jsonl and registers with the controller
when it is asked to join.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import ray

from outlast import messages as m
from outlast.config import CONTROLLER_ACTOR, agent_actor
from outlast.snapshot.identity import Attempt
from outlast.snapshot.inventory import Inventory


class StubAgent:
    """Does as it is told by noting it."""

    def __init__(self, node: str, folder: str) -> None:
        self._node = node
        self._journal = Path(folder) / f"{node}.jsonl"
        self._note({"type": "born", "pid": os.getpid()})

    async def join(self) -> None:
        self._note({"type": "join"})
        joined = m.Joined(
            node=self._node,
            domain=self._node,
            host="127.0.0.1",
            attempt=None,
            seat=None,
            running=False,
            keeper=("127.0.0.1", 9),
            free_port=9,
            procs=1,
            registration=secrets.token_hex(4),
        )
        info = {"type": "Info", "node": self._node, "fields": {"agent_pid": os.getpid()}}
        self._note(await self._tell(m.to_json(joined), info))

    async def perform(self, instructions: str) -> None:
        for instruction in json.loads(instructions):
            self._note(instruction)
            if instruction["type"] == "Stop":
                stopped = m.Stopped(self._node, Attempt.parse(instruction["attempt"]), Inventory(self._node, ()))
                await self._tell(m.to_json(stopped))

    async def _tell(self, *events: dict[str, Any]) -> dict[str, Any]:
        controller = ray.get_actor(CONTROLLER_ACTOR)
        answer: dict[str, Any] = json.loads(await controller.notify.remote(self._node, json.dumps(events)))
        return answer

    def _note(self, value: dict[str, object]) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps(value) + "\n")


def main(address: str, namespace: str, folder: str, *nodes: str) -> None:
    ray.init(address=address, namespace=namespace, log_to_driver=False)
    for node in nodes:
        options = {"name": agent_actor(node), "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
        handle = ray.remote(StubAgent).options(**options).remote(node, folder)
        ray.get(handle.perform.remote("[]"), timeout=30)


if __name__ == "__main__":
    main(*sys.argv[1:])
