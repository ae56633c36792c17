"""How an attempt begins: everybody stops, what is left is counted, seats are given, a plan is made, ranks start. Pure.

::

    Stop to every node, Claim -> Stopped with verified inventories, Claimed -> seats, restore plan
                              -> Start to every seat -> RestoreReady of all -> Load -> RankReady of all ranks
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from outlast.controller.capacity import Fit, fits, resize_need
from outlast.controller.membership import Membership, Node
from outlast.controller.policy import choose_seats
from outlast.controller.settings import MachineConfig
from outlast.messages.instructions import Instruction, Start, Stop
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import Inventory, RestorePlan
from outlast.snapshot.placement import Group, groups
from outlast.snapshot.restore import candidates, lacking_parity
from outlast.snapshot.stored import StoredCheckpoint


@dataclass(frozen=True)
class Planned:
    """An attempt that is begun on purpose, with nothing lost: ``kind`` is resize or node-left, ``cause`` the sentence;
    ``node``: who leaves."""

    kind: str
    cause: str
    node: str | None = None


@dataclass
class Preparation:
    """The time between two attempts. ``waiting``: nodes that have not answered ``Stop``; ``again_at``: when they are
    told again, ``deadline``: when they are given up; ``not_before``: the end of the backoff; ``short_since``: since
    when there are too few nodes; ``concluded``: the cause is named and a restart allowed; ``size``: nodes that suffice
    without waiting for more; ``lacking_since``: since when the job waits for the object store, as nothing is left in
    memory; ``looked``: usable nodes and claim with which no way to begin was found; ``told``: what the event log was
    told of that.
    """

    attempt: Attempt
    began: float
    waiting: set[str]
    deadline: float
    again_at: float
    not_before: float = 0.0
    short_since: float | None = None
    concluded: bool = False
    size: int | None = None
    lacking_since: float | None = None
    looked: tuple[object, ...] | None = None
    told: str = ""

    def ask(self, node: Node, now: float, patience_s: float) -> Instruction:
        """Tell one more node to stop."""
        self.waiting.add(node.name)
        self.looked = None
        self.deadline = max(self.deadline, now + patience_s)
        return Stop(node.name, self.attempt)


@dataclass(frozen=True)
class Restored:
    """A generation that the new attempt resumes from. ``slot`` must stay as it is until the next commit (None: no
    image of it lies in a slot); ``targets``: what its protection lacks, group -> members, where any. ``direct``:
    another world wrote it, so that it cannot be protected, and is to be replaced by a snapshot soon.
    """

    generation: Generation
    slot: int | None
    lengths: dict[int, int]
    targets: dict[Group, tuple[int, ...]]
    direct: bool = False


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
        """How many images (without a plan: ranks) come from where."""
        return self.plan.origins() if self.plan else {"none": world}

    def origin(self, stored: Sequence[StoredCheckpoint]) -> StoredCheckpoint | None:
        """The checkpoint that it reads from, even if only a part; None when all comes from memory."""
        urls = {restore.url for restore in self.plan.ranks if restore.source == "object"} if self.plan else set()
        read = (c for c in stored if self.plan and c.generation == self.plan.generation and c.url in urls)
        return next(read, None)


def plan_launch(
    config: MachineConfig,
    members: Membership,
    attempt: Attempt,
    size: int,
    stored: Sequence[StoredCheckpoint] = (),
    excluded: Collection[Generation] = frozenset(),
) -> Launch:
    """``size`` seats, redundancy groups and restore plan for the nodes that have stopped."""
    seats = choose_seats(members.seats, members.candidates(), size)
    placed = seat_groups(config, members, seats)
    plan, reasons = _newest(members, seats, config.procs, stored, excluded)
    restored = None if plan is None else _restored(plan, members, seats, placed, config.procs)
    return Launch(attempt, seats, placed, plan, restored, reasons)


def _restored(
    plan: RestorePlan, members: Membership, seats: dict[int, str], placed: Sequence[Group], procs: int
) -> Restored:
    lengths = {restore.rank: restore.length for restore in plan.ranks}
    if plan.direct:
        return Restored(plan.generation, plan.kept_slot, lengths, {}, direct=True)
    held = {seat: members.nodes[name].inventory or Inventory(name) for seat, name in seats.items()}
    targets = unprotected(plan.generation, held, placed, procs)
    return Restored(plan.generation, plan.kept_slot or 0, lengths, targets)


def room(config: MachineConfig, members: Membership, names: Sequence[str], lengths: dict[int, int]) -> Fit:
    """Whether these nodes have the memory for snapshots of a job of just them. ``lengths``: images by rank, as they are
    or will be restored; without any, nothing is known against it.
    """
    nodes = [members.nodes[name] for name in names]
    domains = [node.domain for node in nodes]
    need = resize_need(lengths, len(nodes), config.procs, config.group_size, config.parity, config.slots, domains)
    return fits(need, {node.name: node.memory for node in nodes})


def seat_groups(config: MachineConfig, members: Membership, seats: dict[int, str]) -> tuple[Group, ...]:
    """The redundancy groups over the seats, by their nodes' failure domains."""
    domains = [(seat, members.nodes[name].domain) for seat, name in sorted(seats.items())]
    return tuple(groups(domains, config.group_size, config.parity))


def _newest(
    members: Membership,
    seats: dict[int, str],
    procs: int,
    stored: Sequence[StoredCheckpoint],
    excluded: Collection[Generation],
) -> tuple[RestorePlan | None, tuple[str, ...]]:
    reasons: list[str] = []
    for generation, found in candidates(members.inventories(), seats, procs, stored, excluded):
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


def start_instructions(launch: Launch, members: Membership, procs: int, restart_count: int) -> list[Start]:
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
