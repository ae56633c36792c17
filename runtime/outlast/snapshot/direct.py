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
from collections.abc import Collection, Iterable

from outlast.errors import UnrecoverableError
from outlast.snapshot.holdings import Holdings, Objects, Wanted, World
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import GUEST_SLOT, HeldImage, RankRestore, RestorePlan
from outlast.snapshot.stored import StoredCheckpoint


def plan_direct(
    generation: Generation, held: Holdings, world: World, nodes: Collection[str], objects: Objects
) -> RestorePlan:
    """The plan for one generation that ``world`` wrote. Raises UnrecoverableError naming the rank that is missing.

    ``nodes`` are those that have a seat now: they alone make images. Images are read wherever they are held.
    """
    hosts = _Hosts(nodes, held.images)
    ranks = tuple(_where(held, wanted, hosts, objects) for wanted in world.wanted())
    return RestorePlan(generation, ranks, direct=True)


class _Hosts:
    """The nodes with seats, and how many guests that can be read each has."""

    def __init__(self, nodes: Collection[str], images: Iterable[HeldImage]) -> None:
        self.nodes = frozenset(nodes)
        guests = Counter(image.node for image in images if image.kind == "shard" and image.slot >= GUEST_SLOT)
        self._heap = [(guests[node], node) for node in self.nodes]
        heapq.heapify(self._heap)

    def take(self, unfit: Collection[str]) -> str | None:
        """The node with the fewest guests, the first by name; it has one more now. None: all are unfit."""
        passed = []
        found = None
        while self._heap and found is None:
            guests, node = heapq.heappop(self._heap)
            found = None if node in unfit else node
            passed.append((guests + (found is not None), node))
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
    node = hosts.take({image.node for image in held.copies(wanted)})
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
