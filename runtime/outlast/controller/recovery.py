"""How an attempt begins: everybody stops, what is left is counted, seats are given, a plan is made, ranks start. Pure.

::

    Stop to every node -> Stopped with verified inventories -> seats, restore plan -> Start to every seat
                       -> RestoreReady of all -> Load -> RankReady of all ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from outlast.controller.membership import Membership, Node
from outlast.controller.policy import choose_seats
from outlast.controller.settings import MachineConfig
from outlast.messages.instructions import Instruction, Start, Stop
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import Inventory, RestorePlan
from outlast.snapshot.placement import Group, groups
from outlast.snapshot.restore import candidates, lacking_parity


@dataclass
class Preparation:
    """The time between two attempts. ``waiting``: nodes that have not answered ``Stop``; ``deadline``: when those are
    given up; ``not_before``: the end of the backoff; ``short_since``: since when there are too few nodes;
    ``concluded``: the cause is named and a restart allowed.
    """

    attempt: Attempt
    began: float
    waiting: set[str]
    deadline: float
    not_before: float = 0.0
    short_since: float | None = None
    concluded: bool = False

    def ask(self, node: Node, now: float, patience_s: float) -> Instruction:
        """Tell one more node to stop."""
        self.waiting.add(node.name)
        self.deadline = max(self.deadline, now + patience_s)
        return Stop(node.name, self.attempt)


@dataclass(frozen=True)
class Restored:
    """A generation that the new attempt resumes from, and what its protection lacks: group -> members, where any."""

    generation: Generation
    slot: int
    lengths: dict[int, int]
    targets: dict[Group, tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """What an attempt begins with. ``reasons``: why newer generations were passed over."""

    attempt: Attempt
    seats: dict[int, str]
    groups: tuple[Group, ...]
    plan: RestorePlan | None
    restored: Restored | None
    reasons: tuple[str, ...] = field(default=())

    @property
    def step(self) -> int:
        """The step it resumes with."""
        return self.plan.generation.step if self.plan else 0

    def sources(self, world: int) -> dict[str, int]:
        """How many ranks have their state from where."""
        return self.plan.origins() if self.plan else {"none": world}


def plan_launch(config: MachineConfig, members: Membership, attempt: Attempt) -> Launch:
    """Seats, redundancy groups and restore plan for the nodes that have stopped."""
    seats = choose_seats(members.seats, members.candidates(), config.replicas)
    placed = seat_groups(config, members, seats)
    inventories = members.inventories()
    plan, reasons = _newest(inventories, seats, config.procs)
    restored = None
    if plan is not None:
        lengths = {restore.rank: restore.length for restore in plan.ranks}
        slot = plan.ranks[0].slot
        held = {seat: members.nodes[name].inventory or Inventory(name) for seat, name in seats.items()}
        restored = Restored(plan.generation, slot, lengths, unprotected(plan.generation, held, placed, config.procs))
    return Launch(attempt, seats, placed, plan, restored, reasons)


def seat_groups(config: MachineConfig, members: Membership, seats: dict[int, str]) -> tuple[Group, ...]:
    """The redundancy groups over the seats, by their nodes' failure domains."""
    domains = [(seat, members.nodes[name].domain) for seat, name in sorted(seats.items())]
    return tuple(groups(domains, config.group_size, config.parity))


def _newest(
    inventories: Sequence[Inventory], seats: dict[int, str], procs: int
) -> tuple[RestorePlan | None, tuple[str, ...]]:
    reasons: list[str] = []
    for generation, found in candidates(inventories, seats, procs):
        if isinstance(found, RestorePlan):
            return found, tuple(reasons)
        reasons.append(f"{generation}: {found}")
    return None, tuple(reasons)


def unprotected(
    generation: Generation, held: dict[int, Inventory], placed: Sequence[Group], procs: int
) -> dict[Group, tuple[int, ...]]:
    """The members of each group whose parity of ``generation`` must be made anew, on the nodes that have the seats now.

    ``held``: what each seat's node holds. Groups that lack nothing are left out.
    """
    lacking = {}
    for group in placed:
        if group.parity == 0:
            continue
        inventories = [_own_parity(held[seat], member) for member, seat in enumerate(group.seats)]
        members = lacking_parity(inventories, generation, group.seats, group.parity, procs)
        if members:
            lacking[group] = members
    return lacking


def _own_parity(inventory: Inventory, member: int) -> Inventory:
    """The parity images that a node holds as that member; those of a seat that it had before do not count."""
    own = tuple(image for image in inventory.images if image.group is not None and image.group.index == member)
    return Inventory(inventory.node, own)


def start_instructions(launch: Launch, members: Membership, procs: int, restart_count: int) -> list[Instruction]:
    """``Start`` for every seat; the first seat's node is the ranks' rendezvous."""
    master = members.nodes[launch.seats[0]]
    start = partial(
        Start,
        attempt=launch.attempt,
        world_nodes=len(launch.seats),
        procs=procs,
        master_host=master.host,
        master_port=master.free_port,
        restore=launch.plan,
        peers={seat: members.nodes[name].keeper for seat, name in launch.seats.items()},
        keepers={name: node.keeper for name, node in members.alive.items()},
        restart_count=restart_count,
    )
    return [start(node=name, seat=seat) for seat, name in launch.seats.items()]
