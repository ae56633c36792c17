"""Where the parity of a redundancy group lies, and what to read in order to rebuild what is gone. Pure: no I/O.

A group has n members, each with one image. Images are cut into k = n - m chunks; a stripe takes one chunk each from k
members and adds m parity chunks on the other m, so that any k of its n chunks give all of them. There are n stripes
and the parity rotates as in RAID-5: every member stores its own k chunks and m parity chunks, and encodes one stripe.

::

    n = 4, m = 2        member 0    member 1    member 2    member 3
    stripe 0            row 0       row 1       data 0      data 1
    stripe 1            data 1      row 0       row 1       data 0
    stripe 2            data 0      data 1      row 0       row 1
    stripe 3            row 1       data 0      data 1      row 0

Within a stripe the chunks have a *codeword index*: 0..k-1 data, k..k+m-1 parity rows. Member i's j-th chunk, its file
bytes [j * chunk, (j + 1) * chunk), lies in the j-th stripe (ascending) in which i holds data. Images are shorter than
k * chunk; the bytes beyond their own length count as zeros, known to all even when the image is lost.

``decode_ranges`` and its kin say what a keeper has to do; they decide in blocks, so that a corrupt block counts as lost
for its own position only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from outlast.errors import UnrecoverableError

BLOCK = 256 * 1024
"""Bytes that one checksum covers: the unit in which an image is found good or bad."""


def parity_entry(stripe: int, row: int) -> str:
    """The name of a parity chunk within a parity image."""
    return f"stripe{stripe}.row{row}"


@dataclass(frozen=True)
class GroupLayout:
    """The geometry of one redundancy group.

    ``n`` members of which ``m`` (1 <= m < n) may be lost; ``length`` is the size of the longest member image in bytes,
    ``lengths`` the size of each (empty: all are ``length``). Raises ValueError when these make no group.
    """

    n: int
    m: int
    length: int
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.m < self.n:
            raise ValueError(f"a group of {self.n} cannot have parity {self.m}: 1 to {self.n - 1} is possible")
        if self.length < 1:
            raise ValueError(f"the longest image of a group has {self.length} bytes: nothing to protect")
        if self.lengths and (len(self.lengths) != self.n or max(self.lengths) > self.length or min(self.lengths) < 0):
            raise ValueError(f"lengths {self.lengths} do not fit a group of {self.n} images up to {self.length} bytes")

    @classmethod
    def of(cls, lengths: Sequence[int], m: int) -> GroupLayout:
        """The layout of members with images of these lengths (bytes)."""
        return cls(len(lengths), m, max(lengths), tuple(lengths))

    @property
    def k(self) -> int:
        """Data chunks of a stripe, and chunks of an image."""
        return self.n - self.m

    @property
    def chunk(self) -> int:
        """Bytes of a chunk: a multiple of BLOCK, so that file blocks and chunk blocks coincide."""
        return -(-self.length // (self.k * BLOCK)) * BLOCK

    def length_of(self, member: int) -> int:
        """Bytes of the member's own image."""
        return self.lengths[member] if self.lengths else self.length

    def data_members(self, stripe: int) -> list[int]:
        """The members whose chunks are codeword indices 0..k-1 of the stripe, in that order."""
        return [(stripe + self.m + i) % self.n for i in range(self.k)]

    def parity_member(self, stripe: int, row: int) -> int:
        """Who holds a parity row (codeword index k + row). Row 0's holder, member ``stripe``, encodes the stripe."""
        return (stripe + row) % self.n

    def index_of(self, member: int, stripe: int) -> int:
        """The codeword index of the member's chunk in the stripe, be it data or parity."""
        turn = (member - stripe) % self.n
        return turn - self.m if turn >= self.m else self.k + turn

    def member_of(self, stripe: int, index: int) -> int:
        """The inverse of ``index_of``: who holds a codeword index of the stripe."""
        return (stripe + self.m + index) % self.n

    def chunk_of(self, member: int, stripe: int) -> int | None:
        """Which chunk of the member's image lies in the stripe, None where it holds parity."""
        slots = [slot for slot, _ in self.parity_slots(member)]
        return None if stripe in slots else stripe - sum(slot < stripe for slot in slots)

    def stripes_of(self, member: int) -> list[int]:
        """The k stripes, ascending, in which the member's chunks 0..k-1 lie."""
        return [stripe for stripe in range(self.n) if self.index_of(member, stripe) < self.k]

    def parity_slots(self, member: int) -> list[tuple[int, int]]:
        """The m (stripe, row) whose parity the member holds: the order of the entries of its parity image."""
        return sorted(((member - row) % self.n, row) for row in range(self.m))

    def data_bytes(self, member: int, stripe: int) -> int:
        """How many bytes of the member's chunk in the stripe exist; the rest are zeros. 0 where it holds parity."""
        chunk = self.chunk_of(member, stripe)
        return 0 if chunk is None else min(max(self.length_of(member) - chunk * self.chunk, 0), self.chunk)


Bad = Set[int]
"""Numbers of bad blocks: of an image file's blocks, or of a chunk's."""

ShardAvailability = Sequence[Bad | None]
"""For each member the bad blocks of its image file, or None when the image is lost."""

ParityAvailability = Mapping[tuple[int, int], Bad]
"""For each (stripe, row) that is held the bad BLOCK positions *within the chunk*; what is lost is absent."""


def chunk_positions(bad_blocks: Collection[int], offset: int, chunk: int) -> frozenset[int]:
    """Which BLOCK positions of a chunk lying at ``offset`` of a file are touched by the file's bad blocks."""
    hit: set[int] = set()
    for block in bad_blocks:
        start, stop = block * BLOCK - offset, (block + 1) * BLOCK - offset
        if stop > 0 and start < chunk:
            hit.update(range(max(start, 0) // BLOCK, (min(stop, chunk) - 1) // BLOCK + 1))
    return frozenset(hit)


def parity_availability(
    layout: GroupLayout, member: int, bad_blocks: Collection[int], data_offset: int = 4096
) -> dict[tuple[int, int], Bad]:
    """What one parity image offers: its chunks follow one another in the order of ``parity_slots``.

    ``data_offset`` is the file offset of the first. The answer is the same for all offsets below BLOCK, so that who
    knows only the bad blocks need not read the header.
    """
    offsets = [data_offset + i * layout.chunk for i in range(layout.m)]
    slots = layout.parity_slots(member)
    return {slot: chunk_positions(bad_blocks, at, layout.chunk) for slot, at in zip(slots, offsets, strict=True)}


@dataclass(frozen=True)
class Part:
    """One chunk's share of a range: what to read, or where to write.

    ``index`` is the codeword index. ``offset`` counts in the member's image file for a shard, within the chunk (entry
    ``stripe{s}.row{p}``) for parity; ``zeros`` lie beyond the end of a shard and need no read.
    """

    index: int
    member: int
    kind: Literal["shard", "parity", "zeros"]
    offset: int


@dataclass(frozen=True)
class DecodeRange:
    """Bytes [start, stop) of a stripe's chunks that are rebuilt alike: k sources in, ``wanted`` out."""

    stripe: int
    start: int
    stop: int
    sources: tuple[Part, ...]
    wanted: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of each part."""
        return self.stop - self.start

    def pieces(self, limit: int) -> Iterator[DecodeRange]:
        """The same in consecutive pieces of at most ``limit`` (> 0) bytes, for bounded memory."""
        for start in range(self.start, self.stop, limit):
            ahead = start - self.start
            yield replace(
                self,
                start=start,
                stop=min(start + limit, self.stop),
                sources=tuple(replace(part, offset=part.offset + ahead) for part in self.sources),
                wanted=tuple(replace(part, offset=part.offset + ahead) for part in self.wanted),
            )


def decode_ranges(
    layout: GroupLayout, wanted_member: int, shards: ShardAvailability, parity: ParityAvailability
) -> Iterator[DecodeRange]:
    """What rebuilds the image of a member: all of it when ``shards`` says it is lost, else its bad blocks alone.

    Ranges come in file order and merge consecutive blocks that need the same sources. Good blocks of the wanted image
    are not in them: fetch a damaged image as it is, then repair it. Raises UnrecoverableError, while iterating, at the
    first block of which fewer than k chunks are left.
    """
    for stripe in layout.stripes_of(wanted_member):
        yield from _stripe_ranges(layout, stripe, (layout.index_of(wanted_member, stripe),), shards, parity)


def parity_ranges(
    layout: GroupLayout, stripe: int, rows: Collection[int], shards: ShardAvailability, parity: ParityAvailability
) -> Iterator[DecodeRange]:
    """What rebuilds parity rows of a stripe: whole when ``parity`` lacks them, else their bad positions alone.

    Raises UnrecoverableError like ``decode_ranges``.
    """
    yield from _stripe_ranges(layout, stripe, tuple(layout.k + row for row in sorted(rows)), shards, parity)


def encode_ranges(layout: GroupLayout, stripe: int) -> Iterator[DecodeRange]:
    """What makes all parity rows of a stripe out of whole shards; the sources are codeword indices 0..k-1."""
    healthy: list[Bad | None] = [frozenset()] * layout.n
    yield from parity_ranges(layout, stripe, range(layout.m), healthy, {})


@dataclass(frozen=True)
class _Chunk:
    """What is left of one chunk of a stripe. ``bad`` holds positions, None when lost; ``real`` bytes precede zeros."""

    index: int
    member: int
    kind: Literal["shard", "parity"]
    base: int
    real: int
    bad: Bad | None

    def cuts(self) -> Iterator[int]:
        """Offsets within the chunk at which its state may change."""
        yield self.real
        for position in self.bad or ():
            yield position * BLOCK
            yield (position + 1) * BLOCK

    def at(self, offset: int) -> Part | None:
        """What it offers there, None if nothing."""
        if offset >= self.real:
            return Part(self.index, self.member, "zeros", self.base + offset)
        return None if self.bad is None or offset // BLOCK in self.bad else self.part(offset)

    def part(self, offset: int) -> Part:
        return Part(self.index, self.member, self.kind, self.base + offset)


def _stripe_chunks(
    layout: GroupLayout, stripe: int, shards: ShardAvailability, parity: ParityAvailability
) -> list[_Chunk]:
    """The stripe's chunks in the order of their codeword indices."""
    chunks = []
    for index, member in enumerate(layout.data_members(stripe)):
        base = (layout.chunk_of(member, stripe) or 0) * layout.chunk
        blocks = shards[member]
        bad = None if blocks is None else chunk_positions(blocks, base, layout.chunk)
        chunks.append(_Chunk(index, member, "shard", base, layout.data_bytes(member, stripe), bad))
    for row in range(layout.m):
        member = layout.parity_member(stripe, row)
        chunks.append(_Chunk(layout.k + row, member, "parity", 0, layout.chunk, parity.get((stripe, row))))
    return chunks


def _stripe_ranges(
    layout: GroupLayout, stripe: int, wanted: tuple[int, ...], shards: ShardAvailability, parity: ParityAvailability
) -> Iterator[DecodeRange]:
    """The ranges in which one of the wanted codeword indices is missing, merged."""
    chunks = _stripe_chunks(layout, stripe, shards, parity)
    cuts = {0, layout.chunk}.union(*(chunk.cuts() for chunk in chunks))
    pending: DecodeRange | None = None
    for start, stop in pairwise(sorted(cut for cut in cuts if cut <= layout.chunk)):
        step = _range_at(layout, stripe, start, stop, wanted, chunks)
        if pending and step and pending.stop == start and _pattern(pending) == _pattern(step):
            pending = replace(pending, stop=stop)
            continue
        if pending:
            yield pending
        pending = step
    if pending:
        yield pending


def _pattern(step: DecodeRange) -> tuple[object, ...]:
    return tuple((part.index, part.kind) for part in step.sources + step.wanted)


def _range_at(
    layout: GroupLayout, stripe: int, start: int, stop: int, wanted: tuple[int, ...], chunks: Sequence[_Chunk]
) -> DecodeRange | None:
    """The range [start, stop), in which no chunk changes its state; None when nothing wanted is missing there."""
    offers = [chunk.at(start) for chunk in chunks]
    missing = tuple(chunks[index].part(start) for index in wanted if offers[index] is None)
    if not missing:
        return None
    left = sorted((part for part in offers if part is not None), key=lambda part: (part.kind != "zeros", part.index))
    if len(left) < layout.k:
        gone = ", ".join(f"{chunk.kind} of member {chunk.member}" for chunk in chunks if chunk.at(start) is None)
        first = missing[0]
        raise UnrecoverableError(
            f"block {first.offset // BLOCK} of the {first.kind} of member {first.member} (stripe {stripe}, byte {start}"
            f" of the chunk) cannot be rebuilt: {len(left)} of {layout.k} chunks needed are left; lost: {gone}"
        )
    sources = tuple(sorted(left[: layout.k], key=lambda part: part.index))
    return DecodeRange(stripe, start, stop, sources, missing)
