"""Restoring a generation of another world, or of another job: where every new rank can read the old images. Pure.

::

    each image of the old world:  a sound copy on any living node      memory-peer
                                  damaged on a node with a seat        memory-decode, repaired where it lies
                                  damaged elsewhere, or gone           memory-decode, as a guest of a node with a seat
                                  beyond its group, but in the store   object

Nothing but guest slots is written, and a guest slot belongs to one old seat: no image is lost by making another.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from outlast.errors import UnrecoverableError
from outlast.snapshot.holdings import Holdings, Objects, Wanted, World
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import GUEST_SLOT, HeldImage, RankRestore, RestorePlan
from outlast.snapshot.stored import StoredCheckpoint


def plan_direct(
    generation: Generation, held: Holdings, world: World, seats: Mapping[int, str], objects: Objects
) -> RestorePlan:
    """The plan for one generation that ``world`` wrote. Raises UnrecoverableError naming the rank that is missing.

    ``seats``: which node has which seat (0, 1, ...) now: these nodes alone make images. Images are read wherever they
    are held.
    """
    hosts = _Hosts(seats, world, held.images)
    ranks = tuple(_where(held, wanted, hosts, objects) for wanted in world.wanted())
    return RestorePlan(generation, ranks, direct=True)


class _Hosts:
    """The nodes with seats, and how many guests that can be read each has."""

    def __init__(self, seats: Mapping[int, str], old: World, images: Iterable[HeldImage]) -> None:
        self.nodes = frozenset(seats.values())
        self._seats, self._old = seats, old
        self._guests = Counter(image.node for image in images if image.kind == "shard" and image.slot >= GUEST_SLOT)
        self._heap = [(self._guests[node], node) for node in self.nodes]
        heapq.heapify(self._heap)

    def take(self, seat: int, unfit: Collection[str]) -> str | None:
        """The node with the fewest guests; it has one more now, of old ``seat``. None: all are unfit.

        Of several the one whose ranks need most of that image, where shards are cut by rank, else the first by name.
        """
        found = self._fewest(unfit)
        if found is not None:
            near = self._seats[(2 * seat + 1) * len(self._seats) // (2 * self._old.nodes)]
            found = near if near not in unfit and self._guests[near] == self._guests[found] else found
            self._guests[found] += 1
            heapq.heappush(self._heap, (self._guests[found], found))
        return found

    def _fewest(self, unfit: Collection[str]) -> str | None:
        passed = []
        found = None
        while self._heap and found is None:
            guests, node = heapq.heappop(self._heap)
            if guests == self._guests[node]:  # else it has got another since
                found = None if node in unfit else node
                passed.append((guests, node))
        for item in passed:
            heapq.heappush(self._heap, item)
        return found


def _where(held: Holdings, wanted: Wanted, hosts: _Hosts, objects: Objects) -> RankRestore:
    """Where one old rank's image can be read."""
    sound = sorted(held.sound(wanted), key=lambda image: image.node not in hosts.nodes)
    if sound:
        image = sound[0]
        return wanted.at(image.node, image.slot, "memory-peer", image.length, image.node)
    try:
        return _decoded(held, wanted, hosts)
    except UnrecoverableError as error:
        restore = objects.restore(wanted)
        if restore is not None:
            return restore
        copies = "only a damaged" if held.copies(wanted) else "no"
        raise UnrecoverableError(f"rank {wanted.rank} of the old world has {copies} image, and {error}") from error


def _decoded(held: Holdings, wanted: Wanted, hosts: _Hosts) -> RankRestore:
    """A guest is made only where no copy of the same name lies, which its keeper might read out instead."""
    decoding = held.decode(wanted, hosts.nodes)
    if decoding.damaged and decoding.damaged.node in hosts.nodes:
        return decoding.at(decoding.damaged.node, decoding.damaged.slot)
    node = hosts.take(wanted.seat, {image.node for image in held.copies(wanted)})
    if node is None:
        raise UnrecoverableError("every node with a seat has a copy that is no use")
    return decoding.at(node, GUEST_SLOT + wanted.seat)


def plan_foreign(checkpoint: StoredCheckpoint) -> RestorePlan:
    """Another job's checkpoint: read from the store alone. Raises UnrecoverableError when it lacks an image."""
    objects, ranks = Objects(checkpoint), []
    for wanted in World(checkpoint.nodes, checkpoint.procs).wanted():
        restore = objects.restore(wanted)
        if restore is None:
            raise UnrecoverableError(f"the checkpoint at {checkpoint.url} has no image of rank {wanted.rank}")
        ranks.append(restore)
    return RestorePlan(checkpoint.generation, tuple(ranks), direct=True)
