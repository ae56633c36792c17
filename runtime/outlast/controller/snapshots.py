"""The snapshot cycle of one attempt: permit, copy, encode, commit; one at a time.

::

    RESTING --Permit(replan)--> PLANNING --Planned by all ranks--> RESTING
    RESTING --Permit--> COPYING --Copied by all ranks--> ENCODING --all groups--> COMMITTING --acked by all--> RESTING
              PLANNING, COPYING --Missed by one, or too late--> Abort, RESTING
                                ENCODING --a group fails again and again--> Abort, RESTING (never when restored)

What must hold: a permit goes out only when every keeper knows the last commit, and never for the slot of the newest
generation that is whole; so one committed generation exists at every moment. A generation that was restored is encoded
and committed again before the first permit, since the node that replaces a lost one has no parity yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from outlast.controller import policy
from outlast.controller.membership import Membership, Node
from outlast.controller.parity import ParityRound
from outlast.controller.progress import Progress
from outlast.controller.recovery import Restored
from outlast.controller.settings import MachineConfig
from outlast.messages.events import CommitAcked, Copied, Encoded, Missed, Planned
from outlast.messages.instructions import Abort, Commit, Emit, Instruction, Permit
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.placement import Group

MOST_MARGIN_FACTOR = 16
RETRY_S = 1.0
LONGEST_RETRY_S = 30.0


class Stage(StrEnum):
    """What is under way."""

    RESTING = "resting"
    PLANNING = "planning"
    COPYING = "copying"
    ENCODING = "encoding"
    COMMITTING = "committing"
    CLOSED = "closed"


@dataclass
class Work:
    """The generation under way. ``waiting``: ranks (planning, copying) or nodes (committing) that have not answered."""

    generation: Generation
    slot: int
    permitted_at: float
    restored: bool = False
    waiting_ranks: set[int] = field(default_factory=set)
    waiting_nodes: set[str] = field(default_factory=set)
    lengths: dict[int, int] = field(default_factory=dict)
    bytes: int = 0
    stall_s: float = 0.0
    copy_began: float | None = None
    deadline: float = 0.0
    parity: ParityRound | None = None


@dataclass
class SnapshotTotals:
    """Over all attempts: what was committed. ``stall_s``: the longest of all ranks for each snapshot, summed."""

    count: int = 0
    bytes: int = 0
    stall_s: float = 0.0
    newest: Generation | None = None
    newest_at: float | None = None


class SnapshotCycle:
    """One attempt's cycle. Every method returns what is to be done."""

    def __init__(
        self,
        config: MachineConfig,
        members: Membership,
        attempt: Attempt,
        placed: tuple[Group, ...],
        restored: Restored | None,
        totals: SnapshotTotals,
        *,
        adopted: bool = False,
    ) -> None:
        self.stage = Stage.RESTING
        self.work: Work | None = None
        self.attempt = attempt
        self._config, self._members, self._placed = config, members, placed
        self.totals = totals
        self._nodes = members.seated_names()
        self._restored = restored
        self._kept_slot: int | None = restored.slot if restored else None
        self._adopted = adopted
        self._planned = False
        self._missed = False
        self._last_permitted = -1
        self._last_copied: int | None = None
        self._factor = 1
        self._errors = 0
        self._cycle_s: float | None = None
        self._not_before = 0.0
        self._not_before_step = 0

    # --- from outside -----------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[Instruction]:
        """All ranks are ready: protect again what they were restored from."""
        restored = self._restored
        if restored is None:
            return []
        work = Work(restored.generation, restored.slot, now, restored=True, lengths=restored.lengths, copy_began=now)
        self.work = work
        return self._encode(work, restored.targets, now)

    def close(self) -> list[Instruction]:
        """No snapshot any more: the attempt ends. What ranks have not copied yet is called off."""
        work, stage = self.work, self.stage
        self.work, self.stage = None, Stage.CLOSED
        if work is not None and stage in (Stage.PLANNING, Stage.COPYING):
            return [Abort(self._nodes, work.generation)]
        return []

    def tick(self, progress: Progress, now: float) -> list[Instruction]:
        """Permit the next snapshot when its time has come; see to what takes too long."""
        work = self.work
        if self.stage is Stage.RESTING:
            return self._permit(progress, now)
        if work is None:
            return []
        if self.stage in (Stage.PLANNING, Stage.COPYING):
            late = now > work.deadline
            return self._abandon(work, "not all ranks answered in time") if late else []
        if self.stage is Stage.ENCODING:
            return self._drive_parity(work, now)
        return self._commit_again(work, now) if now > work.deadline else []

    # --- permit -----------------------------------------------------------------------------------------------------

    def _permit(self, progress: Progress, now: float) -> list[Instruction]:
        """The next permit, once its step is near enough to be sure of it and far enough for all ranks to hear of it."""
        if now < self._not_before or progress.done or (self._adopted and not progress.stepped):
            return []
        estimate = progress.estimate(now)
        margin = policy.margin_steps(progress.step_s, self._factor)
        if self._adopted:  # permits of the controller before this one may still be on their way
            self._adopted, self._not_before_step = False, estimate + 4 * margin + 8
        first = max(estimate + margin, self._not_before_step, self._last_permitted + 1)
        hurry = self._missed or not self._planned
        every, last = self._config.every_steps, self._last_copied
        step = policy.next_snapshot(every, first, last, self._cycle_s, progress.step_s, hurry)
        over = progress.total is not None and step >= progress.total
        if over or step > estimate + 2 * margin:
            return []
        wait_s = 3.0 * (step - estimate) * (progress.step_s or 1.0)
        return self._send_permit(step, now, now + wait_s + self._config.patience.copy_s)

    def _send_permit(self, step: int, now: float, deadline: float) -> list[Instruction]:
        generation = Generation.of(self.attempt, step)
        slot = 0 if self._kept_slot is None else 1 - self._kept_slot
        replan = not self._planned
        self.stage = Stage.PLANNING if replan else Stage.COPYING
        self.work = Work(generation, slot, now, deadline=deadline, waiting_ranks=set(range(self._config.world)))
        self._last_permitted = step
        kind = "replan-permitted" if replan else "snapshot-permitted"
        fields = {"generation": str(generation), "step": step, "slot": slot}
        text = f"all ranks agree on how to cut their state at step {step}" if replan else f"snapshot at step {step}"
        fresh = {} if replan else self._fresh(slot)
        return [Permit(self._nodes, generation, slot, replan, fresh), Emit(kind, text, fields)]

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
        if work is not None:
            work.waiting_ranks.discard(event.rank)
            if not work.waiting_ranks:
                self._planned = True
                self._rest()
        return []

    def copied(self, event: Copied, now: float) -> list[Instruction]:
        """A rank's image is sealed."""
        work = self._current(Stage.COPYING, event.generation)
        if work is None or event.rank not in work.waiting_ranks:
            return []
        work.waiting_ranks.discard(event.rank)
        work.lengths[event.rank] = event.length
        work.bytes += event.bytes
        work.stall_s = max(work.stall_s, event.stall_s)
        began = now - event.copy_s
        work.copy_began = began if work.copy_began is None else min(work.copy_began, began)
        self._members.nodes[event.node].dirty.discard((event.rank % self._config.procs, event.slot))
        if work.waiting_ranks:
            return []
        self._missed, self._last_copied, self._errors = False, event.generation.step, 0
        return self._encode(work, None, now)

    def missed(self, event: Missed, now: float) -> list[Instruction]:
        """A rank did not take it: none does."""
        work = self._current(Stage.PLANNING, event.generation) or self._current(Stage.COPYING, event.generation)
        if work is None:
            return []
        if event.reason == "late":
            self._factor = min(MOST_MARGIN_FACTOR, 2 * self._factor)
        else:
            self._planned = False
        if event.reason not in ("late", "replan"):
            self._errors += 1
            self._not_before = now + min(LONGEST_RETRY_S, RETRY_S * 2.0 ** (self._errors - 1))
        return self._abandon(work, f"rank {event.rank}: {event.reason}")

    def _abandon(self, work: Work, reason: str) -> list[Instruction]:
        """This generation will not be; the next one as soon as possible."""
        self._missed = True
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
        if parity.hopeless is None:
            return parity.due(now, self._config.patience.encode_s)
        self._not_before = now + RETRY_S
        return self._abandon(work, f"its parity could not be made: {parity.hopeless}")

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
        seconds = now - (now if work.copy_began is None else work.copy_began)
        fields = {"generation": str(work.generation), "step": step, "bytes": work.bytes, "seconds": round(seconds, 3)}
        if work.restored:
            return [Emit("protected", f"step {step} is protected again after {seconds:.2f} s", fields)]
        self._cycle_s = seconds if self._cycle_s is None else self._cycle_s + 0.25 * (seconds - self._cycle_s)
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
