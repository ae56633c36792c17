"""A node's agent as a Ray actor: events go to the controller's actor, instructions come from it.

The actor is detached and Ray starts it again when it dies; a node that has left the job, or whose forkserver is gone,
has no use for one, so such an actor ends for good. Nothing here decides anything: see ``node_agent``.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError

from outlast.agent.node_agent import NodeAgent
from outlast.config import CONTROLLER_ACTOR, NodeConfig, agent_actor

NOTIFY_S = 5.0
"""How long the controller may take to acknowledge events."""
RETRY_S = 0.2
MOST_EVENTS = 20_000
"""Events kept while there is no controller; the oldest go first."""

log = logging.getLogger("outlast.agent")


class ControllerLine:
    """Carries events to whichever controller there is: in order, one call at a time, each until it is acknowledged.

    A controller that dies after taking events and before answering gets them again, or its successor does; each event
    bears that (it names its attempt). A controller other than the one before knows nothing of this node:
    ``on_new_controller`` is called.
    """

    def __init__(self, node: str, namespace: str) -> None:
        self._node, self._namespace = node, namespace
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._controller = ""
        self._handle: Any = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="outlast-controller-line", daemon=True)
        self.on_new_controller: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._thread.start()

    def send(self, event: dict[str, Any]) -> None:
        """Queue an event; never blocks."""
        self._events.put(event)

    def close(self) -> None:
        """Send what is queued, if that works at once, and stop."""
        self._closed.set()
        self._events.put(None)
        self._thread.join(NOTIFY_S)

    def _carry(self) -> None:
        batch: list[dict[str, Any]] = []
        while batch or not self._closed.is_set():
            batch = _worth_telling([*batch, *self._take(wait=not batch)])
            if not batch or self._deliver(batch):
                batch = []
            elif self._closed.wait(RETRY_S):
                return

    def _take(self, wait: bool) -> list[dict[str, Any]]:
        """All events there are, at least one if ``wait``."""
        taken = [self._events.get()] if wait else []
        while not self._events.empty():
            taken.append(self._events.get_nowait())
        return [event for event in taken if event is not None]

    def _deliver(self, batch: list[dict[str, Any]]) -> bool:
        try:
            if self._handle is None:
                self._handle = ray.get_actor(CONTROLLER_ACTOR, namespace=self._namespace)
            answer = self._handle.notify.remote(self._node, json.dumps(batch))
            reply = json.loads(ray.get(answer, timeout=NOTIFY_S))
        except (RayError, ValueError) as error:  # ValueError: no actor of that name just now
            log.warning("controller-unreachable node=%s events=%d reason=%s", self._node, len(batch), _line(error))
            self._handle = None
            return False
        if reply.get("refused"):
            log.error("controller-refused node=%s reason=%s", self._node, reply["refused"])
        self._recognise(str(reply["controller"]))
        return True

    def _recognise(self, controller: str) -> None:
        before, self._controller = self._controller, controller
        if before and before != controller:
            log.info("new-controller node=%s controller=%s", self._node, controller)
            self.on_new_controller()


def _worth_telling(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``events`` without all heartbeats but the last, and the newest of them when there are too many."""
    beats = [index for index, event in enumerate(events) if event["type"] == "Heartbeat"]
    outdated = set(beats[:-1])
    return [event for index, event in enumerate(events) if index not in outdated][-MOST_EVENTS:]


class AgentActor:
    """Made by ``outlast.controller.ray_agents`` from a NodeConfig in JSON. Both calls return at once.

    Raises TransferError when the node's forkserver is not there: then the node is lost, and Ray makes no other.
    """

    def __init__(self, config: str) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
        self._config = NodeConfig.model_validate_json(config).completed()
        self._line = ControllerLine(self._config.node, self._config.namespace)
        self._agent = NodeAgent(self._config, self._line.send, self._end)
        self._line.on_new_controller = self._agent.join
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
        self._line.start()
        self._agent.start()
        self._agent.join()

    def join(self) -> None:
        """Send ``Joined`` (again)."""
        self._agent.join()

    def perform(self, instructions: str) -> None:
        """Carry out a JSON list of instructions, in order."""
        self._agent.perform(json.loads(instructions))

    def _end(self, reason: str) -> None:
        """The agent cannot go on: end this process. If the forkserver is gone, the next one cannot even begin."""
        log.error("agent-ended node=%s reason=%s", self._config.node, reason)
        if self._agent.released:
            self._end_for_good()
        sys.stderr.flush()
        os._exit(1)

    def _end_for_good(self) -> None:
        """Tell what is still to be told, and have Ray start no other. Returns when Ray could not be asked."""
        self._line.close()
        try:
            ray.kill(ray.get_actor(agent_actor(self._config.node), namespace=self._config.namespace), no_restart=True)
        except (RayError, ValueError) as error:
            log.warning("agent-not-removed node=%s reason=%s", self._config.node, _line(error))
            return
        threading.Event().wait(NOTIFY_S)  # ended before that, by Ray

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._agent.close()
        self._line.close()
        sys.exit(0)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
