"""Keeps a node in the Ray of the head that is in force: found by name, joined, and joined anew.

A raylet belongs to one head: when the name leads to another address, or the raylet has ended, what is left of it is
killed and another one started. Each offers a resource of its own name, to which the node's agent is pinned, so that
nobody can make that agent in a raylet that is about to be found dead. Forkserver and keeper know nothing of all this.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from outlast.errors import OutlastError
from outlast.hosting import processes
from outlast.hosting.raynode import RayMember
from outlast.pod.console import Console

LOOK_S = 10.0
"""How often the head's name is looked up while all is well."""
DOUBT_S = 0.5
"""How often while the head does not answer."""
CONNECT_S = 1.0
LOOKUP_S = 2.0
"""A name server that takes longer is waited for no longer while a head is known."""
_RETRY_S = (0.5, 5.0)

Find = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True)
class Joined:
    """A raylet that runs: the head's address, the session of its Ray, and the resource that it offers."""

    head: str
    session: str
    resource: str


async def addresses(host: str) -> Sequence[str]:
    """What a host name leads to now; nothing while there is no head."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return sorted({str(entry[4][0]) for entry in found})


def pick_head(current: str | None, found: Sequence[str]) -> str | None:
    """Which of ``found`` to belong to: the current one as long as it is among them. With none found, the current one
    stays: a name server that is away is no head that is gone."""
    if not found or current in found:
        return current
    return found[0]


def why_part(joined: Joined, head: str | None, session: str, alive: bool) -> str:
    """Why a raylet is of no use any more; "" while it is. ``session``: of the Ray at ``head``, "" where not known."""
    if not alive:
        return "the raylet has ended"
    if joined.head != head:
        return "another head is in force"
    return "the head's Ray was started anew" if session not in ("", joined.session) else ""


async def listens(host: str, port: int, limit_s: float = CONNECT_S) -> bool:
    """Whether somebody does, there."""
    try:
        async with asyncio.timeout(limit_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


class RayCare:
    """``run`` until it is cancelled. ``joined``: what runs now; ``changed`` is set whenever that is another."""

    def __init__(self, member: RayMember, host: str, port: int, node: str, console: Console, find: Find = addresses):
        self._member, self._host, self._port, self._node = member, host, port, node
        self._console, self._find = console, find
        self._doubt = asyncio.Event()
        self._head: str | None = None
        self._session = ""
        self._lookup: asyncio.Future[Sequence[str]] | None = None
        self.joined: Joined | None = None
        self.changed = asyncio.Event()

    @property
    def head(self) -> str | None:
        """The address of the head in force, as far as it is known."""
        return self._head

    def doubt(self) -> None:
        """The head does not answer: look for it now, and often until ``trust``."""
        self._doubt.set()

    def trust(self, session: str) -> None:
        """It answers, and that is the session of its Ray ("": it does not say)."""
        self._session = session
        self._doubt.clear()
        if self.joined is not None and session not in ("", self.joined.session):
            self._doubt.set()

    async def run(self) -> None:
        """Stay joined."""
        try:
            while True:
                await self._find_head()
                joined = self.joined
                reason = "" if joined is None else why_part(joined, self._head, self._session, self._member.alive())
                if reason:
                    await self._part(reason)
                if self.joined is None and self._head is not None:
                    await self._join(self._head)
                await self._wait()
        finally:
            if self._lookup is not None:
                self._lookup.cancel()

    async def _find_head(self) -> None:
        """One question to the name server at a time; its answer may be for a later look."""
        if self._lookup is None:
            self._lookup = asyncio.ensure_future(self._find(self._host))
        await asyncio.wait([self._lookup], timeout=None if self._head is None else LOOKUP_S)
        if not self._lookup.done():
            return
        found, self._lookup = self._lookup.result(), None
        head = pick_head(self._head, found)
        if head != self._head:
            self._console.say("head-found", address=head, before=self._head)
            self._head = head

    async def _part(self, reason: str) -> None:
        self._console.say("ray-left", reason=reason)
        self._set(None)
        await self._member.kill()

    async def _join(self, head: str) -> None:
        if not await listens(head, self._port):
            return
        resource = f"{self._node}-{secrets.token_hex(3)}"
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await self._member.join(f"{head}:{self._port}", resource)
        except OutlastError as error:
            self._console.say("ray-failed", head=head, reason=str(error))
            await self._member.kill()
            return
        self._set(Joined(head, self._member.session, resource))
        self._console.say("ray-joined", head=head, seconds=loop.time() - began)

    def _set(self, joined: Joined | None) -> None:
        self.joined = joined
        self.changed.set()
        self.changed = asyncio.Event()

    async def _wait(self) -> None:
        """Until there may be something to do: the raylet ended, the head is in doubt, or some time is over."""
        doubtful = self._doubt.is_set() or self.joined is None
        tasks = [asyncio.create_task(asyncio.sleep(DOUBT_S if doubtful else LOOK_S))]
        if self.joined is not None:
            tasks.append(asyncio.create_task(processes.ended(self._member.pids)))
        if not doubtful:
            tasks.append(asyncio.create_task(self._doubting()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _doubting(self) -> None:
        await self._doubt.wait()
