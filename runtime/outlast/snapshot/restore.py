"""What can be rebuilt from the images that keepers verified, and from where: a pure plan.

::

    inventories -> newest generation first -> each rank: a good image where it is needed    memory-local
                                                         a good image elsewhere             memory-peer
                                                         damaged or gone: decoded           memory-decode
                                              one rank without any -> the next older generation

No mark is trusted, only what was verified: a generation counts when every rank of the world has its image or gets it
from its group. ``candidates`` tells why a newer one was passed over.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from outlast.errors import UnrecoverableError
from outlast.snapshot.erasure import decode_ranges
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import (
    DecodeSource,
    GroupInfo,
    HeldImage,
    Inventory,
    Kind,
    Origin,
    RankRestore,
    RestorePlan,
)


GUEST_SLOT = 100
"""Where a node keeps an image of an old world's seat for others to read: in slot GUEST_SLOT + that seat."""


def plan_restore(inventories: Iterable[Inventory], seats: Mapping[int, str], procs: int) -> RestorePlan | None:
    """The plan for the newest generation that all ranks can resume from, None when there is none.

    ``seats`` says which node has which seat in the new attempt, of ``procs`` ranks each.
    """
    plans = (found for _, found in candidates(inventories, seats, procs) if isinstance(found, RestorePlan))
    return next(plans, None)


def candidates(
    inventories: Iterable[Inventory], seats: Mapping[int, str], procs: int
) -> Iterator[tuple[Generation, RestorePlan | UnrecoverableError]]:
    """Every generation that anything is held of, newest first, with its plan or the reason why there is none."""
    by_generation: dict[Generation, list[HeldImage]] = defaultdict(list)
    for inventory in inventories:
        for image in inventory.images:
            by_generation[image.generation].append(image)
    for generation in sorted(by_generation, reverse=True):
        try:
            yield generation, _plan(generation, _Holdings(by_generation[generation]), seats, procs)
        except UnrecoverableError as error:
            yield generation, error


def lacking_parity(
    inventories: Iterable[Inventory], generation: Generation, group_seats: Sequence[int], parity: int, procs: int
) -> tuple[int, ...]:
    """Members (places in ``group_seats``) for which no sound parity image of this group and generation is held.

    These are the targets of an encoding that makes the generation fully protected again. A member needs one for each
    of its ``procs`` local ranks.
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


_GroupKey = tuple[tuple[int, ...], int, tuple[int, ...]]


class _Holdings:
    """The images of one generation, by what they are for."""

    def __init__(self, images: Sequence[HeldImage]) -> None:
        self.images = images

    @cached_property
    def shards(self) -> dict[tuple[int, int], list[HeldImage]]:
        """By (seat, local rank), the soundest first."""
        found: dict[tuple[int, int], list[HeldImage]] = defaultdict(list)
        for image in self.images:
            if image.kind == "shard":
                found[image.seat, image.local_rank].append(image)
        for copies in found.values():
            copies.sort(key=lambda image: (len(image.bad_blocks), image.node))
        return found

    @cached_property
    def groups(self) -> dict[tuple[int, int], dict[_GroupKey, list[HeldImage]]]:
        """By (seat, local rank), the parity images of each group that protects it, the soundest last."""
        found: dict[tuple[int, int], dict[_GroupKey, list[HeldImage]]] = defaultdict(lambda: defaultdict(list))
        parities = [image for image in self.images if image.kind == "parity"]
        for image in sorted(parities, key=lambda image: (-len(image.bad_blocks), image.node)):
            group = image.group
            for seat in group.seats if group else ():
                found[seat, image.local_rank][_key(group)].append(image)
        return found


def _key(group: GroupInfo | None) -> _GroupKey:
    return (group.seats, group.parity, group.lengths) if group else ((), 0, ())


def _plan(generation: Generation, held: _Holdings, seats: Mapping[int, str], procs: int) -> RestorePlan:
    """The plan for one generation. Raises UnrecoverableError naming what is missing."""
    for image in held.images:
        if image.seat not in seats or image.local_rank >= procs:
            where = f"seat {image.seat}, local rank {image.local_rank} (on {image.node})"
            raise UnrecoverableError(f"generation {generation} is of another world: it has {where}")
    slots = Counter(image.slot for image in held.images)
    slot = min(slots, key=lambda number: (-slots[number], number))
    places = [(seat, local_rank) for seat in sorted(seats) for local_rank in range(procs)]
    ranks = (_restore(held, _Place(seat * procs + r, seat, r, seats[seat], slot)) for seat, r in places)
    return RestorePlan(generation, tuple(ranks))


@dataclass(frozen=True)
class _Place:
    """Where a rank is in the new attempt, and the slot that its generation has."""

    rank: int
    seat: int
    local_rank: int
    node: str
    slot: int

    def restore(self, source: Origin, length: int, copy: HeldImage | None) -> RankRestore:
        """An image that lies on the node already stays in the slot where it is."""
        slot = copy.slot if copy and copy.node == self.node else self.slot
        holder = copy.node if copy else None
        return RankRestore(self.rank, self.seat, self.local_rank, self.node, slot, source, length, holder)


def _restore(held: _Holdings, place: _Place) -> RankRestore:
    """Where one rank's image comes from: the nearest sound copy, else its group."""
    copies = held.shards.get((place.seat, place.local_rank), [])
    sound = [image for image in copies if not image.bad_blocks]
    for image in sound:
        if image.node == place.node:
            return place.restore("memory-local", image.length, image)
    if sound:
        return place.restore("memory-peer", sound[0].length, sound[0])
    reasons = []
    for parities in held.groups.get((place.seat, place.local_rank), {}).values():
        try:
            return _decode(held, place, parities)
        except (UnrecoverableError, ValueError) as error:
            reasons.append(str(error))
    text = "; ".join(reasons) or "no parity of its group is held"
    raise UnrecoverableError(f"rank {place.rank} has {'only a damaged' if copies else 'no'} image, and {text}")


def _decode(held: _Holdings, place: _Place, parities: Sequence[HeldImage]) -> RankRestore:
    """Decoding with one group's parity. Raises UnrecoverableError beyond its reach, ValueError if it is no group."""
    seats, parity, lengths = _key(parities[0].group)
    group = GroupInfo(seats, parity, lengths, seats.index(place.seat))
    layout = group.layout()
    chosen: dict[tuple[int, Kind], HeldImage] = {}
    for member, seat in enumerate(seats):
        copies = [c for c in held.shards.get((seat, place.local_rank), []) if c.length == lengths[member]]
        own = [copy for copy in copies if seat == place.seat and copy.node == place.node]
        if copies:
            chosen[member, "shard"] = (own or copies)[0]
    for image in parities:
        if image.group is not None:
            chosen[image.group.index, "parity"] = image
    sources = tuple(DecodeSource(m, image.node, kind, image.bad_blocks) for (m, kind), image in chosen.items())
    damaged = chosen.get((group.index, "shard"))
    restore = replace(place.restore("memory-decode", lengths[group.index], damaged), group=group, sources=sources)
    for _ in decode_ranges(layout, group.index, restore.shard_availability(), restore.parity_availability()):
        pass
    return restore
