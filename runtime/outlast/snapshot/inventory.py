"""What keepers say they hold, and the plan that is made of it: values that go over the wire. Pure.

JSON by ``to_json`` and ``from_json`` (which raises ValueError, KeyError or TypeError for anything else).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from outlast.snapshot.erasure import Bad, GroupLayout, parity_availability
from outlast.snapshot.identity import Generation

Json = dict[str, Any]
Kind = Literal["shard", "parity"]
Origin = Literal["memory-local", "memory-peer", "memory-decode", "object"]

GUEST_SLOT = 100
"""Where a node keeps an image of a seat that it does not have, for others to read: in slot GUEST_SLOT + that seat."""


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
    world: int = 0
    """Ranks of the attempt that wrote it; 0: the header does not say."""

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
            "world": self.world,
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
            world=int(data.get("world", 0)),
        )


@dataclass(frozen=True)
class Inventory:
    """All that a node's keeper holds, verified."""

    node: str
    images: tuple[HeldImage, ...] = ()

    def without(self, generations: Collection[Generation]) -> Inventory:
        """The images of all other generations."""
        return Inventory(self.node, tuple(image for image in self.images if image.generation not in generations))

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
    decoding alone and include the damaged copy. For object ``url`` and ``key`` say where it is in the store, and
    ``checksum`` which image its manifest means. The slot may be a guest's: an image that lies in one stays there, and
    so does one whose slot holds another seat's image.

    In a direct plan ``rank``, ``seat`` and ``local_rank`` are those of the old world, ``node`` is where ranks read it
    ("" for object), and a memory-peer is read where it lies: ``holder`` is ``node``.
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
    url: str | None = None
    key: str | None = None
    checksum: str | None = None

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
            "url": self.url,
            "key": self.key,
            "checksum": self.checksum,
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
            url=data.get("url"),
            key=data.get("key"),
            checksum=data.get("checksum"),
        )


@dataclass(frozen=True)
class RestorePlan:
    """The generation to go on from, and where its images are.

    ``direct`` False: the world is the one that wrote it, and ``ranks`` has for each rank of the new attempt, in order,
    where its own image comes from. ``direct`` True: the world is another one (or the generation another job's);
    ``ranks`` has one item for each image of the *old* world, in the order of old ranks, and says where ranks read it:
    from the keeper of ``node``, in whose memory it is or is decoded into, or, for object, from the store.
    """

    generation: Generation
    ranks: tuple[RankRestore, ...]
    direct: bool = False

    def on_node(self, node: str) -> tuple[RankRestore, ...]:
        """The images that this node has to provide."""
        return tuple(restore for restore in self.ranks if restore.node == node)

    @property
    def kept_slot(self) -> int | None:
        """The slot that has this generation once the plan is done, and must stay as it is until the next commit.

        It is the one of most images, guests apart; None when all are guests or read from the store alone.
        """
        images = (restore for restore in self.ranks if not (self.direct and restore.source == "object"))
        slots = Counter(restore.slot for restore in images if restore.slot < GUEST_SLOT)
        return min(slots, key=lambda number: (-slots[number], number)) if slots else None

    def origins(self) -> dict[str, int]:
        """How many images (one for each rank of the world that wrote them) come from where."""
        return dict(Counter(restore.source for restore in self.ranks))

    def to_json(self) -> Json:
        ranks = [restore.to_json() for restore in self.ranks]
        return {"generation": str(self.generation), "ranks": ranks, "direct": self.direct}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RestorePlan:
        ranks = tuple(RankRestore.from_json(restore) for restore in data["ranks"])
        return cls(Generation.parse(data["generation"]), ranks, bool(data.get("direct", False)))


def _kind(text: object) -> Kind:
    for kind in get_args(Kind):
        if text == kind:
            return cast(Kind, kind)
    raise ValueError(f"an image is a shard or parity, not {text!r}")


def _origin(text: object) -> Origin:
    for origin in get_args(Origin):
        if text == origin:
            return cast(Origin, origin)
    raise ValueError(f"a restore's source is one of {', '.join(get_args(Origin))}, not {text!r}")
