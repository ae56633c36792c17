"""Executes the machine: what arrives becomes events, what it decides becomes calls, log lines and files.

One task consumes one inbox, so that events are handled in the order in which they came, and nothing in it waits: a call
to an agent is queued on its ``AgentLink``, one to the object store on the archivist's thread. Ticks go through the same
inbox, behind what arrived before them, so that after a pause of the driver's own its nodes are heard before they are
judged.

Call order: ``Driver(...)``, then ``run()`` as a task; the others from the same loop. An exception that leaves ``run``
is a bug: the process must end, Ray starts another, and that learns everything anew from the agents.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_args

from outlast import __version__
from outlast import messages as m
from outlast.clock import Clock
from outlast.config import ControllerConfig, NodeConfig
from outlast.controller.archivist import Librarian
from outlast.controller.domains import PATIENCE_S, Domains, labelled
from outlast.controller.finale import Ending, read_final
from outlast.controller.keptfile import write_kept
from outlast.controller.lines import Lines
from outlast.controller.link import Agents
from outlast.controller.registry import NodeRegistry, write_private_json
from outlast.controller.requests import Request
from outlast.errors import RequestError, TransferError
from outlast.snapshot.identity import Attempt
from outlast.snapshot.wire import KeeperClient
from outlast.telemetry.events import EventLog, LogEvent
from outlast.telemetry.lines import exact
from outlast.telemetry.metrics_log import MetricsLog, StepMetrics

LATE_S = 0.5
"""A tick later than this is worth a line in the log: the driver was stopped or starved."""
HEARD_S = 3.0
"""A node that was heard this lately is waited for when the job ends."""
END_S = 20.0
"""Seconds that the nodes have to confirm, at the job's end, that no rank lives."""
ASK_S = 0.6
"""Seconds for a keeper to answer: its node is given up some 0.75 s after it was asked."""
REMOVE_S = 10.0
"""Seconds that ending an agent may take."""

_EVENTS = get_args(m.Event)


class Decider(Protocol):
    """What the driver needs of the machine."""

    def handle(self, event: m.Event, now: float) -> list[m.Instruction]: ...

    def objection(self, request: Request) -> str: ...

    def status(self, now: float) -> Mapping[str, Any]: ...


@dataclass
class Lag:
    """How late ticks were, in seconds: the newest, and the worst since the start."""

    last_s: float = 0.0
    worst_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.last_s = max(0.0, seconds)
        self.worst_s = max(self.worst_s, self.last_s)


@dataclass(frozen=True)
class Logs:
    """Where the story and the numbers go."""

    events: EventLog
    metrics: MetricsLog

    @classmethod
    def open(cls, config: ControllerConfig, clock: Clock) -> Logs:
        return cls(EventLog(config.events_file, config.name, clock), MetricsLog(config.metrics_file))

    def close(self) -> None:
        self.events.close()
        self.metrics.close()


class Driver:
    """One job's controller without its surroundings; ``identity`` tells it from the one before; ``archivist`` None: the
    job has no object tier."""

    def __init__(
        self,
        config: ControllerConfig,
        identity: str,
        machine: Decider,
        agents: Agents,
        logs: Logs,
        clock: Clock,
        archivist: Librarian | None = None,
    ) -> None:
        self.config = config
        self.identity = identity
        self._machine = machine
        self._agents = agents
        self._logs = logs
        self._clock = clock
        self._archivist = archivist
        self._registry = NodeRegistry(config.nodes_file)
        self._domains = Domains(config.domains_file, labelled(config.job))
        self._lines = Lines(agents, self._report)
        self._inbox: asyncio.Queue[m.Event] = asyncio.Queue()
        self._lag = Lag()
        self._attempt: Attempt | None = None
        self._total: int | None = None
        self._info: dict[str, dict[str, Any]] = {}
        self._heard: dict[str, float] = {}
        self._ending: Ending | None = None
        self._final = read_final(config.final_file)
        self._forgotten: set[str] = set()
        self._news = asyncio.Event()
        self._asking: set[asyncio.Task[None]] = set()

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the machine until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._lines.open(group)
            for config in [] if self.finished else self._registry.all():
                self._connect(config)
            self.log("controller-started", f"controller {self.identity} drives {len(self._lines)} known nodes")
            group.create_task(self._tick())
            group.create_task(self._consume())
            if self._archivist is not None and not self.finished:
                group.create_task(self._archive(self._archivist))

    async def _archive(self, archivist: Librarian) -> None:
        """Have the archivist work, in a thread that ends after the call to the store that is under way."""
        call = asyncio.get_running_loop().call_soon_threadsafe
        answer, log = self._inbox.put_nowait, self.log
        try:
            await asyncio.to_thread(archivist.run, lambda event: call(answer, event), lambda *line: call(log, *line))
        finally:
            archivist.close()

    async def _consume(self) -> None:
        while True:
            event = await self._inbox.get()
            if self.finished:
                continue
            if self._ending is None or not self._ending.takes(event):
                self._decide(event)
            if self._ending is not None and self._ending.ready(self._clock.monotonic()):
                self._finalize(self._ending)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self.config.tick_s
            await asyncio.sleep(self.config.tick_s)
            self._lag.add(loop.time() - due)
            if self._lag.last_s > LATE_S:
                self.log("controller-late", f"the controller was held up for {self._lag.last_s:.1f} s")
            self._place_overdue()
            self._inbox.put_nowait(m.Tick())

    @property
    def finished(self) -> bool:
        """Whether the job is over."""
        return self._final is not None

    # --- what arrives -----------------------------------------------------------------------------------------------

    def receive(self, node: str, events: str) -> dict[str, Any]:
        """Take a JSON list of an agent's messages; the answer tells it which controller it talks to."""
        answer: dict[str, Any] = {"controller": self.identity, "known": node in self._registry}
        if not answer["known"]:
            return answer
        self._heard[node] = self._clock.monotonic()
        try:
            for item in json.loads(events):
                self._take(node, item)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            answer["refused"] = f"{type(error).__name__}: {error}"
            self.log("bad-message", f"{node} sent what cannot be read: {answer['refused']}", {"node": node})
        return answer

    def _take(self, node: str, item: Mapping[str, Any]) -> None:
        if item.get("node") != node:
            raise ValueError(f"{item.get('type')} of {item.get('node')!r} came from {node}")
        if item["type"] == "Metrics":
            self._take_metrics(item)
        elif item["type"] == "Info":
            self._info[node] = {**self._info.get(node, {}), **item["fields"]}
        else:
            event = m.from_json(item)
            if not isinstance(event, _EVENTS):
                raise ValueError(f"{item['type']} is no event")
            self._inbox.put_nowait(event)

    def _take_metrics(self, item: Mapping[str, Any]) -> None:
        attempt = Attempt.parse(item["attempt"])
        current = self._attempt
        if current is not None and attempt != current and attempt.number >= current.number:
            return
        if item.get("total") is not None:
            self._total = int(item["total"])
        metrics = StepMetrics(int(item["step"]), attempt.number, int(item["rank"]), dict(item["metrics"]))
        try:
            self._logs.metrics.append(metrics)
        except OSError as error:  # a full disk; what comes with them, a heartbeat, is worth more
            print(f"metrics of step {metrics.step} are not written: {error}", file=sys.stderr, flush=True)

    # --- what people and the cluster ask for ------------------------------------------------------------------------

    def add_node(self, config: NodeConfig) -> bool:
        """Register a node and have its agent join; False when it was known. Raises RequestError."""
        if self.finished:
            raise RequestError(f"the job is over: {config.node} is not needed")
        new = self._registry.add(config)
        self._forgotten.discard(config.node)
        self._connect(config)
        return new

    async def remove_node(self, node: str) -> bool:
        """Forget a node and end its agent for good; False when it is unknown. Raises TransferError."""
        known = self._registry.remove(node)
        if not known:
            self._forgotten.add(node)
        self._domains.forget(node)
        self._lines.hang_up(node)
        if known:
            self._inbox.put_nowait(m.NodeGone(node, "removed"))
            async with asyncio.timeout(REMOVE_S):
                await self._agents.remove(node)
        return known

    def place(self, domains: Mapping[str, str]) -> list[str]:
        """The failure domains of machines; returns the nodes that waited for that and join now."""
        placed = self._domains.tell(domains)
        for config in placed:
            text = f"{config.node} on {config.machine} is in {config.domain}"
            self.log("placed", text, {"node": config.node, "machine": config.machine, "domain": config.domain})
            self._lines.connect(config)
        return [config.node for config in placed]

    def request_stop(self, reason: str) -> bool:
        """Ask the machine to end the job; False when it is over already."""
        if not self.finished:
            self._inbox.put_nowait(m.StopRequested(reason))
        return not self.finished

    def ask(self, request: Request) -> None:
        """Hand the machine a request. Raises RequestError with its objection, or when the job is over."""
        objection = "the job is over" if self.finished else self._machine.objection(request)
        if objection:
            raise RequestError(objection)
        self._inbox.put_nowait(request)

    async def remove_agents(self) -> None:
        """End all agents for good, as far as they answer in time."""
        for config in self._registry.all():
            self._lines.hang_up(config.node)
            try:
                async with asyncio.timeout(REMOVE_S):
                    await self._agents.remove(config.node)
            except (TransferError, TimeoutError) as error:
                self.log("agent-left", f"{config.node}: {error}", {"node": config.node})

    def status(self) -> dict[str, Any]:
        """The machine's status with what only the driver knows."""
        status = dict(self._final if self._final is not None else self._machine.status(self._clock.monotonic()))
        last = self._logs.metrics.last
        status["controller"] = self.identity
        status["ray"] = self.config.ray_session
        status["version"] = __version__
        status["unplaced"] = self._domains.unplaced
        status["seq"] = self._logs.events.seq
        status["metrics"] = exact(last.to_json()) if last else None
        status["total"] = status.get("total") or self._total
        status["lag_s"] = {"last": round(self._lag.last_s, 3), "worst": round(self._lag.worst_s, 3)}
        status["nodes"] = _with_info(self._not_forgotten(status.get("nodes", {})), self._info)
        if self._archivist is not None:
            status["store"] = self._archivist.status()
        return status

    def _not_forgotten(self, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Without those that are gone and were removed twice: who removes until it sees the effect sees it then."""
        gone = {name for name, node in nodes.items() if node.get("state") in ("left", "lost")}
        return {name: node for name, node in nodes.items() if name not in gone & self._forgotten}

    async def events_after(self, seq: int, wait_s: float, limit: int) -> list[LogEvent]:
        """Events newer than ``seq``; when there are none, wait up to ``wait_s`` seconds for one."""
        await self.news(seq, wait_s)
        return self._logs.events.after(seq, limit)

    async def news(self, seq: int, wait_s: float) -> None:
        """Return once the event log is beyond ``seq``, or after ``wait_s`` seconds; at once, too, when it has not come
        that far: then it is not the log that was asked about."""
        try:
            async with asyncio.timeout(wait_s):
                while self._logs.events.seq == seq:
                    await self._news.wait()
        except TimeoutError:
            return

    def log(self, kind: str, text: str, fields: Mapping[str, Any] | None = None) -> LogEvent:
        """Add a line to the event log and wake who waits for it."""
        event = self._logs.events.append(kind, text, self._attempt.number if self._attempt else 0, fields)
        self._news.set()
        self._news = asyncio.Event()
        return event

    # --- what the machine decides -----------------------------------------------------------------------------------

    def _decide(self, event: m.Event) -> None:
        if isinstance(event, m.Joined) and event.attempt is not None and self._attempt is None:
            self._attempt = event.attempt
        for instruction in self._machine.handle(event, self._clock.monotonic()):
            self._execute(instruction)

    def _execute(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.Emit():
                self.log(instruction.kind, instruction.text, instruction.fields)
            case m.Finish():
                self._finish(instruction)
            case m.Remember():
                write_kept(self.config.kept_file, instruction.kept)
            case m.Crash():
                os.kill(os.getpid(), signal.SIGKILL)
            case m.GiveUp():
                self._lines.drop_pending(instruction.node)
            case m.AskKeeper():
                asking = asyncio.get_running_loop().create_task(self._ask_keeper(instruction))
                self._asking.add(asking)
                asking.add_done_callback(self._asking.discard)
            case m.Claim() | m.CommitCheckpoint() | m.Quarantine():
                if self._archivist is not None:
                    self._archivist.submit(instruction)
            case m.Load() | m.Permit() | m.Proceed() | m.Abort() | m.Commit() | m.Upload():
                for node in instruction.nodes:
                    self._lines.send(node, _for_node(instruction, node))
            case _:
                if isinstance(instruction, (m.Stop, m.Start)):
                    self._attempt = instruction.attempt
                self._lines.send(instruction.node, instruction)

    async def _ask_keeper(self, instruction: m.AskKeeper) -> None:
        if await asyncio.to_thread(_answers, self.config.token_file, instruction.keeper):
            self._inbox.put_nowait(m.KeeperAnswered(instruction.node))

    def _finish(self, instruction: m.Finish) -> None:
        """Fence every node at an attempt that will never start, so that no rank is left, nor comes back."""
        now = self._clock.monotonic()
        never = Attempt(1 + (self._attempt.number if self._attempt else 0), self.identity)
        waiting = {node for node, heard in self._heard.items() if node in self._lines and now - heard < HEARD_S}
        self._ending = Ending(instruction, never, waiting, now + END_S)
        for node in self._lines:
            self._lines.send(node, m.Stop(node, never))

    def _finalize(self, ending: Ending) -> None:
        outcome, reason = ending.finish.outcome, ending.finish.reason
        self._ending = None
        self._decide(m.Finalized())
        if self._archivist is not None:  # after the commit of what was still uploaded meanwhile
            self._archivist.submit(ending.finish)
        final = {**self._machine.status(self._clock.monotonic()), "outcome": outcome, "reason": reason}
        write_private_json(self.config.final_file, final)
        self._final = final
        self.log("finished", reason, {"outcome": outcome, "unconfirmed": sorted(ending.waiting)})

    # --- lines to agents --------------------------------------------------------------------------------------------

    def _connect(self, config: NodeConfig) -> None:
        """Have a node's agent join, once its failure domain is known."""
        waited = config.machine in self._domains.unplaced
        placed = self._domains.place(config, self._clock.monotonic())
        if placed is not None:
            self._lines.connect(placed)
        elif not waited:
            text = f"{config.node} waits up to {PATIENCE_S:.0f} s for the failure domain of {config.machine}"
            self.log("unplaced", text, {"node": config.node, "machine": config.machine})

    def _place_overdue(self) -> None:
        for config in self._domains.overdue(self._clock.monotonic()):
            text = f"nobody told the failure domain of {config.machine}: {config.node} counts it as one of its own"
            self.log("domain-assumed", text, {"node": config.node, "machine": config.machine})
            self._lines.connect(config)

    def _report(self, node: str, kind: str, text: str) -> None:
        self.log(kind, f"{node}: {text}", {"node": node})
        if kind == "agent-gone":
            self._inbox.put_nowait(m.NodeGone(node, text))


def _answers(token_file: str, keeper: m.Address) -> bool:
    """Whether a keeper answers at once."""
    try:
        token = Path(token_file).read_text().strip()
    except OSError:
        return False
    return KeeperClient.answers(*keeper, token, ASK_S)


def _for_node(instruction: m.Load | m.Permit | m.Proceed | m.Abort | m.Commit | m.Upload, node: str) -> m.Instruction:
    """The part of an instruction for many nodes that concerns ``node``."""
    if isinstance(instruction, m.Permit):
        fresh = {node: instruction.fresh[node]} if node in instruction.fresh else {}
        return replace(instruction, nodes=(node,), fresh=fresh)
    return replace(instruction, nodes=(node,))


def _with_info(nodes: Mapping[str, Mapping[str, Any]], info: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the machine says of each node, and what its agent said of itself."""
    return {node: {**info.get(node, {}), **fields} for node, fields in nodes.items()}
