"""A node Pod's ``/healthz``: 200 once the controller knows the node, 503 before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def answering(port: int, known: Callable[[], bool]) -> AsyncIterator[int]:
    """Answer on ``port`` (0: any free one) as long as this lasts; the port. Raises OSError when it is taken."""

    async def health(_: web.Request) -> web.Response:
        ok = known()
        return web.json_response({"ok": ok}, status=200 if ok else 503)

    app = web.Application()
    app.add_routes([web.get("/healthz", health)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "0.0.0.0", port)
        await site.start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
