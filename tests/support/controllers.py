"""Controllers of many jobs, as the operator sees them: real HTTP on one port, a job on each loopback address.

All of 127.0.0.0/8 is this machine's, so each head Pod can have an address of its own without a route.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from support.apiserver import free_port

T = TypeVar("T")


@contextmanager
def serving() -> Iterator[Controllers]:
    """Some on a free port."""
    served = Controllers(free_port())
    served.start()
    try:
        yield served
    finally:
        served.stop()


def address(number: int) -> str:
    """The loopback address of the n-th controller, from 1."""
    return f"127.{100 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"


@dataclass
class Controller:
    """What one says; ``asked`` counts questions, ``calls`` are the requests to do something."""

    status: dict[str, Any]
    token: str | None = None
    seq: int = 1
    asked: int = 0
    refuses: int = 0
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Controllers:
    """Started and stopped from any thread; ``tell`` changes what one says, as an event does."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._known: dict[str, Controller] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None

    def start(self) -> None:
        self._thread.start()
        self._run(self._serve())

    def stop(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def add(self, ip: str, token: str | None = None, **status: Any) -> Controller:
        """A controller at ``ip``; without a token it takes any."""

        async def make() -> Controller:
            self._known[ip] = Controller({"controller": f"c-{ip}", "phase": "Running", "step": 0, **status}, token)
            return self._known[ip]

        return self._run(make())

    def tell(self, ip: str, *, quietly: bool = False, **changes: Any) -> None:
        """Its status changes; not ``quietly``: with an event, so that long polls are answered."""

        async def change() -> None:
            controller = self._known[ip]
            controller.status.update(changes)
            if not quietly:
                controller.seq += 1
                controller.changed.set()
                controller.changed = asyncio.Event()

        self._run(change())

    def refuse(self, ip: str, count: int) -> None:
        """Answer the next ``count`` requests with 503."""
        self._known[ip].refuses = count

    def remove(self, ip: str) -> None:
        self._known.pop(ip, None)

    def __getitem__(self, ip: str) -> Controller:
        return self._known[ip]

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "0.0.0.0", self.port, backlog=4096).start()

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        controller = self._known.get(request.transport.get_extra_info("sockname")[0])
        if controller is None:
            return web.json_response({"error": "no controller here"}, status=404)
        if controller.token is not None and request.headers.get("Authorization") != f"Bearer {controller.token}":
            return web.json_response({"error": "the job's bearer token is missing or another"}, status=401)
        if controller.refuses:
            controller.refuses -= 1
            return web.json_response({"error": "not now"}, status=503)
        if request.path != "/status":
            body = await request.json() if request.can_read_body else None
            controller.calls.append((request.method, request.path, body))
            return web.json_response({})
        return await self._status(controller, request)

    async def _status(self, controller: Controller, request: web.Request) -> web.Response:
        controller.asked += 1
        if controller.seq <= int(request.query.get("after", "0")):
            try:
                await asyncio.wait_for(controller.changed.wait(), float(request.query.get("wait", "0")))
            except TimeoutError:
                pass
        return web.json_response({**controller.status, "seq": controller.seq})
