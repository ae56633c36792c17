"""What can be restored from the images that keepers verified and from the store, and from where: a pure plan.

::

    inventories, stored -> newest generation first -> of another world: see ``direct``
        of the present world, each rank: a good image where it is needed    memory-local
                                         a good image elsewhere             memory-peer
                                         damaged or gone: decoded           memory-decode
                                         beyond its group                   object
        one rank without any -> the next older generation -> ... -> another job's checkpoints, the newest first

No mark is trusted, only what was verified: a generation counts when every rank of its world has its image or gets it
from its group or the store. ``candidates`` tells why a newer one was passed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from outlast.errors import UnrecoverableError
from outlast.snapshot.direct import plan_direct, plan_foreign
from outlast.snapshot.holdings import Holdings, Objects, Wanted, World, world_of
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import GUEST_SLOT as GUEST_SLOT
from outlast.snapshot.inventory import HeldImage, Inventory, RankRestore, RestorePlan
from outlast.snapshot.stored import StoredCheckpoint

_Copy = tuple[str, int, int]
"""(Node, seat, local rank): what a rank image is read by, and on which node."""


def plan_restore(
    inventories: Iterable[Inventory],
    seats: Mapping[int, str],
    procs: int,
    stored: Iterable[StoredCheckpoint] = (),
    excluded: Collection[Generation] = frozenset(),
) -> RestorePlan | None:
    """The first plan of ``candidates``, None when there is none."""
    found = (plan for _, plan in candidates(inventories, seats, procs, stored, excluded))
    return next((plan for plan in found if isinstance(plan, RestorePlan)), None)


def candidates(
    inventories: Iterable[Inventory],
    seats: Mapping[int, str],
    procs: int,
    stored: Iterable[StoredCheckpoint] = (),
    excluded: Collection[Generation] = frozenset(),
) -> Iterator[tuple[Generation, RestorePlan | UnrecoverableError]]:
    """Every generation that anything is held of or that is stored, newest first, with its plan or why there is none.

    ``inventories``: of all nodes that can be read from; ``seats``: which node has which seat (0, 1, ...) in the new
    attempt, of ``procs`` ranks each; ``excluded``: generations that are passed over in silence. Checkpoints of other
    jobs come last, whatever their generations say.
    """
    checkpoints = list(stored)
    own = {checkpoint.generation: checkpoint for checkpoint in checkpoints if not checkpoint.foreign}
    held: dict[Generation, list[HeldImage]] = defaultdict(list)
    for image in (image for inventory in inventories for image in inventory.images):
        held[image.generation].append(image)
    for generation in sorted({*held, *own}.difference(excluded), reverse=True):
        yield generation, _plan(generation, held.get(generation, []), own.get(generation), seats, procs)
    others = [checkpoint for checkpoint in checkpoints if checkpoint.foreign and checkpoint.generation not in excluded]
    for checkpoint in sorted(others, key=lambda checkpoint: checkpoint.generation, reverse=True):
        yield checkpoint.generation, _plan_foreign(checkpoint)


def lacking_parity(
    inventories: Iterable[Inventory], generation: Generation, group_seats: Sequence[int], parity: int, procs: int
) -> tuple[int, ...]:
    """Members (places in ``group_seats``) for which no sound parity image of this group and generation is held.

    These are the targets of an encoding that makes the generation fully protected again. A member needs one for each
    of its ``procs`` local ranks. It is for generations of the present world: one that is restored directly is not
    protected again.
    """
    sound: set[tuple[int, int]] = set()
    for image in (image for inventory in inventories for image in inventory.images):
        group = image.group
        if image.kind != "parity" or image.generation != generation or image.bad_blocks or group is None:
            continue
        if group.seats == tuple(group_seats) and group.parity == parity:
            sound.add((group.index, image.local_rank))
    wanted = range(procs)
    return tuple(i for i in range(len(group_seats)) if not all((i, local_rank) in sound for local_rank in wanted))


def _plan(
    generation: Generation,
    images: Sequence[HeldImage],
    stored: StoredCheckpoint | None,
    seats: Mapping[int, str],
    procs: int,
) -> RestorePlan | UnrecoverableError:
    held, objects, present = Holdings(images), Objects(stored), World(len(seats), procs)
    try:
        world = world_of(images, stored, present)
        if world != present:
            return plan_direct(generation, held, world, seats, objects)
        return RestorePlan(generation, _SameWorld(held, objects, seats).ranks(world))
    except UnrecoverableError as error:
        return error


def _plan_foreign(checkpoint: StoredCheckpoint) -> RestorePlan | UnrecoverableError:
    try:
        return plan_foreign(checkpoint)
    except UnrecoverableError as error:
        return error


class _SameWorld:
    """Planning one generation for the world that wrote it: every rank gets its own image, on its own node."""

    def __init__(self, held: Holdings, objects: Objects, seats: Mapping[int, str]) -> None:
        self._held, self._objects, self._seats = held, objects, seats
        shards = [image for image in held.images if image.kind == "shard"]
        self._files = {(image.node, image.local_rank, image.slot): image for image in shards}

    def ranks(self, world: World) -> tuple[RankRestore, ...]:
        """Where each rank's image comes from. Raises UnrecoverableError naming the rank that is missing.

        A damaged image that gives way to one from the store is then no source for others: they are planned anew.
        """
        held = self._held
        while True:
            ranks = tuple(self._restore(held, wanted) for wanted in world.wanted())
            torn = self._overwritten(ranks) & _read(ranks)
            if not torn:
                return ranks
            held = held.without(torn)

    def _restore(self, held: Holdings, wanted: Wanted) -> RankRestore:
        node, slot = self._seats[wanted.seat], self._slot(wanted)
        sound = held.sound(wanted)
        own = next((image for image in sound if image.node == node), None)
        other = next((image for image in sound if image.node != node), None)
        if own and (own.slot < GUEST_SLOT or other is None or slot == own.slot):
            return wanted.at(node, own.slot, "memory-local", own.length, node)
        if other:
            return wanted.at(node, slot, "memory-peer", other.length, other.node)
        try:
            return held.decode(wanted, (node,)).at(node, slot)
        except UnrecoverableError as error:
            restore = self._objects.restore(wanted, node, slot)
            if restore is not None:
                return restore
            copies = "only a damaged" if held.copies(wanted) else "no"
            raise UnrecoverableError(f"rank {wanted.rank} has {copies} image, and {error}") from error

    def _slot(self, wanted: Wanted) -> int:
        """Where an image that the node does not have is put.

        In the place of the node's damaged copy, which its keeper might read out instead; else in the generation's
        slot, unless that has another seat's image, which others may be about to read: then in a guest slot.
        """
        node = self._seats[wanted.seat]
        for image in self._held.copies(wanted):
            if image.node == node and image.bad_blocks:
                return image.slot
        slot = self._held.common_slot
        there = self._files.get((node, wanted.local_rank, slot))
        return slot if there is None or there.seat == wanted.seat else GUEST_SLOT + wanted.seat

    def _overwritten(self, ranks: Iterable[RankRestore]) -> set[_Copy]:
        """The copies whose files are replaced; a repair in place replaces none."""
        found = set()
        for restore in ranks:
            there = self._files.get((restore.node, restore.local_rank, restore.slot))
            if there and restore.source != "memory-local" and restore.holder != restore.node:
                found.add((there.node, there.seat, there.local_rank))
        return found


def _read(ranks: Iterable[RankRestore]) -> set[_Copy]:
    """The copies that others are fetched or decoded from."""
    found = set()
    for restore in ranks:
        if restore.holder:
            found.add((restore.holder, restore.seat, restore.local_rank))
        for source in restore.sources:
            if restore.group and source.kind == "shard":
                found.add((source.node, restore.group.seats[source.member], restore.local_rank))
    return found
