"""Controllers of any number of jobs on one port: ``many_controllers.py PORT NODES [EVENT_S]``.

Whoever asks with a token that was not seen before is a new job, which runs from then on: five steps a second, and an
event, at which long polls are answered, every EVENT_S seconds (10).
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys
import time

from aiohttp import web

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from support.said import said

STEPS_A_SECOND = 5


class Jobs:
    """When each job was asked about first, by its token."""

    def __init__(self, nodes: int, event_s: float) -> None:
        self._nodes = [f"node-{number}" for number in range(nodes)]
        self._event_s = event_s
        self._born: dict[str, float] = {}

    async def status(self, request: web.Request) -> web.Response:
        token = request.headers.get("Authorization", "")
        born = self._born.setdefault(token, time.monotonic())
        after, wait = int(request.query.get("after", "0")), float(request.query.get("wait", "0"))
        due = born + after * self._event_s - time.monotonic()
        if due > 0:
            await asyncio.sleep(min(due, wait))
        age = time.monotonic() - born
        status = said(self._nodes, step=int(age * STEPS_A_SECOND), controller=f"c-{hash(token):x}")
        return web.json_response({**status, "seq": 1 + int(age / self._event_s)})

    async def asked(self, request: web.Request) -> web.Response:
        print(json.dumps({"method": request.method, "path": request.path}), flush=True)
        return web.json_response({})


def main() -> None:
    port, nodes = int(sys.argv[1]), int(sys.argv[2])
    jobs = Jobs(nodes, float(sys.argv[3]) if len(sys.argv) > 3 else 10.0)
    app = web.Application()
    app.router.add_get("/status", jobs.status)
    app.router.add_route("*", "/{path:.*}", jobs.asked)
    web.run_app(app, host="0.0.0.0", port=port, access_log=None, print=None, backlog=4096)


main()
