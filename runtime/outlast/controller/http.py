"""What people, ``trainctl`` and the operator ask a controller over HTTP. Every request but the first carries the job's
bearer token.

::

    GET    /healthz                           {"ok": true}, without a token
    GET    /status?after=N&wait=S             the machine's status and what only the driver knows; waits up to S seconds
                                              for an event newer than N
    GET    /events?after=N&wait=S&limit=K     events newer than N; waits up to S seconds for the first
    POST   /events {kind, text, fields?}      a line for the event log from who runs the job
    POST   /nodes  NodeConfig                 register a node, make its agent
    DELETE /nodes/{node}                      forget a node, end its agent for good
    PUT    /domains {machine: domain}         the failure domains of machines
    POST   /resize  {replicas, minReplicas, spares}
                                              the job shall have that size; refused when fewer nodes cannot hold it
    POST   /suspend {patience_s, reason?}     end the job once its state is in the store, or cannot come there in time
    POST   /hold    {patience_s}              have all ranks wait at a committed snapshot for another controller
    POST   /fault   {fault}                   break something on purpose (outlast.faults), if the job allows it
    POST   /stop   {reason?}                  end the job; once it is over, end the controller and its agents

Answers are JSON objects; a refused request is {"error": text} with 400 (wrong), 401 (no or another token), 404 or 503
(an agent did not answer in time).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from aiohttp import web

from outlast.controller.bodies import READERS
from outlast.controller.driver import Driver
from outlast.controller.registry import parse_node, write_private_json
from outlast.errors import RequestError, TransferError

MAX_WAIT_S = 60.0
"""The longest a request for events or for news may wait."""
MAX_EVENTS = 10_000
"""The most events in one answer."""
MAX_BODY = 8 * 1024 * 1024
"""Bytes of a request's body."""

HEALTH = "/healthz"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The handlers. ``leave`` ends the controller, a moment later; it is called for a stop after the job's end."""

    def __init__(self, driver: Driver, leave: Callable[[], None]) -> None:
        self._driver = driver
        self._leave = leave

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(HEALTH, self.health),
            web.get("/status", self.status),
            web.get("/events", self.events),
            web.post("/events", self.add_event),
            web.post("/nodes", self.add_node),
            web.delete("/nodes/{node}", self.remove_node),
            web.put("/domains", self.place),
            *(web.post(path, self.ask) for path in READERS),
            web.post("/stop", self.stop),
        ]

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True})

    async def status(self, request: web.Request) -> web.Response:
        if "after" in request.query:
            after = int(_number(request, "after", 0, float("inf")))
            await self._driver.news(after, _number(request, "wait", 0, MAX_WAIT_S))
        return web.json_response({**self._driver.status(), "pid": os.getpid()})

    async def events(self, request: web.Request) -> web.Response:
        after = int(_number(request, "after", 0, float("inf")))
        wait = _number(request, "wait", 0, MAX_WAIT_S)
        limit = int(_number(request, "limit", 1000, MAX_EVENTS))
        found = await self._driver.events_after(after, wait, limit)
        newest = found[-1].seq if found else after
        return web.json_response({"events": [event.to_json() for event in found], "seq": newest})

    async def add_event(self, request: web.Request) -> web.Response:
        body = await _object(request)
        kind, text, fields = body.get("kind"), body.get("text"), body.get("fields", {})
        if not isinstance(kind, str) or not isinstance(text, str) or not isinstance(fields, dict):
            raise RequestError("an event needs kind (text), text (text) and, if any, fields (an object)")
        return web.json_response({"seq": self._driver.log(kind, text, fields).seq})

    async def add_node(self, request: web.Request) -> web.Response:
        config = parse_node(await request.read())
        return web.json_response({"node": config.node, "new": self._driver.add_node(config)})

    async def remove_node(self, request: web.Request) -> web.Response:
        node = request.match_info["node"]
        if not await self._driver.remove_node(node):
            return web.json_response({"error": f"no node {node} is registered"}, status=404)
        return web.json_response({"node": node})

    async def place(self, request: web.Request) -> web.Response:
        domains = await _object(request)
        if not all(isinstance(domain, str) and domain for domain in domains.values()):
            raise RequestError("each machine needs its failure domain: text that is not empty")
        return web.json_response({"placed": self._driver.place(domains)})

    async def ask(self, request: web.Request) -> web.Response:
        asked = READERS[request.path](await _object(request))
        self._driver.ask(asked)
        return web.json_response({"asked": request.path.removeprefix("/")})

    async def stop(self, request: web.Request) -> web.Response:
        body = await _object(request) if request.can_read_body else {}
        stopping = self._driver.request_stop(str(body.get("reason", "asked to stop")))
        if not stopping:
            self._leave()
        return web.json_response({"stopping": "job" if stopping else "controller"})


def make_app(api: Api, token: str) -> web.Application:
    """The application that serves ``api`` to whoever has ``token``."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == HEALTH:
            return await handler(request)
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            return web.json_response({"error": "the job's bearer token is missing or another"}, status=401)
        try:
            return await handler(request)
        except RequestError as error:
            return web.json_response({"error": str(error)}, status=400)
        except (TransferError, TimeoutError) as error:
            return web.json_response({"error": str(error) or "no answer in time"}, status=503)

    app = web.Application(middlewares=[guard], client_max_size=MAX_BODY)
    app.add_routes(api.routes())
    return app


@asynccontextmanager
async def serving(app: web.Application, host: str, port: int, http_file: Path, identity: str) -> AsyncIterator[int]:
    """Serve ``app``, say where in ``http_file``, and yield the port. Raises OSError when it cannot be bound."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = int(runner.addresses[0][1])
        write_private_json(http_file, {"host": host, "port": bound, "pid": os.getpid(), "controller": identity})
        yield bound
    finally:
        await runner.cleanup()


def _number(request: web.Request, name: str, default: float, most: float) -> float:
    text = request.query.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise RequestError(f"{name}={text}: a number from 0 to {most:g} is needed")
    return min(value, most)


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except JSONDecodeError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    return body
