"""One job's state, and its moves from phase to phase. The events that cause them are ``machine``'s.

::

    gather -> begin_attempt -> preparing.advance -> launch -> loaded -> ready -> ... fault -> begin_attempt
           -> adopt, when ranks outlived a controller                        -> resize -> begin_attempt, planned
                                                                             -> ending -> finish

Every move appends what is to be done to ``out``, and enters a phase that ``phases.TRANSITIONS`` allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from outlast.controller import preparing
from outlast.controller.checkpoints import CheckpointCycle, Transfer
from outlast.controller.claims import Claims
from outlast.controller.detector import AwakeClock
from outlast.controller.faults import Symptom
from outlast.controller.intervals import memory_chooser, object_chooser
from outlast.controller.membership import Membership, Node
from outlast.controller.phases import LIVE, OVER, PREPARING, TRANSITIONS, Phase
from outlast.controller.policy import RestartBudget
from outlast.controller.progress import Progress
from outlast.controller.recovery import Planned, Preparation
from outlast.controller.resizing import Resizing
from outlast.controller.rhythm import Rhythm
from outlast.controller.settings import MachineConfig
from outlast.controller.snapshot_work import Committed, SnapshotTotals
from outlast.controller.snapshots import SnapshotCycle, Surroundings
from outlast.controller.storenews import StoreNews
from outlast.controller.story import Story
from outlast.controller.suspending import Suspension
from outlast.messages.instructions import Emit, Finish, GiveUp, Instruction, Load, Outcome, Start, Stop
from outlast.messages.kept import Kept
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.stored import StoredCheckpoint

_END: dict[Outcome, Phase] = {
    "succeeded": Phase.SUCCEEDED,
    "failed": Phase.FAILED,
    "stopped": Phase.STOPPED,
    "suspended": Phase.SUSPENDED,
}

VERIFIED_BYTES_S = 0.5e9
"""Bytes that a busy node verifies in a second, at least."""


class Job:
    """The state. ``attempt``: the living one, or the one in preparation (then ``before`` is the one that lived last);
    ``symptoms``: faults since it was last well; ``decide_at``: the end of a diagnosis or of finishing; ``awaiting``:
    nodes that have not rebuilt what they lack; ``starts``: what each was told, and is again ``start_again_at``;
    ``resumes``: the attempt has a state to load, ``origin``: from that checkpoint; ``final``: the committed snapshot of
    the last step; ``ended_at``: when all ranks were done; ``wanting_told_at``: when it was said last that nodes are
    missing; ``half_restored``: an adopted attempt's nodes may not have had all of its state; ``inherited``: the newest
    whole snapshot that it came with; ``hold_until``: until when ranks shall wait for another controller; ``lengths``:
    of the newest images that are known, by rank; ``epoch``: what makes wall seconds of the machine's; ``first_began``:
    when the job's first controller did; ``started``: when its first rank did (wall seconds); ``kept``: what the next
    controller would know.
    """

    def __init__(self, config: MachineConfig, now: float, new_incarnation: Callable[[], str], epoch: float) -> None:
        self.config = config
        self.epoch = epoch
        self.phase = Phase.GATHERING
        self.entered = self.began = self.first_began = now
        self.started: float | None = None
        self.kept = Kept()
        self.awake = AwakeClock(config.detector, now)
        self.members = Membership(config)
        self.attempt: Attempt | None = None
        self.before: Attempt | None = None
        self.restart_count = 0
        self.preparation: Preparation | None = None
        self.progress = Progress(now)
        self.cycle: SnapshotCycle | None = None
        self.totals = SnapshotTotals()
        self.snapshot_rhythm = Rhythm(memory_chooser(config.replicas))
        self.checkpoint_rhythm = Rhythm(object_chooser(config.replicas))
        self.claims = Claims(config.checkpoint is not None)
        self.store_news = StoreNews()
        self.checkpoints: CheckpointCycle | None = None
        if config.checkpoint is not None:
            self.checkpoints = CheckpointCycle(config.checkpoint, config.procs, self.checkpoint_rhythm.interval)
        self.around = Surroundings(config, self.members, self.totals, self.snapshot_rhythm, self._pinned)
        self.resizing = Resizing(config.grow_after_s)
        self.story = Story(now, epoch)
        self.budget = RestartBudget(config.max_restarts, config.window_s)
        self.symptoms: list[Symptom] = []
        self.awaiting: set[str] = set()
        self.starts: dict[str, Start] = {}
        self.start_again_at = math.inf
        self.stacks_awaited: set[str] = set()
        self.resumes = False
        self.origin: StoredCheckpoint | None = None
        self.about: dict[str, Any] = {}
        self.final: Generation | None = None
        self.ended_at: float | None = None
        self.decide_at = math.inf
        self.best_at_start = 0
        self.look_for_stragglers_at = now
        self.load_again_at = math.inf
        self.half_restored = False
        self.inherited: Committed | None = None
        self.wanting_told_at = -math.inf
        self.hold_until: float | None = None
        self.suspension: Suspension | None = None
        self.suspended: dict[str, Any] | None = None
        self.lengths: Mapping[int, int] = {}
        self.outcome: Outcome | None = None
        self.reason = ""
        self.weights_digest: str | None = None
        self.out: list[Instruction] = []
        self._new_incarnation = new_incarnation

    @property
    def over(self) -> bool:
        """Whether the outcome is final."""
        return self.phase in OVER

    @property
    def size(self) -> int:
        """Seats of the living attempt, or, between two, of the one before; 0 before the first."""
        return len(self.members.seats)

    @property
    def world(self) -> int:
        """Ranks of that attempt."""
        return self.size * self.config.procs

    @property
    def floor(self) -> int:
        """The fewest nodes to go on with: what the job says, or those that it has as long as these are fewer."""
        return min(self.config.least, self.size) if self.size else self.config.least

    def _pinned(self) -> int | None:
        return self.checkpoints.pinned if self.checkpoints is not None else None

    def enter(self, phase: Phase, now: float) -> None:
        """Go to a phase. Raises RuntimeError when there is no such way."""
        if phase is not self.phase:
            if phase not in TRANSITIONS[self.phase]:
                raise RuntimeError(f"there is no way from {self.phase.value} to {phase.value}")
            self.phase, self.entered = phase, now

    def emit(self, kind: str, text: str, **fields: Any) -> None:
        """Add a line to the event log."""
        self.out.append(Emit(kind, text, fields))

    # --- between attempts -------------------------------------------------------------------------------------------

    def begin_attempt(self, now: float, planned: Planned | None = None) -> None:
        """Tell every node to stop, under the number of the attempt to come; ``planned``: without a fault."""
        members = self.members
        number = 1 + max(members.best_seen_attempt, self.attempt.number if self.attempt else 0)
        self._leave_attempt(now, planned)
        first = self.attempt is None
        self.attempt = Attempt(number, self._new_incarnation())
        deadline, again_at = now + self._stop_s(), now + preparing.STOP_AGAIN_S
        waiting, well = set(members.alive), not self.symptoms
        self.preparation = Preparation(self.attempt, now, waiting, deadline, again_at, concluded=well)
        self.preparation.size = self._sufficient(planned)
        self.enter(Phase.STOPPING, now)
        self.story.stopping(now)
        kind, text = ("start", "starts") if first else ("restart", "restarts")
        step = self.progress.top_step
        self.emit(kind, f"attempt {number} {text} all ranks", attempt=number, step=step, nodes=len(members.alive))
        self.out += [Stop(name, self.attempt) for name in members.alive]
        self.out += self.claims.ask(self.attempt, now, self.config.patience.claim_s)

    def _stop_s(self) -> float:
        """How long a node may take to end its ranks, and to verify the files that it holds."""
        lengths, members = self.lengths.values(), self.members.alive.values()
        made = 2 * self.config.slots * self.config.procs * max(lengths, default=0)
        held = max((sum(image.length for image in node.held) for node in members), default=0)
        return self.config.patience.stop_s + max(made, held) / VERIFIED_BYTES_S

    def _leave_attempt(self, now: float, planned: Planned | None) -> None:
        """What belonged to the living attempt ends: permits with its ranks, encodings and uploads with its fence."""
        self.cycle, self.final, self.ended_at, self.inherited = None, None, None, None
        self.load_again_at, self.half_restored = math.inf, False
        if self.checkpoints is not None:
            self.checkpoints.drop()
        if self.phase in LIVE:
            self.before = self.attempt
        if planned is not None and not self.symptoms:
            self.out.append(self.story.planned(planned, self.attempt.number if self.attempt else 0, now))

    def _sufficient(self, planned: Planned | None) -> int | None:
        """Nodes to begin with without waiting for more: those that there were, less such as leave."""
        if planned is not None and planned.kind == "node-left":
            return max(self.floor, min(self.members.usable, self.config.replicas))
        return min(max(self.floor, self.size), self.config.replicas) if self.size else None

    def ask_to_stop(self, node: Node, now: float) -> None:
        """A node has joined while the next attempt is prepared, or beside a living one."""
        if self.attempt is None:
            return
        if self.phase in PREPARING and self.preparation is not None:
            if self.members.best_seen_attempt >= self.attempt.number:
                self.prepare_anew(self.preparation, now)
            else:
                self.out.append(self.preparation.ask(node, now, self._stop_s()))
                self.enter(Phase.STOPPING, now)
        else:
            self.out.append(Stop(node.name, self.attempt))

    def prepare_anew(self, before: Preparation, now: float) -> None:
        """A node, or the store, has seen a higher number than that of the attempt in preparation, or the same."""
        self.begin_attempt(now)
        if self.preparation is not None:
            preparation = self.preparation
            preparation.short_since, preparation.size = before.short_since, before.size
            preparation.lacking_since, preparation.told = before.lacking_since, before.told
            if before.concluded:
                preparation.concluded, preparation.not_before = True, before.not_before

    # --- starting ---------------------------------------------------------------------------------------------------

    def loaded(self, now: float) -> None:
        """Every node has rebuilt what it lacked."""
        if self.attempt is not None:
            self.story.loading(now)
            self.out.append(Load(self.members.seated_names(), self.attempt))

    def rank_ready(self, rank: int, now: float) -> None:
        """A rank has its state; with the last one the attempt runs, and snapshots begin."""
        if rank in self.progress.ready:
            return
        self.progress.is_ready(rank, now)
        if not self.all_ready or self.phase is Phase.DIAGNOSING:
            return
        if self.phase is Phase.STARTING:
            self.run(now)
        if self.cycle is not None:
            self.out += self.cycle.begin(now)

    @property
    def all_ready(self) -> bool:
        """Whether every rank has said that it has its state."""
        return len(self.progress.ready) == self.world > 0

    def run(self, now: float) -> None:
        """The attempt runs."""
        self.enter(Phase.RUNNING, now)
        self.starts = {}
        self.story.running(self.progress.restored_step, now)
        self.progress.moved_at = now
        self.snapshot_rhythm.resumed(now)
        self.checkpoint_rhythm.resumed(now)
        number, step = self.attempt.number if self.attempt else 0, self.progress.restored_step
        self.emit("running", f"attempt {number} runs from step {step}", attempt=number, step=step)

    # --- faults -----------------------------------------------------------------------------------------------------

    def lose(self, node: Node, reason: str, silent_s: float, now: float) -> None:
        """Give a node up."""
        seat, needed = node.seat, self.needs(node) and not self._handed_over(node)
        self.members.lose(node, reason, now)
        self.out.append(GiveUp(node.name, reason))
        if node.leaving is not None and not needed:
            self.emit("node-left", f"{node.name} has left: {reason}", node=node.name)
        else:
            self.emit("node-lost", f"{node.name} is lost: {reason}", node=node.name, seat=seat)
        if self.preparation is not None:
            self.preparation.waiting.discard(node.name)
        self.stacks_awaited.discard(node.name)
        if needed:
            self.resizing.pause.lost(now)
            text = f"{node.name} (seat {seat}) was lost: {reason}"
            step = self.progress.top_step
            self.fault(Symptom("node-lost", text, now, now - silent_s, node.name, step=step), now)
        preparing.advance(self, now)

    def _handed_over(self, node: Node) -> bool:
        """Whether a leaving node's ranks have been stopped, so that it may go."""
        preparation = self.preparation
        if node.leaving is None or preparation is None or self.phase not in PREPARING:
            return False
        return preparation.concluded or node.stopped == self.attempt

    def needs(self, node: Node) -> bool:
        """Whether the loss of a node would be a fault: its ranks have steps to do, or it an upload of the last one."""
        if node.seat is None:
            return False
        if not self.ranks_done(node.seat):
            return True
        return self.final_pending and not self._uploaded(node.name)

    @property
    def final_pending(self) -> bool:
        """Whether the last step is yet to reach the store."""
        return self.final is not None and not self.claims.holds_step(self.final.step)

    def store_waits_until(self, began: float, patience_s: float) -> float:
        """Until when the store is waited for by a job that has had nothing else to do since ``began``."""
        under_way = self.checkpoints is not None and self.checkpoints.stage is not Transfer.RESTING
        return self.store_news.waits_until(began, patience_s, self.config.patience.upload_s, under_way=under_way)

    def _uploaded(self, name: str) -> bool:
        return self.checkpoints is None or self.final is None or self.checkpoints.uploaded_by(name, self.final)

    def ranks_done(self, seat: int) -> bool:
        """Whether all ranks of a seat have done all their steps."""
        procs = self.config.procs
        return all(rank in self.progress.done for rank in range(seat * procs, (seat + 1) * procs))

    def fault(self, symptom: Symptom, now: float) -> None:
        """Something is wrong: restart, at once when the cause is plain."""
        struck = self.before if self.phase in PREPARING else self.attempt
        number = struck.number if struck else 0
        symptom = replace(symptom, attempt=number)
        if self.phase in PREPARING:
            self._fault_while_preparing(symptom, number, now)
            return
        if self.phase not in LIVE:
            return
        self.snapshot_rhythm.failed(now)
        self.symptoms.append(symptom)
        self.out += self.story.fault(symptom, number, now)
        if not symptom.collateral and symptom.kind != "hang":
            self.begin_attempt(now)
        elif self.phase is not Phase.DIAGNOSING:
            patience = self.config.patience
            self.decide_at = now + (patience.stacks_s if symptom.kind == "hang" else patience.collateral_s)
            self.enter(Phase.DIAGNOSING, now)
            self.story.ledger.enter("detect", now)

    def _fault_while_preparing(self, symptom: Symptom, number: int, now: float) -> None:
        """Ranks are being killed already: it may be the cause, or is one more once that is named."""
        if self.preparation is not None and self.preparation.concluded:
            if not symptom.collateral:
                self.out.append(self.story.struck_again(symptom))
        else:
            self.symptoms.append(symptom)
            self.out += self.story.fault(symptom, number, now)

    def note_step(self, step: int, now: float) -> None:
        """Some rank has done so many steps."""
        self.progress.reached(step, now)
        recovered = self.story.moved(self.progress.top_step, self.progress.restored_step, now)
        if recovered is not None:
            self.out.append(recovered)

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self, outcome: Outcome, reason: str, now: float) -> None:
        """The outcome is known."""
        if self.outcome is not None:
            return
        self.outcome, self.reason = outcome, reason
        self.decide_at = now + self.config.patience.finish_s
        self.enter(Phase.FINISHING, now)
        self.story.ledger.close(now)
        self.out.append(Finish(outcome, reason))

    def finalize(self, now: float) -> None:
        """The driver has ended everything, or does not answer."""
        if self.phase is Phase.FINISHING and self.outcome is not None:
            self.enter(_END[self.outcome], now)

    def drain(self) -> list[Instruction]:
        """Take what is to be done."""
        out, self.out = self.out, []
        return out
