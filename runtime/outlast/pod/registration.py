"""A node's standing with the controller: when it must be registered there, and when all is over.

Whoever the controller is, it must know the node: it is asked again and again, often until the node has joined, seldom
after that but for events that concern it. Registering is repeated for another controller, for another raylet of the
node's own, and for a node that it does not know or has given up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from outlast.config import NodeConfig
from outlast.errors import TransferError
from outlast.hosting.client import ControllerClient, ControllerRefused
from outlast.pod.console import Console
from outlast.pod.raycare import Joined, RayCare

AGAIN_S = 5.0
"""Seconds before a node that is still not known is registered once more with the same controller."""
SOON_S = 0.5
"""Between two looks until it has joined, and after a call that failed."""
LATER_S = 30.0
"""Between two looks afterwards, when no event concerns the node; up to half as much longer, so that nodes do not ask
all at once."""
EVENTS_S = 10.0
"""How long one request for events waits."""

KNOWN = frozenset({"joining", "active", "spare", "leaving"})
"""States of a node that the controller counts on, or will."""
_TELLING = frozenset({"controller-started", "finished"})
_WRONG = 400


@dataclass(frozen=True)
class Standing:
    """What a status says of one node. ``session``: of the controller's Ray; ``state`` None: the node is not known."""

    controller: str
    session: str
    seq: int
    state: str | None
    outcome: str | None

    @property
    def known(self) -> bool:
        return self.state in KNOWN


@dataclass(frozen=True)
class Registered:
    """That the node was registered: with whom, for which raylet, and when (monotonic seconds)."""

    controller: str
    joined: Joined
    at: float


def standing_of(status: Mapping[str, Any], node: str) -> Standing:
    """What ``status`` says of ``node``."""
    found = (status.get("nodes") or {}).get(node) or {}
    session, seq = str(status.get("ray") or ""), int(status.get("seq") or 0)
    return Standing(str(status.get("controller")), session, seq, found.get("state"), status.get("outcome"))


def must_register(standing: Standing, joined: Joined, before: Registered | None, now: float) -> bool:
    """Whether to register: for the first time, with another controller, for another raylet, or again."""
    elsewhere = standing.session not in ("", joined.session)
    if standing.outcome is not None or standing.state == "left" or elsewhere:
        return False
    if before is None or (before.controller, before.joined) != (standing.controller, joined):
        return True
    return not standing.known and now - before.at >= AGAIN_S


def concern(events: Iterable[Mapping[str, Any]], node: str) -> bool:
    """Whether any of these is a reason to ask for the status now."""
    return any(event["kind"] in _TELLING or (event.get("fields") or {}).get("node") == node for event in events)


class Registration:
    """``run`` until the job is over. ``known``: the controller knows the node. ``config``: the node as it is with the
    raylet that runs now."""

    def __init__(
        self,
        client: ControllerClient,
        care: RayCare,
        config: Callable[[Joined], NodeConfig],
        node: str,
        console: Console,
    ) -> None:
        self._client, self._care, self._config, self._node = client, care, config, node
        self._console = console
        self._before: Registered | None = None
        self._standing: Standing | None = None
        self._silent = False

    @property
    def known(self) -> bool:
        """Whether the controller that was heard last knows the node."""
        return self._standing is not None and self._standing.known

    async def run(self) -> str:
        """Keep the node registered; the job's outcome, once there is one."""
        while True:
            try:
                standing = await self._look()
                self._heard(standing)
                if standing.outcome is not None:
                    return standing.outcome
                await self._await_reason(standing)
            except TransferError as error:
                self._unheard(error)
                await asyncio.sleep(SOON_S)

    async def _look(self) -> Standing:
        status = await self._client.status()
        standing = standing_of(status, self._node)
        if standing != self._standing:
            self._tell(standing)
        self._standing = standing
        joined, now = self._care.joined, asyncio.get_running_loop().time()
        if joined is not None and must_register(standing, joined, self._before, now):
            await self._register(joined)
            self._before = Registered(standing.controller, joined, now)
        return standing

    async def _register(self, joined: Joined) -> None:
        """Under the same id with another raylet, the one before is forgotten first: it is gone."""
        config = self._config(joined)
        try:
            await self._client.add_node(config)
        except ControllerRefused as refusal:
            if refusal.status != _WRONG:
                raise
            await self._client.remove_node(self._node)
            await self._client.add_node(config)
        self._console.say("registered", resource=joined.resource)

    async def _await_reason(self, standing: Standing) -> None:
        """Until there is a reason to look again."""
        if not standing.known or self._care.joined is None:
            await asyncio.sleep(SOON_S)
            return
        tasks = {asyncio.create_task(self._care.changed.wait()), asyncio.create_task(self._await_concern(standing.seq))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _await_concern(self, seq: int) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + LATER_S * random.uniform(1.0, 1.5)
        while loop.time() < until:
            events = await self._client.events(seq, EVENTS_S)
            seq = max([seq, *(int(event["seq"]) for event in events)])
            if concern(events, self._node):
                return

    def _heard(self, standing: Standing) -> None:
        self._care.trust(standing.session)
        self._silent = False

    def _unheard(self, error: TransferError) -> None:
        self._care.doubt()
        if not self._silent:
            self._silent = True
            self._console.say("controller-unreachable", reason=str(error))

    def _tell(self, standing: Standing) -> None:
        before = self._standing
        if before is None or (before.controller, before.state, before.outcome) != (
            standing.controller,
            standing.state,
            standing.outcome,
        ):
            self._console.say(
                "standing", state=standing.state or "unknown", controller=standing.controller, outcome=standing.outcome
            )
