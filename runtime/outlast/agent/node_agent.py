"""A node's agent: starts, watches and kills its ranks, runs its keeper, and tells the controller. No Ray in here.

::

    controller --instructions--> perform -> inbox --+
    ranks      --messages------> RankLink -> inbox -+-> one thread (Reactor) --> forkserver, ranks, send(event)
    forkserver --exits---------> inbox -------------+         |        ^
    timers (heartbeat, deadlines) ------------------+         v        |
                                                      workers: calls to the keeper, py-spy

Every instruction is checked against the attempt in force, which is on disk before anything of it happens; what is older
is refused. On ``Stop`` all ranks are killed and their ends waited for, the keeper is fenced and its files are verified.
On ``Start`` the keeper rebuilds lost images while the ranks start; they are told what to load when ``Load`` says that
all nodes are ready.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from outlast import messages as m
from outlast.agent import attempt_record, stacks
from outlast.agent.attempt_record import AttemptRecord
from outlast.agent.clearing import Clearing
from outlast.agent.departure import Departure
from outlast.agent.forkclient import Exit, ForkClient
from outlast.agent.injuries import injure
from outlast.agent.keeper_calls import KeeperTasks
from outlast.agent.keeper_host import KEEPER, KeeperHost, KeeperWatch, Serving
from outlast.agent.oom import MemoryKills
from outlast.agent.pidfiles import remove_pid, write_pid
from outlast.agent.portholder import PortHolder
from outlast.agent.rank_messages import abort, permit, proceed, protection, restore_message, slots
from outlast.agent.rank_news import RankNews, Send
from outlast.agent.ranklink import Message
from outlast.agent.ranks import Rank, Ranks
from outlast.agent.reactor import Reactor
from outlast.agent.shipping import Shipping
from outlast.agent.uploading import Uploading
from outlast.api import TrainingJob
from outlast.clock import Clock, SystemClock
from outlast.config import NodeConfig
from outlast.errors import OutlastError, RequestError
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import Inventory

HEARTBEAT_S = 0.25
CONFIRM_S = 5.0
"""How long killed ranks' ends are waited for; after it their files count as dirty."""

_POLL_S = 0.02
_CONNECT_S = 5.0


class NodeAgent:
    """One node's agent. ``on_end(reason)`` is called when it cannot go on: its forkserver is gone, or it has a bug; or
    when it need not: its node has left the job (``released``).

    Call order: ``start``; then ``join`` and ``perform`` from any thread, neither of which waits; ``close``.
    Raises TransferError when the forkserver cannot be reached, SpecError when the job is none.
    """

    def __init__(
        self,
        config: NodeConfig,
        send: Send,
        on_end: Callable[[str], None] = lambda _: None,
        clock: Clock | None = None,
    ) -> None:
        self.config, self._send, self._on_end = config, send, on_end
        self._clock = clock or SystemClock()
        self._job = TrainingJob.model_validate(config.job)
        self._memory = Path(config.memory_dir)
        self._record = attempt_record.load(self._memory)
        self._port = PortHolder(config.host)
        self._reactor = Reactor(self._clock, lambda: on_end("the agent failed: see its log for the exception"))
        post = self._reactor.post
        self._forks = ForkClient(
            config.forkserver_socket,
            on_exit=lambda exit_: post(lambda: self._on_exit(exit_)),
            on_gone=lambda: post(self._on_gone),
            timeout=_CONNECT_S,
            on_terminating=lambda seconds: post(lambda: self._departure.begin(seconds)),
        )
        self._host = KeeperHost(config, self._job, self._forks, self._clock)
        self._keeper = KeeperTasks(config.node, self._job, self._host, self._reactor, self._emit, self._clock)
        self._uploading = Uploading(config.node, self._keeper, lambda: self._record, self._emit)
        self._departure = Departure(config.node, self._memory, self._forks, self._emit, self._clock)
        self._shipping = Shipping(config, self._job, self._forks, self._reactor, self._emit, self._clock)
        self._kills = MemoryKills()
        self._news = RankNews(config.node, self._reactor, send, self._clock, self._kills)
        self._ranks: Ranks | None = None
        self._clearing: Clearing | None = None
        self._begun: Attempt | None = None
        self._stopping: Attempt | None = None
        self._rebuilt: Attempt | None = None
        self._load: m.Load | None = None
        self._unconfirmed: frozenset[int] = frozenset()
        self._watch: KeeperWatch | None = None
        self._keeper_lost = self._joining = self._joined_once = False
        self._registration = secrets.token_hex(8)
        self._instructions: dict[type, Callable[[Any], None]] = {
            m.Stop: self._do_stop,
            m.Start: self._do_start,
            m.Load: self._do_load,
            m.Permit: self._do_permit,
            m.Proceed: lambda it: self._tell_ranks(it.generation, lambda _: proceed(it)),
            m.Abort: lambda it: self._tell_ranks(it.generation, lambda _: abort(it)),
            m.Encode: lambda encode: self._keeper.encode(encode, self._record.in_force),
            m.Commit: lambda commit: self._keeper.commit(commit, self._record.in_force),
            m.Upload: self._uploading.begin,
            m.Register: lambda _: self._do_register(),
            m.Release: lambda _: self._clear(lambda _: self._release()),
            m.DumpStacks: self._do_dump,
            m.Injure: lambda it: injure(it, config, self._job.spec.faults.allow, self._note),
        }

    # --- from outside -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find or start the keeper. ``Joined`` is sent when ``join`` asks for it, heartbeats from then on."""
        post = self._reactor.post
        write_pid(Path(self.config.socket_dir), "agent", os.getpid())
        self._forks.attend(self.config.grace_s)
        self._reactor.post(self._beat)
        self._reactor.post(lambda: self._shipping.ship_last(self._record))
        self._reactor.start()
        self._watch = KeeperWatch(
            self._host,
            lambda serving: post(lambda: self._on_keeper(serving)),
            lambda text: post(lambda: self._note("keeper-failed", text)),
        )

    @property
    def released(self) -> bool:
        """Whether this node has left the job: no agent is needed there any more."""
        return self._departure.released

    def join(self) -> None:
        """Send ``Joined``, as soon as the keeper serves."""
        self._reactor.post(self._join)

    def perform(self, instructions: Sequence[Mapping[str, Any]]) -> None:
        """Carry out instructions (``messages.to_json``) in order. Raises ValueError when one cannot be read."""
        for instruction in [m.from_json(item) for item in instructions]:
            self._reactor.post(partial(self._do, instruction))

    def close(self) -> None:
        """Kill the ranks, wait for their ends, disconnect. The keeper stays for the next agent."""
        if self._watch is not None:
            self._watch.close()
        if self._ranks is not None:
            self._reactor.post(self._ranks.kill)
        deadline = time.monotonic() + CONFIRM_S
        while (ranks := self._ranks) is not None and ranks.alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._host.close()
        self._reactor.end()
        if self._ranks is not None:
            self._ranks.close()
        self._forks.close()
        self._port.close()
        remove_pid(Path(self.config.socket_dir), "agent", os.getpid())

    # --- telling ----------------------------------------------------------------------------------------------------

    def _emit(self, event: m.Event) -> None:
        self._send(m.to_json(event))

    def _note(self, kind: str, text: str, rank: int | None = None) -> None:
        self._emit(m.Note(self.config.node, rank, kind, text))

    def _beat(self) -> None:
        """Once it has joined: before that, a node that was given up would only be told to."""
        node, ranks = self.config.node, self._ranks
        if self._joined_once:
            self._emit(ranks.heartbeat(node) if ranks and not ranks.ending else m.Heartbeat(node, None))
        self._reactor.after(HEARTBEAT_S, self._beat)

    def _inform(self) -> None:
        """What /status shows of this node."""
        ranks, serving = self._ranks, self._host.serving
        fields = {
            "agent_pid": os.getpid(),
            "keeper_pid": serving and serving.pid,
            "ranks": {str(rank.rank): rank.pid for rank in ranks.alive()} if ranks else {},
        }
        self._send({"type": "Info", "node": self.config.node, "fields": fields})

    def _join(self) -> None:
        """Begin to; who asks while that is under way gets the same answer."""
        if not self._joining:
            self._joining = True
            self._reactor.work(self._keeper.status, self._joined)

    def _joined(self, status: dict[str, Any] | OutlastError) -> None:
        """Send ``Joined``, and once more what a new controller could not know."""
        self._joining = False
        serving = self._host.serving
        if isinstance(status, OutlastError) or serving is None:
            self._note("no-keeper", f"{status}" if isinstance(status, OutlastError) else "its keeper has just ended")
            self._reactor.after(_POLL_S, self._join)
            return
        self._emit(self._describe(serving, status))
        self._joined_once = True
        self._departure.tell()
        self._inform()
        if self._ranks is not None and self._ranks.well():
            if self._rebuilt == self._ranks.attempt:
                self._emit(m.RestoreReady(self.config.node, self._rebuilt))
            self._news.repeat(self._ranks)

    def _describe(self, serving: Serving, status: Mapping[str, Any]) -> m.Joined:
        config, record, ranks = self.config, self._record, self._ranks
        seen = [Attempt.parse(status["attempt"])] if status["attempt"] else []
        seen += [record.in_force] if record.in_force else []
        running = ranks is not None and ranks.attempt == record.started and ranks.well()
        start = ranks.instruction if ranks is not None and running else None
        plan = start.restore if start is not None else None
        return m.Joined(
            node=config.node,
            domain=config.domain,
            host=config.host,
            attempt=record.started,
            seat=record.seat,
            running=running,
            keeper=serving.address,
            free_port=self._port.port,
            procs=self._job.spec.workers.procs_per_worker,
            best_seen_attempt=max((attempt.number for attempt in seen), default=0),
            held=self._keeper.held(status),
            registration=self._registration,
            restart_count=record.restart_count,
            memory=int(status["available"]),
            dirty=self._dirty(self._unconfirmed),
            world_nodes=start.world_nodes if start is not None else 0,
            restores=plan.generation if plan is not None else None,
            stored=plan is not None and "object" in plan.origins(),
        )

    def _dirty(self, local_ranks: frozenset[int]) -> tuple[tuple[int, int], ...]:
        """Files that those who may still live could write to: (local rank, slot)."""
        return tuple((local_rank, slot) for local_rank in sorted(local_ranks) for slot in range(slots(self._job)))

    # --- instructions -----------------------------------------------------------------------------------------------

    def _do(self, instruction: m.Message) -> None:
        act = self._instructions.get(type(instruction))
        if act is None:
            self._note("bad-instruction", f"{type(instruction).__name__} is nothing that an agent does")
        else:
            act(instruction)

    def _admit(self, attempt: Attempt) -> bool:
        """Whether ``attempt`` may be obeyed; if it is new, it is in force and on disk from now on."""
        if not self._record.admits(attempt):
            self._note("stale-instruction", f"refused attempt {attempt}: {self._record.in_force} is in force")
            return False
        if attempt != self._record.in_force:
            self._remember(replace(self._record, in_force=attempt))
        return True

    def _remember(self, record: AttemptRecord) -> None:
        attempt_record.store(self._memory, record)
        self._record = record

    def _do_stop(self, stop: m.Stop) -> None:
        if not self._admit(stop.attempt):
            return
        if self._begun == stop.attempt:
            self._note("stale-instruction", f"refused to stop for attempt {stop.attempt}, which has begun here")
            return
        if self._stopping == stop.attempt:  # said again while its images are read
            return
        self._clear(lambda dirty: self._keeper.verify(stop.attempt, partial(self._stopped, stop, dirty)))
        self._stopping = stop.attempt

    def _stopped(self, stop: m.Stop, dirty: frozenset[int], inventory: Inventory) -> None:
        if self._stopping == stop.attempt:
            self._stopping = None
        if stop.attempt != self._record.in_force or self._begun == stop.attempt:
            return
        self._emit(m.Stopped(self.config.node, stop.attempt, inventory, self._dirty(dirty), self._port.renew()))

    def _do_start(self, start: m.Start) -> None:
        if not self._admit(start.attempt) or self._begun == start.attempt:
            return
        self._begun = start.attempt
        self._remember(AttemptRecord(start.attempt, start.attempt, start.seat, start.restart_count))
        self._clear(lambda _: self._keeper.fence(start.attempt, partial(self._launch, start)))

    def _launch(self, start: m.Start) -> None:
        if start.attempt != self._record.in_force:
            return
        self._keeper.rebuild(start, self._unconfirmed, partial(self._on_rebuilt, start.attempt))
        post = self._reactor.post
        try:
            self._ranks = Ranks.open(
                self.config,
                start,
                self._forks,
                lambda ranks, rank, said: post(partial(self._news.said, ranks, rank, said)),
                lambda ranks, rank: post(partial(self._news.disconnected, ranks, rank)),
            )
            self._kills.begin()
            self._ranks.spawn(self.config, self._job)
            self._load_if_ready()
        except (OSError, RequestError) as error:
            self._news.failed_to_start(start, error)
        self._inform()

    def _on_rebuilt(self, attempt: Attempt) -> None:
        if attempt == self._record.in_force:
            self._rebuilt = attempt
            self._load_if_ready()

    def _do_load(self, load: m.Load) -> None:
        """A controller that is new may say so while this node still rebuilds: it is done then."""
        self._load = load
        self._load_if_ready()

    def _load_if_ready(self) -> None:
        load, ranks = self._load, self._ranks
        if load is None or ranks is None or not (load.attempt == ranks.attempt == self._rebuilt):
            return
        self._load = None
        if not ranks.ending:
            start = ranks.instruction
            limits = protection(self._job, start.seat, start.world_nodes, self.config.share)
            ranks.load(restore_message(self.config.node, self._memory, start, limits))

    def _do_permit(self, instruction: m.Permit) -> None:
        self._tell_ranks(instruction.generation, lambda it: permit(instruction, self.config.node, it.local_rank))

    def _tell_ranks(self, generation: Generation, message: Callable[[Rank], Message]) -> None:
        """A snapshot concerns the ranks of the attempt that takes it."""
        ranks = self._ranks
        if ranks is not None and generation.taken_by(ranks.attempt):
            for rank in ranks.members.values():
                ranks.link.send(rank.rank, message(rank))

    def _do_register(self) -> None:
        """This node was given up: it has no ranks any more when it comes again, as a new one."""

        def come_again(_: frozenset[int]) -> None:
            self._registration = secrets.token_hex(8)
            self._join()

        self._clear(come_again)

    def _release(self) -> None:
        """No rank lives here any more, nor is one to: end all that is left of the node."""
        if self._watch is not None:
            self._watch.close()
        self._shipping.when_done(self._departure.release)

    def _do_dump(self, instruction: m.DumpStacks) -> None:
        subjects = self._ranks.subjects() if self._ranks is not None else []
        self._reactor.work(
            lambda: stacks.dump(subjects, instruction.reason),
            lambda text: self._emit(m.Stacks(self.config.node, str(text))),
        )

    # --- clearing ---------------------------------------------------------------------------------------------------

    def _clear(self, then: Callable[[frozenset[int]], None]) -> None:
        """Kill every rank of this node; ``then`` gets the local ranks whose ends could not be confirmed.

        Another clearing that is under way is superseded: its ``then`` is not called.
        """
        procs, deadline = self._job.spec.workers.procs_per_worker, self._clock.monotonic() + CONFIRM_S
        self._stopping = None
        self._clearing = Clearing(self._ranks, self._forks, procs, deadline, then)
        self._clearing.begin()
        self._watch_clearing(self._clearing)

    def _watch_clearing(self, clearing: Clearing) -> None:
        if self._clearing is clearing and not self._cleared():
            self._reactor.after(_POLL_S, lambda: self._watch_clearing(clearing))

    def _cleared(self) -> bool:
        """Go on after the clearing under way, if it is over."""
        clearing = self._clearing
        if clearing is None:
            return True
        left = clearing.unconfirmed()
        if left and self._clock.monotonic() < clearing.deadline:
            return False
        self._clearing = None
        self._unconfirmed = left
        if self._ranks is not None:
            self._news.last_words(self._ranks)
            self._ranks.close()
            self._shipping.ship(self._ranks.attempt, self._ranks.instruction.seat)
            self._ranks = None
        clearing.then(left)
        return True

    # --- what happens -----------------------------------------------------------------------------------------------

    def _on_keeper(self, serving: Serving | None) -> None:
        if serving is None:
            self._emit(m.KeeperLost(self.config.node))
        elif self._keeper_lost:  # the first one's address is told by Joined
            self._emit(m.KeeperBack(self.config.node, *serving.address))
        self._keeper_lost = serving is None
        self._inform()

    def _on_gone(self) -> None:
        if self.released:
            self._departure.clear()
            self._on_end("the node has left the job")
        else:
            self._on_end("the forkserver is gone")

    def _on_exit(self, exit_: Exit) -> None:
        if exit_.id == KEEPER and self._watch is not None:
            self._watch.ended(exit_)
        self._shipping.ended(exit_)
        ranks = self._ranks
        rank = ranks.take_exit(exit_) if ranks is not None else None
        if ranks is not None and rank is not None:
            self._cleared()
            self._news.exited(ranks, rank)
