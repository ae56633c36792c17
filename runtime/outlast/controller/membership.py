"""Who is here: the job's nodes, which of them are alive, and who has which seat. No decisions.

A node that was given up stays on the list, so that what it still says is known for a zombie's; it is alive again once
it registers anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from outlast.controller.detector import Watch
from outlast.controller.policy import Candidate
from outlast.controller.settings import MachineConfig
from outlast.messages.events import Address, Joined, Stopped
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import HeldImage, Inventory


@dataclass(slots=True)
class Departure:
    """A node's leave. ``told_at`` and ``grace_s``: when it was told, and after how many seconds it will be gone;
    ``source``: it had a seat, so that its images may be needed; ``released``: it was told that they are not, and is
    told so again ``again_at``.
    """

    told_at: float
    grace_s: float
    reason: str
    source: bool = False
    released: bool = False
    again_at: float = math.inf

    @property
    def unneeded(self) -> bool:
        """Whether it leaves because it is too many: without a time of its own."""
        return math.isinf(self.grace_s)

    def spent(self, now: float) -> float:
        """The share of its time that is over."""
        return (now - self.told_at) / self.grace_s if self.grace_s > 0 else 1.0


@dataclass(slots=True)
class Node:
    """One node as it is known. ``gone``: why it was given up, at ``gone_at``; ``stopped``: the attempt for which it has
    answered ``Stop``, with ``inventory``; ``dirty``: (local rank, slot) of files that a rank may still write;
    ``leaving``: that it was told to go; ``memory``: bytes that its images may take in all, where known; ``attempt``:
    of the ranks that it has, as its last heartbeat says.
    """

    name: str
    domain: str
    host: str
    keeper: Address
    free_port: int
    registration: str
    seat: int | None = None
    keeper_up: bool = True
    gone: str | None = None
    gone_at: float = 0.0
    stopped: Attempt | None = None
    inventory: Inventory | None = None
    held: tuple[HeldImage, ...] = ()
    dirty: set[tuple[int, int]] = field(default_factory=set)
    told_at: float | None = None
    joined_at: float = 0.0
    leaving: Departure | None = None
    memory: int | None = None
    attempt: Attempt | None = None

    @property
    def state(self) -> str:
        """For people: active, spare, joining, leaving, left or lost."""
        if self.gone is not None:
            return "left" if self.leaving is not None and self.leaving.released else "lost"
        if self.leaving is not None:
            return "leaving"
        if self.seat is not None:
            return "active"
        return "spare" if self.stopped is not None else "joining"


class Membership:
    """All nodes. ``alive``: those not given up, in the order of joining; ``seats``: the living attempt's, or, between
    two attempts, those of the one before; ``leaving``: those of the living that were told to go; ``distrusted``:
    generations of which images verify, and do not give what they should.
    """

    def __init__(self, config: MachineConfig) -> None:
        self.nodes: dict[str, Node] = {}
        self.alive: dict[str, Node] = {}
        self.leaving: dict[str, Node] = {}
        self.seats: dict[int, str] = {}
        self.best_seen_attempt = 0
        self.distrusted: set[Generation] = set()
        self._doubted: dict[Generation, Attempt] = {}
        self.watch = Watch(config.detector)

    def join(self, event: Joined, awake: float, now: float) -> Node:
        """Take a node in, or again under a new registration."""
        old = self.nodes.get(event.node)
        node = Node(
            event.node, event.domain, event.host, event.keeper, event.free_port, event.registration, held=event.held
        )
        node.dirty, node.memory, node.joined_at = set(event.dirty), event.memory, now
        if old is not None:
            node.seat = None if old.gone is not None else old.seat
            node.dirty |= old.dirty
            node.leaving = old.leaving
        self.nodes[event.node] = self.alive[event.node] = node
        if node.leaving is not None:
            self.leaving[event.node] = node
        self.best_seen_attempt = max(
            self.best_seen_attempt, event.best_seen_attempt, event.attempt.number if event.attempt else 0
        )
        self.watch.add(event.node, awake)
        return node

    def lose(self, node: Node, reason: str, now: float) -> None:
        """Give a node up. Its seat stays with it in ``seats`` until the next attempt is seated."""
        node.gone, node.gone_at = reason, now
        node.seat = None
        node.stopped = None
        node.inventory = None
        self.alive.pop(node.name, None)
        self.leaving.pop(node.name, None)
        self.watch.remove(node.name)

    def depart(self, node: Node, departure: Departure) -> None:
        """A node was told to leave: it gets no seat any more."""
        node.leaving = departure
        self.leaving[node.name] = node

    def stay(self, node: Node) -> None:
        """A node that was to leave shall not."""
        node.leaving = None
        self.leaving.pop(node.name, None)

    @property
    def usable(self) -> int:
        """How many nodes may have a seat."""
        return len(self.alive) - len(self.leaving)

    def free(self) -> list[Node]:
        """The nodes that may have a seat and have none."""
        return [node for node in self.alive.values() if node.seat is None and node.leaving is None]

    def stopped(self, node: Node, event: Stopped) -> None:
        """A node has confirmed that its ranks are dead."""
        node.stopped = event.attempt
        node.inventory = event.inventory
        node.dirty |= set(event.dirty)
        if event.free_port:
            node.free_port = event.free_port

    def seat_all(self, seats: Mapping[int, str]) -> None:
        """Give the nodes their seats, and take those of all others."""
        for node in self.alive.values():
            node.seat = None
        for seat, name in seats.items():
            self.nodes[name].seat = seat
        self.seats = dict(seats)

    def seated(self) -> list[Node]:
        """The nodes with a seat, in the order of seats."""
        return [self.nodes[name] for _, name in sorted(self.seats.items())]

    def seated_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for _, name in sorted(self.seats.items()))

    def inventories(self) -> list[Inventory]:
        """What the living nodes hold, verified; without what turned out to be wrong all the same."""
        found = [node.inventory for node in self.alive.values() if node.inventory is not None]
        return [held.without(self.distrusted) for held in found] if self.distrusted else found

    def doubt(self, generation: Generation, attempt: Attempt) -> bool:
        """Images gave ``attempt`` something else than they should: distrust them if they did so to another one before.

        A source that was damaged since it was verified is found, and decoded around, when it is verified again.
        """
        if self._doubted.setdefault(generation, attempt) != attempt:
            self.distrusted.add(generation)
        return generation in self.distrusted

    def candidates(self) -> list[Candidate]:
        """The nodes that may have a seat, with what they hold."""
        usable = (node for node in self.alive.values() if node.leaving is None)
        return [Candidate(node.name, node.domain, newest_by_seat(_images(node))) for node in usable]


def newest_by_seat(images: Iterable[HeldImage]) -> dict[int, Generation]:
    """The newest generation of a rank image of each seat."""
    newest: dict[int, Generation] = {}
    for image in images:
        if image.kind == "shard" and (image.seat not in newest or newest[image.seat] < image.generation):
            newest[image.seat] = image.generation
    return newest


def _images(node: Node) -> tuple[HeldImage, ...]:
    return node.held if node.inventory is None else node.inventory.images
