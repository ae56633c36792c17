"""One job's state, and its moves from phase to phase. The events that cause them are ``machine``'s.

::

    gather -> begin_attempt -> advance -> (conclude) -> launch -> loaded -> ready -> ... fault -> begin_attempt
           -> adopt, when ranks outlived a controller                                  -> finish

Every move appends what is to be done to ``out``, and enters a phase that ``phases.TRANSITIONS`` allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from outlast.controller.detector import AwakeClock
from outlast.controller.faults import Symptom, first_cause
from outlast.controller.membership import Membership, Node
from outlast.controller.phases import LIVE, OVER, PREPARING, TRANSITIONS, Phase
from outlast.controller.policy import RestartBudget
from outlast.controller.progress import Progress
from outlast.controller.recovery import Launch, Preparation, plan_launch, start_instructions
from outlast.controller.settings import MachineConfig
from outlast.controller.snapshots import SnapshotCycle, SnapshotTotals
from outlast.controller.story import Story
from outlast.messages.instructions import Emit, Finish, GiveUp, Instruction, Load, Stop
from outlast.snapshot.identity import Attempt

Outcome = Literal["succeeded", "failed", "stopped"]
_END: dict[Outcome, Phase] = {"succeeded": Phase.SUCCEEDED, "failed": Phase.FAILED, "stopped": Phase.STOPPED}


class Job:
    """The state. ``attempt``: the living one, or the one in preparation (then ``before``
    is the one that lived last); ``symptoms``: faults since it was last well;
    ``decide_at``: the end of a diagnosis or of finishing; ``awaiting``: nodes that have not rebuilt what they lack.
    """

    def __init__(self, config: MachineConfig, now: float, new_incarnation: Callable[[], str]) -> None:
        self.config = config
        self.phase = Phase.GATHERING
        self.entered = self.began = now
        self.awake = AwakeClock(config.detector, now)
        self.members = Membership(config)
        self.attempt: Attempt | None = None
        self.before: Attempt | None = None
        self.restart_count = 0
        self.preparation: Preparation | None = None
        self.progress = Progress(now)
        self.cycle: SnapshotCycle | None = None
        self.totals = SnapshotTotals()
        self.story = Story(now)
        self.budget = RestartBudget(config.max_restarts, config.window_s)
        self.symptoms: list[Symptom] = []
        self.awaiting: set[str] = set()
        self.stacks_awaited: set[str] = set()
        self.decide_at = math.inf
        self.best_at_start = 0
        self.look_for_stragglers_at = now
        self.load_again_at = math.inf
        self.outcome: Outcome | None = None
        self.reason = ""
        self.weights_digest: str | None = None
        self.out: list[Instruction] = []
        self._new_incarnation = new_incarnation

    @property
    def over(self) -> bool:
        """Whether the outcome is final."""
        return self.phase in OVER

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

    def begin_attempt(self, now: float) -> None:
        """Tell every node to stop, under the number of the attempt to come."""
        members = self.members
        number = 1 + max(members.best_seen_attempt, self.attempt.number if self.attempt else 0)
        self.cycle = None  # its permits die with the ranks, its encodings with the fence
        if self.phase in LIVE:
            self.before = self.attempt
        first = self.attempt is None
        self.attempt = Attempt(number, self._new_incarnation())
        deadline = now + self.config.patience.stop_s
        self.preparation = Preparation(self.attempt, now, set(members.alive), deadline, concluded=not self.symptoms)
        self.enter(Phase.STOPPING, now)
        self.story.stopping(now)
        kind, text = ("start", "starts") if first else ("restart", "restarts")
        step = self.progress.top_step
        self.emit(kind, f"attempt {number} {text} all ranks", attempt=number, step=step, nodes=len(members.alive))
        self.out += [Stop(name, self.attempt) for name in members.alive]

    def ask_to_stop(self, node: Node, now: float) -> None:
        """A node has joined while the next attempt is prepared, or beside a living one."""
        if self.attempt is None:
            return
        if self.phase in PREPARING and self.preparation is not None:
            if self.members.best_seen_attempt >= self.attempt.number:
                self._prepare_anew(self.preparation, now)
            else:
                self.out.append(self.preparation.ask(node, now, self.config.patience.stop_s))
                self.enter(Phase.STOPPING, now)
        else:
            self.out.append(Stop(node.name, self.attempt))

    def _prepare_anew(self, before: Preparation, now: float) -> None:
        """A node has seen a higher number than that of the attempt in preparation, and would refuse it."""
        self.begin_attempt(now)
        if self.preparation is not None and before.concluded:
            self.preparation.concluded, self.preparation.not_before = True, before.not_before
            self.preparation.short_since = before.short_since

    def advance(self, now: float) -> None:
        """While preparing: name the cause once all have stopped, and start once there are enough nodes."""
        preparation = self.preparation
        if self.phase not in PREPARING or preparation is None or preparation.waiting:
            return
        if not preparation.concluded and not self._conclude(preparation, now):
            return
        short = len(self.members.alive) < self.config.replicas
        if short or now < preparation.not_before:
            if self.phase is not Phase.WAITING:
                self.story.ledger.enter("idle", now)
            self.enter(Phase.WAITING, now)
            self._note_shortage(preparation, short, now)
            return
        self._launch(now)

    def _note_shortage(self, preparation: Preparation, short: bool, now: float) -> None:
        if not short:
            preparation.short_since = None
        elif preparation.short_since is None:
            preparation.short_since = now
            here, wanted = len(self.members.alive), self.config.replicas
            limit = self.config.start_timeout_s
            self.emit("waiting", f"{here} of {wanted} nodes are here; waiting {limit:.0f} s for more", nodes=here)

    def _conclude(self, preparation: Preparation, now: float) -> bool:
        """Name the first cause and ask the budget; False when the job fails by it."""
        cause = first_cause(self.symptoms)
        self.out.append(self.story.concluded(cause, self.symptoms, now))
        preparation.concluded = True
        self.symptoms = []
        crash = (cause.step or 0, cause.signature) if cause.signature is not None else None
        progressed = self.story.best_step > self.best_at_start
        verdict = self.budget.restart(now, progressed, crash)
        if verdict.reason is not None:
            self.finish("failed", f"{cause.text}; {verdict.reason}", now)
            return False
        self.restart_count += 1
        preparation.not_before = now + verdict.delay_s
        if verdict.delay_s > 0:
            self.emit("backoff", f"restarting after {verdict.delay_s:.0f} s", seconds=verdict.delay_s)
        return True

    # --- starting ---------------------------------------------------------------------------------------------------

    def _launch(self, now: float) -> None:
        """Give seats, plan the restore and start the ranks."""
        attempt = self.attempt
        if attempt is None:
            return
        launch = plan_launch(self.config, self.members, attempt)
        self.preparation = None
        self.members.seat_all(launch.seats)
        self.progress = Progress(now, launch.step)
        self.best_at_start = self.story.best_step
        self.cycle = SnapshotCycle(self.config, self.members, attempt, launch.groups, launch.restored, self.totals)
        self.awaiting = set(launch.seats.values())
        self.enter(Phase.STARTING, now)
        self._tell_restore(launch)
        self.story.launched(launch, self.config.world, now)
        self.out += start_instructions(launch, self.members, self.config.procs, self.restart_count)

    def _tell_restore(self, launch: Launch) -> None:
        sources, number = launch.sources(self.config.world), launch.attempt.number
        for reason in launch.reasons:
            self.emit("passed-over", f"cannot be rebuilt: {reason}")
        fields = {"attempt": number, "step": launch.step, "restore_sources": sources, "seats": _names(launch.seats)}
        if launch.plan is not None:
            origin = ", ".join(f"{count} {source}" for source, count in sorted(sources.items()))
            text = f"attempt {number} resumes with step {launch.step} ({origin})"
            self.emit("restored", text, generation=str(launch.plan.generation), **fields)
        elif launch.reasons or self.story.best_step or self.restart_count:
            why = "no snapshot can be rebuilt" if launch.reasons else "no snapshot was held"
            self.emit("restored-none", f"attempt {number} restarts from step 0: {why}", restored="none", **fields)
        else:
            self.emit("fresh", f"attempt {number} begins at step 0", **fields)

    def loaded(self, now: float) -> None:
        """Every node has rebuilt what it lacked."""
        if self.attempt is not None:
            self.story.loading(now)
            self.out.append(Load(self.members.seated_names(), self.attempt))

    def rank_ready(self, rank: int, now: float) -> None:
        """A rank has its state; with the last one the attempt runs, and snapshots begin."""
        if rank in self.progress.ready:
            return
        self.progress.ready.add(rank)
        if not self.all_ready or self.phase is Phase.DIAGNOSING:
            return
        if self.phase is Phase.STARTING:
            self.run(now)
        if self.cycle is not None:
            self.out += self.cycle.begin(now)

    @property
    def all_ready(self) -> bool:
        """Whether every rank has said that it has its state."""
        return len(self.progress.ready) == self.config.world

    def run(self, now: float) -> None:
        """The attempt runs."""
        self.enter(Phase.RUNNING, now)
        self.story.running(self.progress.restored_step, now)
        self.progress.moved_at = now
        number, step = self.attempt.number if self.attempt else 0, self.progress.restored_step
        self.emit("running", f"attempt {number} runs from step {step}", attempt=number, step=step)

    # --- faults -----------------------------------------------------------------------------------------------------

    def lose(self, node: Node, reason: str, silent_s: float, now: float) -> None:
        """Give a node up."""
        seat = node.seat
        self.members.lose(node, reason)
        self.out.append(GiveUp(node.name, reason))
        self.emit("node-lost", f"{node.name} is lost: {reason}", node=node.name, seat=seat)
        if self.preparation is not None:
            self.preparation.waiting.discard(node.name)
        self.stacks_awaited.discard(node.name)
        if seat is not None and not self.ranks_done(seat):
            text = f"{node.name} (seat {seat}) was lost: {reason}"
            step = self.progress.top_step
            self.fault(Symptom("node-lost", text, now, now - silent_s, node.name, step=step), now)
        self.advance(now)

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
            self.out.append(self.story.struck_again(symptom))
        else:
            self.symptoms.append(symptom)
            self.out += self.story.fault(symptom, number, now)

    def note_step(self, step: int, now: float) -> None:
        """Some rank has done so many steps."""
        self.progress.top_step = max(self.progress.top_step, step)
        recovered = self.story.moved(self.progress.top_step, self.progress.restored_step, now)
        if recovered is not None:
            self.out.append(recovered)

    def rank_done(self, rank: int, digest: str, steps: int, now: float) -> None:
        """A rank has done all its steps; no snapshot is of use any more, and the last rank ends the job."""
        self.progress.done[rank] = digest
        self.progress.moved_at = now
        self.note_step(steps, now)
        if digest and (rank == 0 or self.weights_digest is None):
            self.weights_digest = digest
        if self.cycle is not None:
            self.out += self.cycle.close()
        if len(self.progress.done) == self.config.world:
            self.finish("succeeded", f"all {self.config.world} ranks have done all their steps", now)

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


def _names(seats: dict[int, str]) -> list[str]:
    """The nodes in the order of seats; for a large job, the first ones."""
    return list(seats.values())[:64]
