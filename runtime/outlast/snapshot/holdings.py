"""What is left of one generation, sorted by what it is good for: sound copies, damaged ones, parity. Pure.

A keeper reads out an image by its name (kind, local rank, generation, seat), so of two copies on one node only the one
that it finds first counts. A copy in a guest slot is as good as any other, but is used after those that lie where they
belong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from outlast.errors import UnrecoverableError
from outlast.snapshot.erasure import decode_ranges
from outlast.snapshot.inventory import GUEST_SLOT, DecodeSource, GroupInfo, HeldImage, Kind, Origin, RankRestore
from outlast.snapshot.stored import StoredCheckpoint


@dataclass(frozen=True)
class Wanted:
    """One rank's image, named by its place in the world that wrote it."""

    rank: int
    seat: int
    local_rank: int

    def at(self, node: str, slot: int, source: Origin, length: int, holder: str | None = None) -> RankRestore:
        """The image in that slot of that node."""
        return RankRestore(self.rank, self.seat, self.local_rank, node, slot, source, length, holder)


@dataclass(frozen=True)
class World:
    """The ranks of an attempt: ``nodes`` seats of ``procs`` each."""

    nodes: int
    procs: int

    def __str__(self) -> str:
        return f"{self.nodes} nodes of {self.procs} ranks"

    def wanted(self) -> Iterator[Wanted]:
        """Every rank's image, in the order of ranks."""
        for rank in range(self.nodes * self.procs):
            yield Wanted(rank, *divmod(rank, self.procs))


def world_of(images: Sequence[HeldImage], stored: StoredCheckpoint | None, present: World) -> World:
    """The world that wrote a generation. Raises UnrecoverableError when what is left of it does not fit one.

    A checkpoint says it; headers of images say how many ranks there were, and old ones nothing: then it is the present
    world. Where only the number of ranks is known and not all nodes have left a trace, the present ranks a node are
    taken; this is of no consequence, since a generation with an image of every rank leaves a trace of every seat.
    """
    said = {image.world for image in images if image.world} | ({stored.world} if stored else set())
    if len(said) > 1:
        raise UnrecoverableError(f"its images are of different worlds: {sorted(said)} ranks")
    world = World(stored.nodes, stored.procs) if stored else _shape(images, said, present)
    for image in images:
        seat = max(_seats(image))
        if seat >= world.nodes or image.local_rank >= world.procs:
            where = f"seat {seat}, local rank {image.local_rank} (on {image.node})"
            raise UnrecoverableError(f"it is of another world than {world}: it has {where}")
    return world


def _seats(image: HeldImage) -> tuple[int, ...]:
    """The seats that an image tells of."""
    return (image.seat, *(image.group.seats if image.group else ()))


def _shape(images: Sequence[HeldImage], said: Collection[int], present: World) -> World:
    if not said:
        return present
    (ranks,) = said
    seen = World(max(max(_seats(image)) for image in images) + 1, max(image.local_rank for image in images) + 1)
    guess = World(ranks // present.procs, present.procs)
    fits = guess.nodes >= seen.nodes and guess.procs >= seen.procs and guess.nodes * guess.procs == ranks
    if fits and seen.nodes * seen.procs != ranks:
        return guess
    return World(-(-ranks // seen.procs), seen.procs)


class Objects:
    """A generation's images in the store; none when there is no checkpoint of it."""

    def __init__(self, checkpoint: StoredCheckpoint | None) -> None:
        self._url = checkpoint.url if checkpoint else ""
        images = checkpoint.images if checkpoint else ()
        self._images = {(image.seat, image.local_rank): image for image in images}

    def restore(self, wanted: Wanted, node: str = "", slot: int = 0) -> RankRestore | None:
        """The image as read from the store, into that slot of that node if one is given; None when it is not there."""
        image = self._images.get((wanted.seat, wanted.local_rank))
        if image is None:
            return None
        there = wanted.at(node, slot, "object", image.size)
        return replace(there, url=self._url, key=image.key, checksum=image.checksum)


@dataclass(frozen=True)
class Decoding:
    """How an image is rebuilt from its group; ``damaged`` is the copy whose bad blocks are all that is rebuilt."""

    wanted: Wanted
    group: GroupInfo
    sources: tuple[DecodeSource, ...]
    damaged: HeldImage | None

    def at(self, node: str, slot: int) -> RankRestore:
        """Done on that node, into that slot, or where the damaged copy lies if that is on the node."""
        if self.damaged and self.damaged.node == node:
            slot = self.damaged.slot
        holder = self.damaged.node if self.damaged else None
        restore = self.wanted.at(node, slot, "memory-decode", self.group.lengths[self.group.index], holder)
        return replace(restore, group=self.group, sources=self.sources)

    def check(self) -> None:
        """Raises UnrecoverableError when too little is left for it."""
        trial = self.at("", 0)
        shards, parity = trial.shard_availability(), trial.parity_availability()
        for _ in decode_ranges(self.group.layout(), self.group.index, shards, parity):
            pass


_GroupKey = tuple[tuple[int, ...], int, tuple[int, ...]]


class Holdings:
    """The images of one generation on all nodes that can be read from."""

    def __init__(self, images: Iterable[HeldImage]) -> None:
        self.images = tuple(_findable(images))

    def without(self, copies: Collection[tuple[str, int, int]]) -> Holdings:
        """The same less the rank images with these (node, seat, local rank)."""
        lost = set(copies)
        return Holdings(i for i in self.images if i.kind != "shard" or (i.node, i.seat, i.local_rank) not in lost)

    @cached_property
    def common_slot(self) -> int:
        """The slot, not a guest's, that most images have; 0 when there are none."""
        slots = Counter(image.slot for image in self.images if image.slot < GUEST_SLOT)
        return min(slots, key=lambda number: (-slots[number], number), default=0)

    @cached_property
    def shards(self) -> dict[tuple[int, int], list[HeldImage]]:
        """By (seat, local rank), the soundest first, guests after others."""
        found: dict[tuple[int, int], list[HeldImage]] = defaultdict(list)
        for image in self.images:
            if image.kind == "shard":
                found[image.seat, image.local_rank].append(image)
        for copies in found.values():
            copies.sort(key=lambda image: (len(image.bad_blocks), image.slot >= GUEST_SLOT, image.node))
        return found

    def copies(self, wanted: Wanted) -> list[HeldImage]:
        """All copies of an image, the soundest first."""
        return self.shards.get((wanted.seat, wanted.local_rank), [])

    def sound(self, wanted: Wanted) -> list[HeldImage]:
        """Its copies without a bad block, guests last."""
        return [image for image in self.copies(wanted) if not image.bad_blocks]

    @cached_property
    def _groups(self) -> dict[tuple[int, int], dict[_GroupKey, list[HeldImage]]]:
        """By (seat, local rank), the parity images of each group that protects it, the soundest last."""
        found: dict[tuple[int, int], dict[_GroupKey, list[HeldImage]]] = defaultdict(lambda: defaultdict(list))
        parities = [image for image in self.images if image.kind == "parity"]
        for image in sorted(parities, key=lambda image: (-len(image.bad_blocks), image.node)):
            group = image.group
            for seat in group.seats if group else ():
                found[seat, image.local_rank][_key(group)].append(image)
        return found

    def decode(self, wanted: Wanted, near: Collection[str]) -> Decoding:
        """How to rebuild an image of which there is no sound copy; a damaged one on a node of ``near`` comes first.

        Raises UnrecoverableError that says why it cannot be done.
        """
        reasons = []
        for (seats, parity, lengths), parities in self._groups.get((wanted.seat, wanted.local_rank), {}).items():
            group = GroupInfo(seats, parity, lengths, seats.index(wanted.seat))
            try:
                return self._from_group(wanted, group, parities, near)
            except (UnrecoverableError, ValueError) as error:
                reasons.append(str(error))
        raise UnrecoverableError("; ".join(reasons) or "no parity of its group is held")

    def _from_group(
        self, wanted: Wanted, group: GroupInfo, parities: Sequence[HeldImage], near: Collection[str]
    ) -> Decoding:
        """With one group's parity. Raises UnrecoverableError beyond its reach, ValueError when it is no group."""
        group.layout()
        copies = self._of_length(wanted.seat, wanted.local_rank, group.lengths[group.index])
        nearest: list[HeldImage | None] = [*sorted(copies, key=lambda image: image.node not in near)]
        reasons = []
        for damaged in nearest or [None]:
            decoding = Decoding(wanted, group, self._sources(wanted, group, parities, damaged), damaged)
            try:
                decoding.check()
            except UnrecoverableError as error:
                reasons.append(str(error))
            else:
                return decoding
        raise UnrecoverableError("; ".join(dict.fromkeys(reasons)))

    def _of_length(self, seat: int, local_rank: int, length: int) -> list[HeldImage]:
        return [image for image in self.shards.get((seat, local_rank), []) if image.length == length]

    def _sources(
        self, wanted: Wanted, group: GroupInfo, parities: Sequence[HeldImage], damaged: HeldImage | None
    ) -> tuple[DecodeSource, ...]:
        chosen: dict[tuple[int, Kind], HeldImage] = {}
        for member, (seat, length) in enumerate(zip(group.seats, group.lengths, strict=True)):
            copies = self._of_length(seat, wanted.local_rank, length)
            copy = damaged if seat == wanted.seat else next(iter(copies), None)
            if copy is not None:
                chosen[member, "shard"] = copy
        for image in parities:
            if image.group is not None:
                chosen[image.group.index, "parity"] = image
        return tuple(DecodeSource(m, image.node, kind, image.bad_blocks) for (m, kind), image in chosen.items())


def _key(group: GroupInfo | None) -> _GroupKey:
    return (group.seats, group.parity, group.lengths) if group else ((), 0, ())


def _findable(images: Iterable[HeldImage]) -> Iterator[HeldImage]:
    """Of the copies with one name on one node the one that its keeper finds: the first by file name."""
    named: dict[tuple[str, str, int, int], HeldImage] = {}
    for image in images:
        name = (image.node, image.kind, image.seat, image.local_rank)
        other = named.get(name)
        if other is None or f"{image.slot}." < f"{other.slot}.":
            named[name] = image
    yield from named.values()
