"""The controller's decisions: events in, instructions out, no I/O and no clock.

``Machine.handle`` looks up what an event means in ``_HANDLERS``; what becomes due with time is in ``deadlines``. State
and the moves between phases are in ``job``, what happens between two attempts in ``preparing``, at the end in
``ending``; the snapshot cycle is in ``snapshots``, the object tier in ``durable``, changes of size in ``resizing``.
What comes from a node that was given up, or speaks of another attempt than the living one, changes nothing.

After dask/distributed's worker state machine: decisions apart from their execution, so that they can be tested as
tables and under any order of events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from outlast.controller import durable, ending, keeping, preparing, requests, resizing
from outlast.controller.adoption import Gathering, gathered
from outlast.controller.deadlines import due
from outlast.controller.faults import Symptom, rank_symptom
from outlast.controller.job import Job
from outlast.controller.membership import Node
from outlast.controller.phases import LIVE, PREPARING, Phase
from outlast.controller.requests import Request
from outlast.controller.settings import MachineConfig
from outlast.controller.status import status_of
from outlast.messages import events as e
from outlast.messages.instructions import AskKeeper, Instruction, Register
from outlast.messages.kept import Kept
from outlast.snapshot.identity import Attempt

REGISTER_EVERY_S = 1.0
STORE_TROUBLE, STORE_WELL = "store-unavailable", "store-answers"
"""The kind of a note of an upload that waits for the store."""


class Machine:
    """One job's controller. ``new_incarnation`` gives 16 random hexadecimal digits for each attempt; ``epoch`` added to
    ``now`` gives wall seconds; ``kept`` is what the controller before left.
    """

    def __init__(
        self,
        config: MachineConfig,
        now: float,
        new_incarnation: Callable[[], str],
        epoch: float = 0.0,
        kept: Kept | None = None,
    ) -> None:
        self.job = Job(config, now, new_incarnation, epoch)
        self._gathering = Gathering()
        if kept is not None:
            keeping.take_over(self.job, kept)
        keeping.keep(self.job)

    @property
    def config(self) -> MachineConfig:
        """The job's settings, with the size that is wanted now."""
        return self.job.config

    def handle(self, event: e.Event, now: float) -> list[Instruction]:
        """Take one event in at ``now`` (monotonic seconds, never going back); returns what is to be done, in order."""
        if self.job.over:
            return []
        self.job.awake.observe(now)
        self._HANDLERS[type(event)](self, event, now)
        return self.job.drain()

    def objection(self, request: Request) -> str:
        """Why a request would be refused now; empty when it would not. What is asked for comes as an event."""
        return requests.objection(self.job, request)

    def status(self, now: float) -> dict[str, Any]:
        """Everything that /status tells, as plain JSON."""
        return status_of(self.job, now)

    @property
    def over(self) -> bool:
        """Whether the job has ended and the driver has carried that out."""
        return self.job.over

    # --- who speaks -------------------------------------------------------------------------------------------------

    def _alive(self, name: str, now: float) -> Node | None:
        """The node, unless it is unknown or was given up: then it is told to register anew."""
        node = self.job.members.nodes.get(name)
        if node is None or node.gone is None:
            return node
        if node.told_at is None or now - node.told_at >= REGISTER_EVERY_S:
            node.told_at = now
            self.job.out.append(Register(name))
        return None

    def _of_attempt(self, name: str, attempt: Attempt | None, now: float) -> Node | None:
        """The node, if it is alive, has a seat and speaks of the living attempt."""
        node = self._alive(name, now)
        if node is None or node.seat is None or attempt != self.job.attempt or self.job.phase not in LIVE:
            return None
        return node

    def _with_seat(self, name: str, now: float) -> Node | None:
        node = self._alive(name, now)
        return node if node is not None and node.seat is not None else None

    # --- nodes ------------------------------------------------------------------------------------------------------

    def _joined(self, event: e.Joined, now: float) -> None:
        job, known = self.job, self.job.members.nodes.get(event.node)
        if known is not None and known.registration == event.registration:
            self._alive(event.node, now)  # it said so already, or does not know yet that it was given up
            return
        seat = known.seat if known is not None and known.gone is None else None
        answered = known is not None and known.stopped is not None and known.stopped == job.attempt
        node = job.members.join(event, job.awake.now, now)
        job.emit("joined", f"{node.name} joined ({node.domain})", node=node.name, domain=node.domain)
        if job.phase is Phase.GATHERING:
            self._gathering.add(event, now)
            gathered(job, self._gathering, now)
            return
        undisturbed = (event.running and event.attempt == job.attempt) or (job.phase in PREPARING and answered)
        if seat is not None and not undisturbed and not job.ranks_done(seat):
            text = f"the agent of {node.name} (seat {seat}) started anew, its ranks are gone"
            job.fault(Symptom("agent-lost", text, now, now, node.name, step=job.progress.top_step), now)
        if node.seat is None or job.phase not in LIVE:
            job.ask_to_stop(node, now)
        elif job.checkpoints is not None:
            job.out += job.checkpoints.keeper_back(node.name)

    def _heartbeat(self, event: e.Heartbeat, now: float) -> None:
        job = self.job
        node = self._alive(event.node, now)
        if node is None:
            return
        job.members.watch.beat(event.node, job.awake.now)
        node.attempt = event.attempt
        if not event.steps or node.seat is None or event.attempt != job.attempt or job.phase not in LIVE:
            return
        if job.progress.heartbeat(event, now) and job.phase is Phase.RUNNING:
            job.note_step(job.progress.top_step, now)
            if event.node == job.members.seats.get(0):
                self._measure(event)

    def _measure(self, event: e.Heartbeat) -> None:
        """What a step takes, with and without something else going on."""
        job = self.job
        for seconds in event.step_seconds.values():
            job.snapshot_rhythm.step(seconds, job.cycle is not None and job.cycle.busy)
            job.checkpoint_rhythm.step(seconds, job.checkpoints is not None and job.checkpoints.work is not None)
            break

    def _node_gone(self, event: e.NodeGone, now: float) -> None:
        node = self.job.members.alive.get(event.node)
        if node is not None:
            silent = self.job.members.watch.silence(event.node, self.job.awake.now) or 0.0
            self.job.lose(node, event.reason, silent, now)

    def _stopped(self, event: e.Stopped, now: float) -> None:
        job, node = self.job, self._alive(event.node, now)
        if node is None or event.attempt != job.attempt:
            return
        job.members.stopped(node, event)
        if job.preparation is not None:
            job.preparation.waiting.discard(node.name)
            preparing.advance(job, now)

    def _keeper_answered(self, event: e.KeeperAnswered, _now: float) -> None:
        self.job.members.watch.excuse(event.node)

    def _keeper_lost(self, event: e.KeeperLost, now: float) -> None:
        node = self._alive(event.node, now)
        if node is not None:
            node.keeper_up = False
            self.job.emit("keeper-lost", f"the keeper of {node.name} died", node=node.name)
            if self.job.cycle is not None:
                self.job.out += self.job.cycle.keeper_lost(node.name, now)

    def _keeper_back(self, event: e.KeeperBack, now: float) -> None:
        node = self._alive(event.node, now)
        if node is not None:
            node.keeper_up, node.keeper = True, (event.host, event.port)
            self.job.emit("keeper-back", f"the keeper of {node.name} serves again", node=node.name)
            if self.job.cycle is not None:
                self.job.out += self.job.cycle.keeper_back(node.name, now)
            if self.job.checkpoints is not None:
                self.job.out += self.job.checkpoints.keeper_back(node.name)

    def _leaving(self, event: e.Leaving, now: float) -> None:
        node = self._alive(event.node, now)
        if node is not None:
            resizing.leave(self.job, node, event, now)

    # --- ranks ------------------------------------------------------------------------------------------------------

    def _restore_ready(self, event: e.RestoreReady, now: float) -> None:
        job = self.job
        if job.phase is Phase.GATHERING:
            self._gathering.hear(event)
        if self._of_attempt(event.node, event.attempt, now) is None or event.node not in job.awaiting:
            return
        job.awaiting.discard(event.node)
        if job.awaiting:
            return
        if job.phase is Phase.STARTING:
            job.loaded(now)
        else:  # some rank has ended already, or the attempt is adopted
            job.load_again_at = min(job.load_again_at, now + job.config.patience.settle_s)

    def _rank_ready(self, event: e.RankReady, now: float) -> None:
        job = self.job
        if job.phase is Phase.GATHERING:
            self._gathering.hear(event)
        elif self._of_attempt(event.node, event.attempt, now) is not None:
            durable.hear_about(job, event)
            job.rank_ready(event.rank, now)

    def _restore_failed(self, event: e.RestoreFailed, now: float) -> None:
        if self._of_attempt(event.node, event.attempt, now) is not None:
            durable.restore_failed(self.job, event, now)

    def _rank_exited(self, event: e.RankExited, now: float) -> None:
        job, node = self.job, self._alive(event.node, now)
        if job.phase is Phase.GATHERING:
            self._gathering.hear(event)
        if node is None or node.seat is None or event.rank in job.progress.done:
            return
        # While an attempt is prepared, what ended the one before may still be told.
        stopping = job.phase in PREPARING
        if event.attempt != (job.before if stopping else job.attempt) or (stopping and node.stopped == job.attempt):
            return
        if event.code == 0 and event.signal is None and event.error is None and not stopping:
            self._rank_done(e.RankDone(event.node, event.attempt, event.rank), now)
            return
        step = job.progress.steps.get(event.rank, job.progress.restored_step) if event.step is None else event.step
        job.note_step(step, now)
        job.fault(rank_symptom(event, step, now, stopping), now)

    def _rank_done(self, event: e.RankDone, now: float) -> None:
        job = self.job
        if job.phase is Phase.GATHERING:
            self._gathering.hear(event)
        if self._of_attempt(event.node, event.attempt, now) is None:
            return
        if job.phase is Phase.STARTING:
            job.run(now)
        ending.rank_done(job, event.rank, event.digest, event.steps, now)

    def _busy(self, event: e.Busy, now: float) -> None:
        if self._of_attempt(event.node, event.attempt, now) is not None:
            self.job.progress.set_busy(event.rank, event.label, event.limit_s, now)

    def _idle(self, event: e.Idle, now: float) -> None:
        if self._of_attempt(event.node, event.attempt, now) is not None:
            self.job.progress.set_idle(event.rank, now)

    def _capacity(self, event: e.Capacity, now: float) -> None:
        if self._alive(event.node, now) is not None:
            where = event.node if event.rank is None else f"rank {event.rank} on {event.node}"
            missing = f" ({event.missing_bytes} bytes are missing)" if event.missing_bytes else ""
            self.job.finish("failed", f"{where}: {event.text}{missing}", now)

    def _note(self, event: e.Note, now: float) -> None:
        if self._alive(event.node, now) is not None:
            self.job.emit(event.kind, event.text, node=event.node, rank=event.rank)
            if event.kind == STORE_TROUBLE:
                self.job.store_news.hear(now, event.text)
            elif event.kind == STORE_WELL:
                self.job.store_news.hear(now, "")

    def _stacks(self, event: e.Stacks, now: float) -> None:
        job = self.job
        job.emit("stacks", f"stacks of {event.node}'s ranks", node=event.node, stacks=event.text)
        job.stacks_awaited.discard(event.node)
        if job.phase is Phase.DIAGNOSING and not job.stacks_awaited and job.symptoms[0].kind == "hang":
            job.begin_attempt(now)

    # --- snapshots --------------------------------------------------------------------------------------------------

    def _planned(self, event: e.Planned, now: float) -> None:
        if self.job.cycle is not None and self._with_seat(event.node, now) is not None:
            self.job.out += self.job.cycle.planned(event)

    def _copied(self, event: e.Copied, now: float) -> None:
        job = self.job
        if job.cycle is not None and self._with_seat(event.node, now) is not None:
            if event.generation.taken_by(job.cycle.attempt):
                job.note_step(event.generation.step, now)
                if event.stall_s > 0:
                    job.story.stalled(event.generation, event.stall_s, now)
            job.out += job.cycle.copied(event, now)

    def _missed(self, event: e.Missed, now: float) -> None:
        if self.job.cycle is not None and self._with_seat(event.node, now) is not None:
            self.job.out += self.job.cycle.missed(event, now)

    def _encoded(self, event: e.Encoded, now: float) -> None:
        if self.job.cycle is not None and self._with_seat(event.node, now) is not None:
            self.job.out += self.job.cycle.encoded(event, now)

    def _encode_failed(self, event: e.EncodeFailed, now: float) -> None:
        if self.job.cycle is not None and self._with_seat(event.node, now) is not None:
            self.job.emit("encode-failed", f"{event.node} could not encode: {event.reason}", node=event.node)
            self.job.out += self.job.cycle.encode_failed(event.node, event.generation, event.reason, now)

    def _commit_acked(self, event: e.CommitAcked, now: float) -> None:
        job = self.job
        if job.cycle is None or self._with_seat(event.node, now) is None:
            return
        told = job.cycle.commit_acked(event, now)
        job.out += told
        if told:
            ending.committed(job, now)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _asked(self, event: Request, now: float) -> None:
        requests.ASK[type(event)](self.job, event, now)

    def _claimed(self, event: e.Claimed, now: float) -> None:
        durable.claimed(self.job, event, now)

    def _claim_failed(self, event: e.ClaimFailed, now: float) -> None:
        durable.claim_failed(self.job, event, now)

    def _uploaded(self, event: e.Uploaded, now: float) -> None:
        if self.job.checkpoints is not None and self._with_seat(event.node, now) is not None:
            self.job.out += self.job.checkpoints.uploaded(event)
            self.job.store_news.hear(now, "")

    def _upload_failed(self, event: e.UploadFailed, now: float) -> None:
        if self._with_seat(event.node, now) is not None:
            durable.upload_failed(self.job, event, now)

    def _checkpoint_committed(self, event: e.CheckpointCommitted, now: float) -> None:
        durable.committed(self.job, event, now)

    def _checkpoints_expired(self, event: e.CheckpointsExpired, now: float) -> None:
        del now
        durable.expired(self.job, event)

    def _checkpoint_failed(self, event: e.CheckpointFailed, now: float) -> None:
        durable.commit_failed(self.job, event, now)

    # --- the controller's own ---------------------------------------------------------------------------------------

    def _tick(self, _: e.Tick, now: float) -> None:
        job = self.job
        if job.outcome is None:
            self._judge_silent(now)
        if job.phase is Phase.GATHERING:
            gathered(job, self._gathering, now)
        due(job, now)

    def _judge_silent(self, now: float) -> None:
        members = self.job.members
        doubtful, overdue = members.watch.judge(self.job.awake.now)
        self.job.out += [AskKeeper(name, members.nodes[name].keeper) for name in doubtful]
        for name, silent_s in overdue:
            self.job.lose(members.nodes[name], f"no heartbeat for {silent_s:.1f} s", silent_s, now)

    def _stop_requested(self, event: e.StopRequested, now: float) -> None:
        self.job.finish("stopped", event.reason, now)

    def _finalized(self, _: e.Finalized, now: float) -> None:
        self.job.finalize(now)

    _HANDLERS: ClassVar[dict[type, Callable[[Machine, Any, float], None]]] = {
        e.Joined: _joined,
        e.Heartbeat: _heartbeat,
        e.NodeGone: _node_gone,
        e.KeeperAnswered: _keeper_answered,
        e.KeeperLost: _keeper_lost,
        e.KeeperBack: _keeper_back,
        e.Stopped: _stopped,
        e.RestoreReady: _restore_ready,
        e.RankReady: _rank_ready,
        e.RankExited: _rank_exited,
        e.RankDone: _rank_done,
        e.Busy: _busy,
        e.Idle: _idle,
        e.Capacity: _capacity,
        e.Note: _note,
        e.Stacks: _stacks,
        e.Planned: _planned,
        e.Copied: _copied,
        e.Missed: _missed,
        e.Encoded: _encoded,
        e.EncodeFailed: _encode_failed,
        e.CommitAcked: _commit_acked,
        e.Leaving: _leaving,
        e.RestoreFailed: _restore_failed,
        e.Uploaded: _uploaded,
        e.UploadFailed: _upload_failed,
        e.Claimed: _claimed,
        e.ClaimFailed: _claim_failed,
        e.CheckpointCommitted: _checkpoint_committed,
        e.CheckpointsExpired: _checkpoints_expired,
        e.CheckpointFailed: _checkpoint_failed,
        e.Tick: _tick,
        e.StopRequested: _stop_requested,
        e.ResizeRequested: _asked,
        e.SuspendRequested: _asked,
        e.HoldRequested: _asked,
        e.FaultRequested: _asked,
        e.Finalized: _finalized,
    }
