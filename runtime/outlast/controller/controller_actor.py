"""The controller as a detached Ray actor: the driver, the machine and HTTP in one asyncio loop.

Ray starts it again whenever it dies (``max_restarts=-1``), with the same configuration; it then learns from the agents
what goes on. An error that it did not foresee ends its process at once, for the same cure.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
import traceback
from pathlib import Path

import ray

from outlast.clock import SystemClock
from outlast.config import ControllerConfig
from outlast.controller.archivist import Archivist, Charge
from outlast.controller.driver import Driver, Logs
from outlast.controller.http import Api, make_app, serving
from outlast.controller.job_settings import settings_of
from outlast.controller.keptfile import read_kept
from outlast.controller.machine import Machine
from outlast.controller.ray_agents import RayAgents
from outlast.controller.registry import parse_node

LEAVE_S = 0.2
"""Seconds between the answer to the last request and the end."""
CRASH_STATUS = 70
"""The exit status after an error that nobody foresaw."""
CRASH_WAIT_S = 1.0
"""Seconds before such an end, so that starting again and again does not keep the machine busy."""


class ControllerActor:
    """One job's controller. Arguments and answers are JSON, so that no class is pickled on the way."""

    def __init__(self, config: str) -> None:
        self._config = ControllerConfig.model_validate_json(config)
        clock = SystemClock()
        self._logs = Logs.open(self._config, clock)
        self._identity = secrets.token_hex(8)
        settings = settings_of(self._config.job, patient=self._config.patient)
        now = clock.monotonic()
        kept = read_kept(self._config.kept_file)
        machine = Machine(settings, now, lambda: secrets.token_hex(8), clock.wall() - now, kept)
        agents = RayAgents(self._config.namespace)
        charge = Charge.of(self._config, self._identity)
        archivist = None if charge is None else Archivist(charge, clock)
        self._driver = Driver(self._config, self._identity, machine, agents, self._logs, clock, archivist)
        self._leaving: asyncio.Task[None] | None = None
        self._running = asyncio.get_running_loop().create_task(self._run())
        self._running.add_done_callback(self._ended)

    async def identity(self) -> str:
        """Which controller this is: 16 random hexadecimal digits, new after every restart."""
        return self._identity

    async def notify(self, node: str, events: str) -> str:
        """Take a JSON list of messages from a node's agent; answers {"controller", "known", "refused"?}."""
        return json.dumps(self._driver.receive(node, events))

    async def add_node(self, config: str) -> str:
        """Register a node (a NodeConfig), as POST /nodes does. Raises RequestError."""
        parsed = parse_node(config)
        return json.dumps({"node": parsed.node, "new": self._driver.add_node(parsed)})

    async def stop(self, reason: str) -> str:
        """End the job; once it is over, end the controller and its agents. As POST /stop does."""
        stopping = self._driver.request_stop(reason)
        if not stopping:
            self._leave()
        return json.dumps({"stopping": "job" if stopping else "controller"})

    async def status(self) -> str:
        """As GET /status."""
        return json.dumps(self._driver.status())

    async def _run(self) -> None:
        token = Path(self._config.token_file).read_text().strip()
        app = make_app(Api(self._driver, self._leave), token)
        config = self._config
        async with serving(app, config.host, config.http_port, config.http_file, self._identity):
            await self._driver.run()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        text = "".join(traceback.format_exception(error))
        try:
            self._logs.events.append("controller-error", f"{type(error).__name__}: {error}", 0, {"traceback": text})
        except OSError:  # it may be what ended the driver
            print(text, file=sys.stderr, flush=True)
        finally:
            time.sleep(CRASH_WAIT_S)
            os._exit(CRASH_STATUS)

    def _leave(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._end_all())

    async def _end_all(self) -> None:
        await asyncio.sleep(LEAVE_S)
        await self._driver.remove_agents()
        self._running.cancel()
        self._logs.close()
        handle = ray.get_runtime_context().current_actor
        await asyncio.to_thread(ray.kill, handle, no_restart=True)
