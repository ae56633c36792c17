"""The snapshot cycle of one attempt: permit, copy, encode, commit; one at a time.

::

    RESTING --Permit(replan)--> PLANNING --Planned by all ranks--> RESTING
    RESTING --Permit--> COPYING --Copied by all ranks--> ENCODING --all groups--> COMMITTING --acked by all--> RESTING
              PLANNING, COPYING --Missed by one, or too late--> Abort, RESTING
                                ENCODING --a group fails again and again--> Abort, RESTING (never when restored)

What must hold: a permit goes out only when every keeper knows the last commit, and never for the slot of the newest
generation that is whole, nor for one that is being uploaded; so one committed generation exists at every moment. A
generation that was restored is encoded and committed again before the first permit, since the node that replaces a lost
one has no parity yet; one of another world cannot be, and its slot is kept until the first snapshot is committed.

A permit may hold the ranks: once it is committed they stay where they are, ``held``, until somebody says ``proceed`` or
their attempt ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outlast.controller.membership import Membership, Node
from outlast.controller.pace import ACCUMULATING, Next, Pace
from outlast.controller.parity import ParityRound
from outlast.controller.progress import Progress
from outlast.controller.recovery import Restored
from outlast.controller.rhythm import Rhythm
from outlast.controller.settings import MachineConfig
from outlast.controller.snapshot_work import Committed, SnapshotTotals, Stage, Work
from outlast.messages.events import CommitAcked, Copied, Encoded, Missed, Planned
from outlast.messages.instructions import Abort, Commit, Emit, Instruction, Permit, Proceed
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.placement import Group

UNSOUND_TOLD = 20
"""So many snapshots in a row were not taken for the sake of gradients: somebody should know."""
LET_GO_S = 2.0
"""Ranks that have not moved for so long under a new controller may be held by a permit of the one before it."""


@dataclass(frozen=True)
class Surroundings:
    """What outlasts an attempt and its cycle. ``pinned``: the slot that is being uploaded."""

    config: MachineConfig
    members: Membership
    totals: SnapshotTotals
    rhythm: Rhythm
    pinned: Callable[[], int | None]


@dataclass
class _Proceeding:
    """Ranks were let go after ``generation``; ``again_at``: when they are told again, ever more seldom."""

    generation: Generation
    again_at: float | None = None
    pause_s: float = LET_GO_S

    def due(self, now: float) -> bool:
        """Whether it is time."""
        due = self.again_at is not None and now >= self.again_at
        if due or self.again_at is None:
            self.again_at, self.pause_s = now + self.pause_s, 2 * self.pause_s
        return due


class SnapshotCycle:
    """One attempt's cycle, made when its seats are given. Every method returns what is to be done.

    ``newest``: the last generation committed in this attempt; ``held``: the one at which ranks wait, since
    ``held_since``. ``pace`` decides on permits. ``adopted``: the attempt runs already.
    """

    def __init__(
        self,
        around: Surroundings,
        attempt: Attempt,
        placed: tuple[Group, ...],
        restored: Restored | None,
        *,
        adopted: bool = False,
    ) -> None:
        self.stage = Stage.RESTING
        self.work: Work | None = None
        self.attempt = attempt
        self.newest: Committed | None = None
        self.held: Generation | None = None
        self.held_since = 0.0
        direct = restored is not None and restored.direct
        interval = around.rhythm.interval
        self.pace = Pace(around.config, interval, adopted=adopted, hurry=direct)
        self.totals = around.totals
        self._around = around
        self._config, self._members, self._placed = around.config, around.members, placed
        self._nodes = self._members.seated_names()
        self._world = len(self._nodes) * self._config.procs
        self._restored = None if direct else restored
        self._kept_slot: int | None = restored.slot if restored else None
        self._step_s: float | None = None
        self._adopted = adopted
        self._total: int | None = None
        self._stuck: tuple[int, float] | None = None
        self._moved = not adopted
        self._let_go: set[Generation] = set()
        self._proceeding: _Proceeding | None = None

    # --- from outside -----------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[Instruction]:
        """All ranks are ready: protect again what they were restored from."""
        restored, self._restored = self._restored, None
        if restored is None:
            return []
        slot, lengths = restored.slot or 0, restored.lengths
        work = Work(restored.generation, slot, now, restored=True, lengths=lengths, copy_began=now)
        self.work = work
        return self._encode(work, restored.targets, now)

    def close(self) -> list[Instruction]:
        """No snapshot any more: the attempt ends. What ranks have not copied yet is called off."""
        work, stage = self.work, self.stage
        self.work, self.stage, self.pace.ended = None, Stage.CLOSED, True
        if work is not None and stage in (Stage.PLANNING, Stage.COPYING):
            return [Abort(self._nodes, work.generation)]
        return []

    def tick(self, progress: Progress, now: float) -> list[Instruction]:
        """Permit the next snapshot when its time has come; see to what takes too long."""
        self._step_s, self._total = progress.step_s, progress.total
        return [*self._say_again(progress, now), *self._drive(progress, now)]

    def _drive(self, progress: Progress, now: float) -> list[Instruction]:
        work = self.work
        if self.stage is Stage.RESTING:
            return self._let_move(progress, now) or self._permit(progress, now)
        if work is None:
            return []
        if self.stage in (Stage.PLANNING, Stage.COPYING):
            late = now > work.deadline
            return self._abandon(work, "not all ranks answered in time", now) if late else []
        if self.stage is Stage.ENCODING:
            return self._drive_parity(work, now)
        return self._commit_again(work, now) if now > work.deadline else []

    def proceed(self) -> list[Instruction]:
        """Let the ranks that are held go on."""
        held, self.held = self.held, None
        if held is None:
            return []
        self._proceeding = _Proceeding(held)
        return [Proceed(self._nodes, held)]

    @property
    def holding(self) -> bool:
        """Whether all ranks wait for the snapshot that they have taken."""
        return self.held is not None or (self.work is not None and self.work.hold and self.work.copied_at is not None)

    @property
    def busy(self) -> bool:
        """Whether anything is being copied or encoded."""
        return self.stage in (Stage.COPYING, Stage.ENCODING, Stage.COMMITTING)

    # --- permit -----------------------------------------------------------------------------------------------------

    def _permit(self, progress: Progress, now: float) -> list[Instruction]:
        permit = None if self.held is not None else self.pace.next(progress, now)
        return [] if permit is None else self._send_permit(permit, now)

    def _send_permit(self, permit: Next, now: float) -> list[Instruction]:
        generation, slot, replan = Generation.of(self.attempt, permit.step), self._free_slot(), permit.replan
        self.stage = Stage.PLANNING if replan else Stage.COPYING
        waiting = set(range(self._world))
        self.work = Work(generation, slot, now, hold=permit.hold, deadline=permit.deadline, waiting_ranks=waiting)
        kind = "replan-permitted" if replan else "snapshot-permitted"
        fields = {"generation": str(generation), "step": permit.step, "slot": slot}
        text = f"snapshot at step {permit.step}"
        if replan:
            text = f"all ranks agree on how to cut their state at step {permit.step}"
        fresh = {} if replan else self._fresh(slot)
        # At the end ranks may still wait for the word of the controller before this one on the same generation.
        again = [Abort(self._nodes, generation)] if self._adopted and self._at_end(permit.step) else []
        told = Permit(self._nodes, generation, slot, replan, fresh, permit.hold)
        return [*again, told, Emit(kind, text, fields)]

    def _free_slot(self) -> int:
        """The lowest that has neither the newest whole generation nor the one on its way to the store."""
        taken = {self._kept_slot, self._around.pinned()}
        return next(slot for slot in range(self._config.slots) if slot not in taken)

    def _let_move(self, progress: Progress, now: float) -> list[Instruction]:
        """Ranks that the controller before this one held may still wait for its word."""
        if self._moved or not progress.steps:
            return []
        step = progress.top_step
        if self._stuck is None:
            self._stuck = (step, now + LET_GO_S)
        since_step, let_go_at = self._stuck
        if step > since_step:
            self._moved = True
        elif now >= let_go_at and not self._at_end(step):
            self._stuck = (step, now + LET_GO_S)
            return [Proceed(self._nodes, Generation.of(self.attempt, step))]
        return []

    def _say_again(self, progress: Progress, now: float) -> list[Instruction]:
        """Ranks that were let go and have not moved may not have heard it: a call to an agent may fail."""
        told = self._proceeding
        if told is None:
            return []
        step = told.generation.step
        moved = (progress.steps.get(rank, 0) > step or rank in progress.done for rank in range(self._world))
        if all(moved):
            self._proceeding = None
        elif told.due(now):
            return [Proceed(self._nodes, told.generation)]
        return []

    def _at_end(self, step: int) -> bool:
        """Whether ranks wait at this boundary in any case."""
        return self.pace.final and (self._total is None or step >= self._total)

    def _fresh(self, slot: int) -> dict[str, tuple[int, ...]]:
        """Node -> local ranks whose file in ``slot`` a former writer may still hold."""
        found = {node.name: tuple(sorted(r for r, dirty in node.dirty if dirty == slot)) for node in self._seated()}
        return {name: local_ranks for name, local_ranks in found.items() if local_ranks}

    def _seated(self) -> list[Node]:
        return [self._members.nodes[name] for name in self._nodes]

    # --- copy -------------------------------------------------------------------------------------------------------

    def planned(self, event: Planned) -> list[Instruction]:
        """A rank has agreed."""
        work = self._current(Stage.PLANNING, event.generation)
        if work is None:
            self.pace.answered(event.generation.step, event.rank)
            return []
        work.waiting_ranks.discard(event.rank)
        if not work.waiting_ranks:
            self.pace.planned = True
            self._rest()
        return []

    def copied(self, event: Copied, now: float) -> list[Instruction]:
        """A rank's image is sealed."""
        work = self._current(Stage.COPYING, event.generation)
        if work is None or event.rank not in work.waiting_ranks or event.slot != work.slot:
            return self._not_ours(event)
        work.waiting_ranks.discard(event.rank)
        work.lengths[event.rank] = event.length
        work.bytes += event.bytes
        work.stall_s = max(work.stall_s, event.stall_s)
        began = now - event.copy_s
        work.copy_began = began if work.copy_began is None else min(work.copy_began, began)
        self._members.nodes[event.node].dirty.discard((event.rank % self._config.procs, event.slot))
        if work.waiting_ranks:
            return []
        work.copied_at, self._adopted = now, False
        self.pace.copied(event.generation.step, event.sound)
        return self._encode(work, None, now)

    def _not_ours(self, event: Copied) -> list[Instruction]:
        """An answer to what was called off, or to a permit of the controller before, which may hold its ranks."""
        self.pace.answered(event.generation.step, event.rank)
        known = self.work is not None and self.work.generation == event.generation
        if known or not self._adopted or not event.generation.taken_by(self.attempt):
            return []
        if event.generation in self._let_go or self._at_end(event.generation.step):
            return []
        self._let_go.add(event.generation)
        return [Proceed(self._nodes, event.generation)]

    def missed(self, event: Missed, now: float) -> list[Instruction]:
        """A rank did not take it: none does."""
        work = self._current(Stage.PLANNING, event.generation) or self._current(Stage.COPYING, event.generation)
        if work is None:
            self.pace.answered(event.generation.step, event.rank)
            return []
        work.waiting_ranks.discard(event.rank)
        self.pace.missed(event.reason, now, event.sound)
        told = self._abandon(work, f"rank {event.rank}: {event.reason}", now)
        never = event.reason.startswith(ACCUMULATING) and self.pace.unsound == UNSOUND_TOLD
        return [*told, _never_sound()] if never else told

    def _abandon(self, work: Work, reason: str, now: float) -> list[Instruction]:
        """This generation will not be; the next one as soon as possible."""
        self.pace.called_off(work.generation.step, work.waiting_ranks, now)
        if work.hold and not self._at_end(work.generation.step):  # where ranks wait for the next permit in any case
            self._proceeding = _Proceeding(work.generation)
        self._rest()
        text = f"no snapshot at step {work.generation.step}: {reason}"
        fields = {"generation": str(work.generation), "step": work.generation.step, "reason": reason}
        return [Abort(self._nodes, work.generation), Emit("snapshot-aborted", text, fields)]

    # --- encode -----------------------------------------------------------------------------------------------------

    def _encode(self, work: Work, targets: Mapping[Group, tuple[int, ...]] | None, now: float) -> list[Instruction]:
        self.stage = Stage.ENCODING
        work.parity = ParityRound(
            work.generation, work.slot, self._members, self._placed, work.lengths, targets, forever=work.restored
        )
        if work.parity.done:
            return self._commit(work, now)
        fields = {"generation": str(work.generation), "step": work.generation.step}
        kind = "protecting" if work.restored else "encoding"
        return [Emit(kind, f"parity of step {work.generation.step}", fields), *self._drive_parity(work, now)]

    def _drive_parity(self, work: Work, now: float) -> list[Instruction]:
        parity = work.parity
        if parity is None:
            return []
        if parity.done:
            return self._commit(work, now)
        if parity.hopeless is not None:
            self.pace.unprotected(now)
            return self._abandon(work, f"its parity could not be made: {parity.hopeless}", now)
        return [*self._complain(work, parity, now), *parity.due(now, self._config.patience.encode_s)]

    @staticmethod
    def _complain(work: Work, parity: ParityRound, now: float) -> list[Instruction]:
        """What was restored is tried to be protected without end, but not in silence."""
        complaint = parity.complaint(now) if work.restored else None
        fields = {"generation": str(work.generation), "step": work.generation.step}
        return [Emit("not-protected", f"step {work.generation.step}: {complaint}", fields)] if complaint else []

    def encoded(self, event: Encoded, now: float) -> list[Instruction]:
        """A member's parity is sealed."""
        work = self._current(Stage.ENCODING, event.generation)
        if work is None or work.parity is None:
            return []
        work.parity.encoded(event.node, now)
        return self._commit(work, now) if work.parity.done else []

    def encode_failed(self, node: str, generation: Generation, reason: str, now: float) -> list[Instruction]:
        """A member could not encode."""
        work = self._current(Stage.ENCODING, generation)
        if work is not None and work.parity is not None:
            work.parity.failed(node, reason, now)
        return []

    def keeper_lost(self, node: str, now: float) -> list[Instruction]:
        """What this keeper was encoding is lost with it."""
        return self.encode_failed(node, self.work.generation, "its keeper died", now) if self.work else []

    def keeper_back(self, node: str, now: float) -> list[Instruction]:
        """Go on with what waited for this keeper."""
        work = self.work
        if work is None:
            return []
        if self.stage is Stage.COMMITTING and node in work.waiting_nodes:
            return [Commit((node,), work.generation)]
        if self.stage is Stage.ENCODING and work.parity is not None:
            work.parity.retry_now(node, now)
            return self._drive_parity(work, now)
        return []

    # --- commit -----------------------------------------------------------------------------------------------------

    def _commit(self, work: Work, now: float) -> list[Instruction]:
        """Whole and protected: from here on its slot is the one to keep."""
        self.stage = Stage.COMMITTING
        self._kept_slot = work.slot
        work.waiting_nodes = set(self._nodes)
        work.deadline = now + self._config.patience.commit_s
        return [Commit(self._nodes, work.generation)]

    def _commit_again(self, work: Work, now: float) -> list[Instruction]:
        work.deadline = now + self._config.patience.commit_s
        nodes = tuple(node.name for node in self._seated() if node.name in work.waiting_nodes and node.keeper_up)
        return [Commit(nodes, work.generation)] if nodes else []

    def commit_acked(self, event: CommitAcked, now: float) -> list[Instruction]:
        """A keeper knows."""
        work = self._current(Stage.COMMITTING, event.generation)
        if work is None:
            return []
        work.waiting_nodes.discard(event.node)
        return [] if work.waiting_nodes else self._committed(work, now)

    def _committed(self, work: Work, now: float) -> list[Instruction]:
        self._rest()
        totals, step = self.totals, work.generation.step
        totals.newest, totals.newest_at = work.generation, now
        self.newest = Committed(work.generation, work.slot, work.lengths)
        seconds = now - (now if work.copy_began is None else work.copy_began)
        fields = {"generation": str(work.generation), "step": step, "bytes": work.bytes, "seconds": round(seconds, 3)}
        if work.restored:
            return [Emit("protected", f"step {step} is protected again after {seconds:.2f} s", fields)]
        if work.hold:
            self.held, self.held_since = work.generation, now if work.copied_at is None else work.copied_at
            fields["held"] = True
        self._around.rhythm.safe(work.stall_s, seconds, self._step_s)
        totals.count += 1
        totals.bytes += work.bytes
        totals.stall_s += work.stall_s
        return [Emit("snapshot-committed", f"step {step} committed after {seconds:.2f} s", fields)]

    def _rest(self) -> None:
        self.work, self.stage = None, Stage.RESTING

    def _current(self, stage: Stage, generation: Generation) -> Work | None:
        """The work under way, if it is that generation at that stage; what speaks of another one is late."""
        work = self.work
        return work if work is not None and self.stage is stage and work.generation == generation else None


def _never_sound() -> Emit:
    text = (
        f"{UNSOUND_TOLD} snapshots in a row were not taken, as gradients waited for an optimizer's step at each "
        f"boundary: have a step of run.steps be one of the optimizer's, and sum within it (run.last, run.weight)"
    )
    return Emit("no-snapshots", text, {"tries": UNSOUND_TOLD})
