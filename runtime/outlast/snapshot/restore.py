"""What can be rebuilt from the images that keepers verified, and from where: a pure plan.

::

    inventories -> newest generation first -> each rank: a good image where it is needed    memory-local
                                                         a good image elsewhere             memory-peer
                                                         damaged or gone: decoded           memory-decode
                                              one rank without any -> the next older generation

No mark is trusted, only what was verified: a generation counts when every rank of the world has its image or gets it
from its group. ``candidates`` tells why a newer one was passed over. What is wire format here is JSON by ``to_json``
and ``from_json`` (which raises ValueError, KeyError or TypeError for anything else).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args

from outlast.errors import UnrecoverableError
from outlast.snapshot.erasure import Bad, GroupLayout, decode_ranges, parity_availability
from outlast.snapshot.identity import Generation

Json = dict[str, Any]
Kind = Literal["shard", "parity"]
Origin = Literal["memory-local", "memory-peer", "memory-decode"]


@dataclass(frozen=True)
class GroupInfo:
    """The redundancy group that a parity image belongs to.

    ``lengths`` are the bytes of the members' rank images of the same local rank, in the order of ``seats``; ``index``
    is the member's own place in it.
    """

    seats: tuple[int, ...]
    parity: int
    lengths: tuple[int, ...]
    index: int

    def layout(self) -> GroupLayout:
        """Where its parity lies. Raises ValueError when the numbers make no group."""
        if len(self.seats) != len(self.lengths):
            raise ValueError(f"{len(self.seats)} seats but {len(self.lengths)} lengths")
        return GroupLayout.of(self.lengths, self.parity)

    def to_json(self) -> Json:
        return {
            "seats": list(self.seats),
            "parity": self.parity,
            "lengths": list(self.lengths),
            "index": self.index,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GroupInfo:
        return cls(tuple(data["seats"]), int(data["parity"]), tuple(data["lengths"]), int(data["index"]))


@dataclass(frozen=True)
class HeldImage:
    """One sealed image on a node. ``bad_blocks`` are the file's 256 KiB blocks that do not match their checksums."""

    node: str
    seat: int
    local_rank: int
    slot: int
    generation: Generation
    kind: Kind
    length: int
    bad_blocks: tuple[int, ...] = ()
    group: GroupInfo | None = None

    def to_json(self) -> Json:
        return {
            "node": self.node,
            "seat": self.seat,
            "local_rank": self.local_rank,
            "slot": self.slot,
            "generation": str(self.generation),
            "kind": self.kind,
            "length": self.length,
            "bad_blocks": list(self.bad_blocks),
            "group": self.group and self.group.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeldImage:
        group = data.get("group")
        return cls(
            node=str(data["node"]),
            seat=int(data["seat"]),
            local_rank=int(data["local_rank"]),
            slot=int(data["slot"]),
            generation=Generation.parse(data["generation"]),
            kind=_kind(data["kind"]),
            length=int(data["length"]),
            bad_blocks=tuple(data["bad_blocks"]),
            group=None if group is None else GroupInfo.from_json(group),
        )


@dataclass(frozen=True)
class Inventory:
    """All that a node's keeper holds, verified."""

    node: str
    images: tuple[HeldImage, ...] = ()

    def to_json(self) -> Json:
        return {"node": self.node, "images": [image.to_json() for image in self.images]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inventory:
        return cls(str(data["node"]), tuple(HeldImage.from_json(image) for image in data["images"]))


@dataclass(frozen=True)
class DecodeSource:
    """An image to decode from: of ``member`` of the group, on ``node``, sound but for its ``bad_blocks``."""

    member: int
    node: str
    kind: Kind
    bad_blocks: tuple[int, ...] = ()

    def to_json(self) -> Json:
        return {
            "member": self.member,
            "node": self.node,
            "kind": self.kind,
            "bad_blocks": list(self.bad_blocks),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecodeSource:
        return cls(int(data["member"]), str(data["node"]), _kind(data["kind"]), tuple(data["bad_blocks"]))


@dataclass(frozen=True)
class RankRestore:
    """How one rank gets its image, of ``length`` bytes, into slot ``slot`` of ``node``, which has its seat now.

    ``holder`` is the node with a copy of the image: ``node`` itself for memory-local, another for memory-peer. For
    memory-decode that copy is damaged (fetch it unless it is the node's own, then repair its bad blocks) or, when
    ``holder`` is None, there is none; ``group`` (its ``index`` is the wanted member) and ``sources`` are given for
    decoding alone and include the damaged copy.
    """

    rank: int
    seat: int
    local_rank: int
    node: str
    slot: int
    source: Origin
    length: int
    holder: str | None
    group: GroupInfo | None = None
    sources: tuple[DecodeSource, ...] = ()

    def shard_availability(self) -> list[Bad | None]:
        """For ``decode_ranges``: the bad blocks of each member's image, None where it is lost."""
        held = {source.member: frozenset(source.bad_blocks) for source in self.sources if source.kind == "shard"}
        return [held.get(member) for member in range(len(self.group.seats) if self.group else 0)]

    def parity_availability(self) -> dict[tuple[int, int], Bad]:
        """For ``decode_ranges``: the parity chunks that are left, and their bad positions."""
        if self.group is None:
            return {}
        layout = self.group.layout()
        held: dict[tuple[int, int], Bad] = {}
        for source in self.sources:
            if source.kind == "parity":
                held.update(parity_availability(layout, source.member, source.bad_blocks))
        return held

    def to_json(self) -> Json:
        return {
            "rank": self.rank,
            "seat": self.seat,
            "local_rank": self.local_rank,
            "node": self.node,
            "slot": self.slot,
            "source": self.source,
            "length": self.length,
            "holder": self.holder,
            "group": self.group and self.group.to_json(),
            "sources": [source.to_json() for source in self.sources],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankRestore:
        group, holder = data["group"], data["holder"]
        return cls(
            rank=int(data["rank"]),
            seat=int(data["seat"]),
            local_rank=int(data["local_rank"]),
            node=str(data["node"]),
            slot=int(data["slot"]),
            source=_origin(data["source"]),
            length=int(data["length"]),
            holder=None if holder is None else str(holder),
            group=None if group is None else GroupInfo.from_json(group),
            sources=tuple(DecodeSource.from_json(source) for source in data["sources"]),
        )


@dataclass(frozen=True)
class RestorePlan:
    """The generation to go on from, and for each rank of the new attempt, in order, where its image comes from."""

    generation: Generation
    ranks: tuple[RankRestore, ...]

    def on_node(self, node: str) -> tuple[RankRestore, ...]:
        """The ranks that this node has to provide for."""
        return tuple(restore for restore in self.ranks if restore.node == node)

    def origins(self) -> dict[str, int]:
        """How many ranks come from where."""
        return dict(Counter(restore.source for restore in self.ranks))

    def to_json(self) -> Json:
        return {"generation": str(self.generation), "ranks": [restore.to_json() for restore in self.ranks]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RestorePlan:
        ranks = tuple(RankRestore.from_json(restore) for restore in data["ranks"])
        return cls(Generation.parse(data["generation"]), ranks)


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


def _kind(text: object) -> Kind:
    for kind in get_args(Kind):
        if text == kind:
            return cast(Kind, kind)
    raise ValueError(f"an image is a shard or parity, not {text!r}")


def _origin(text: object) -> Origin:
    for origin in get_args(Origin):
        if text == origin:
            return cast(Origin, origin)
    raise ValueError(f"a restore's source is memory-local, memory-peer or memory-decode, not {text!r}")
