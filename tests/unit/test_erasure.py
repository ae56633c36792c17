"""The layout of a redundancy group, and what its ranges rebuild when they are carried out on arrays."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.errors import UnrecoverableError
from outlast.snapshot import kernel
from outlast.snapshot.codec import Codec
from outlast.snapshot.erasure import (
    BLOCK,
    Bad,
    DecodeRange,
    GroupLayout,
    Part,
    chunk_positions,
    decode_ranges,
    encode_ranges,
    parity_availability,
    parity_ranges,
)

Bytes = npt.NDArray[np.uint8]
shapes = st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@dataclass
class Group:
    """A group in memory: images and parity chunks as arrays, with what has been done to them."""

    layout: GroupLayout
    images: list[Bytes]
    parity: dict[tuple[int, int], Bytes]
    shards_left: list[Bad | None]
    parity_left: dict[tuple[int, int], Bad]

    @classmethod
    def encoded(cls, lengths: list[int], m: int, seed: int = 0) -> Group:
        layout, rng = GroupLayout.of(lengths, m), np.random.default_rng(seed)
        images = [rng.integers(0, 256, length, np.uint8) for length in lengths]
        slots = [(stripe, row) for stripe in range(layout.n) for row in range(m)]
        parity = {slot: np.full(layout.chunk, 0xA5, np.uint8) for slot in slots}
        group = cls(layout, images, parity, [frozenset()] * layout.n, {slot: frozenset() for slot in slots})
        for stripe in range(layout.n):
            for step in encode_ranges(layout, stripe):
                group.execute(step)
        return group

    def at(self, stripe: int, part: Part, nbytes: int) -> Bytes:
        whole = self.images[part.member] if part.kind == "shard" else self.parity[stripe, part.index - self.layout.k]
        assert 0 <= part.offset <= part.offset + nbytes <= whole.size, "a range reaches beyond its file"
        return whole[part.offset : part.offset + nbytes]

    def execute(self, step: DecodeRange, limit: int = 1 << 30) -> None:
        codec = Codec(self.layout.k, self.layout.m)
        for piece in step.pieces(limit):
            sources = {
                part.index: None if part.kind == "zeros" else self.at(step.stripe, part, piece.nbytes)
                for part in piece.sources
            }
            outputs = [self.at(step.stripe, part, piece.nbytes) for part in piece.wanted]
            codec.decode(sources, [part.index for part in piece.wanted], outputs)

    def lose(self, member: int) -> None:
        """The member's image and parity are gone: garbage that must not be read."""
        self.shards_left[member] = None
        self.images[member][:] = 0xEE
        for slot in self.layout.parity_slots(member):
            self.parity_left.pop(slot, None)
            self.parity[slot][:] = 0xEE

    def corrupt_shard(self, member: int, block: int) -> None:
        bad = self.shards_left[member]
        if bad is not None and block * BLOCK < self.images[member].size:
            self.shards_left[member] = bad | {block}
            self.images[member][block * BLOCK : (block + 1) * BLOCK] ^= 0xFF

    def corrupt_parity(self, slot: tuple[int, int], position: int) -> None:
        if slot in self.parity_left and position * BLOCK < self.layout.chunk:
            self.parity_left[slot] = self.parity_left[slot] | {position}
            self.parity[slot][position * BLOCK : (position + 1) * BLOCK] ^= 0xFF

    def recoverable(self, stripe: int, wanted: int) -> bool:
        """Told apart from the code under test: byte by byte, by counting what is missing."""
        layout, missing = self.layout, np.zeros((self.layout.n, self.layout.chunk), bool)
        for index in range(layout.n):
            member = layout.member_of(stripe, index)
            if index < layout.k:
                number = layout.stripes_of(member).index(stripe) * layout.chunk
                state = np.zeros(layout.k * layout.chunk, bool)
                left = self.shards_left[member]
                if left is None:
                    state[:] = True
                for block in left or ():
                    state[block * BLOCK : (block + 1) * BLOCK] = True
                state[self.images[member].size :] = False
                missing[index] = state[number : number + layout.chunk]
            else:
                kept = self.parity_left.get((stripe, index - layout.k))
                missing[index] = kept is None
                for position in kept or ():
                    missing[index, position * BLOCK : (position + 1) * BLOCK] = True
        return not (missing[wanted] & (missing.sum(axis=0) > layout.m)).any()


def test_the_picture_in_the_docstring() -> None:
    layout = GroupLayout(4, 2, 10 * BLOCK)
    assert layout.chunk == 5 * BLOCK
    assert [layout.data_members(stripe) for stripe in range(4)] == [[2, 3], [3, 0], [0, 1], [1, 2]]
    assert [[layout.parity_member(stripe, row) for row in (0, 1)] for stripe in range(4)] == [
        [0, 1],
        [1, 2],
        [2, 3],
        [3, 0],
    ]
    assert layout.parity_slots(0) == [(0, 0), (3, 1)]
    assert [layout.chunk_of(0, stripe) for stripe in range(4)] == [None, 0, 1, None]


@given(shapes, st.integers(1, 100 * BLOCK))
def test_every_chunk_has_one_place(shape: tuple[int, int], length: int) -> None:
    n, m = shape
    layout = GroupLayout(n, m, length)
    assert layout.chunk % BLOCK == 0
    assert layout.k * layout.chunk >= length > layout.k * (layout.chunk - BLOCK)
    for member in range(n):
        stripes = layout.stripes_of(member)
        assert [layout.chunk_of(member, stripe) for stripe in stripes] == list(range(layout.k))
        assert sum(layout.data_bytes(member, stripe) for stripe in range(n)) == length
        slots = layout.parity_slots(member)
        assert len(slots) == m
        assert set(stripes) | {stripe for stripe, _ in slots} == set(range(n))
        assert all(layout.parity_member(stripe, row) == member for stripe, row in slots)
    for stripe in range(n):
        members = layout.data_members(stripe) + [layout.parity_member(stripe, row) for row in range(m)]
        assert sorted(members) == list(range(n))
        assert [layout.index_of(member, stripe) for member in members] == list(range(n))
        assert [layout.member_of(stripe, index) for index in range(n)] == members
        assert layout.parity_member(stripe, 0) == stripe


@pytest.mark.parametrize(
    ("n", "m", "length", "lengths"),
    [
        (1, 1, 5, ()),
        (3, 3, 5, ()),
        (3, 0, 5, ()),
        (3, 1, 0, ()),
        (3, 1, 5, (5, 5)),
        (2, 1, 5, (5, 6)),
        (2, 1, 5, (-1, 5)),
    ],
)
def test_what_makes_no_group(n: int, m: int, length: int, lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"group|protect"):
        GroupLayout(n, m, length, lengths)


@pytest.mark.parametrize(
    ("bad", "offset", "expected"),
    [
        ((), 0, ()),
        ((0, 2), 0, (0, 2)),
        ((3,), 3 * BLOCK, (0,)),
        ((0,), 4096, (0,)),
        ((1,), 4096, (0, 1)),
        ((3,), 4096, (2,)),
        ((4,), 4096, ()),
        ((0,), BLOCK, ()),
        ((1, 2), 2 * BLOCK - 64, (0, 1)),
    ],
)
def test_bad_file_blocks_hit_positions_of_a_chunk(bad: tuple[int, ...], offset: int, expected: tuple[int, ...]) -> None:
    assert chunk_positions(bad, offset, 3 * BLOCK) == set(expected)


@given(shapes, st.sets(st.integers(0, 40), max_size=5), st.integers(1, BLOCK // 64 - 1))
def test_parity_availability_needs_no_exact_offset(shape: tuple[int, int], bad: set[int], offset: int) -> None:
    layout = GroupLayout(*shape, 7 * BLOCK)
    found = parity_availability(layout, 1, bad)
    assert found == parity_availability(layout, 1, bad, offset * 64)
    assert list(found) == layout.parity_slots(1)


def test_a_lost_member_takes_one_range_a_chunk() -> None:
    layout = GroupLayout(4, 2, 10 * BLOCK)
    parity: dict[tuple[int, int], Bad] = {(s, r): frozenset() for s in range(4) for r in range(2)}
    del parity[0, 0], parity[3, 1]
    steps = list(decode_ranges(layout, 0, [None, frozenset(), frozenset(), frozenset()], parity))
    assert [(step.stripe, step.start, step.stop) for step in steps] == [(1, 0, 5 * BLOCK), (2, 0, 5 * BLOCK)]
    assert steps[0].sources == (Part(0, 3, "shard", 5 * BLOCK), Part(2, 1, "parity", 0))
    assert steps[0].wanted == (Part(1, 0, "shard", 0),)
    assert steps[1].sources == (Part(1, 1, "shard", 0), Part(2, 2, "parity", 0))
    assert steps[1].wanted == (Part(0, 0, "shard", 5 * BLOCK),)


def test_consecutive_bad_blocks_merge_and_beyond_an_image_are_zeros() -> None:
    layout = GroupLayout.of([12 * BLOCK, 2 * BLOCK, 12 * BLOCK], 1)
    parity: dict[tuple[int, int], Bad] = {(s, 0): frozenset() for s in range(3)}
    steps = list(decode_ranges(layout, 0, [{1, 2, 3, 5}, frozenset(), frozenset()], parity))
    assert layout.data_members(2) == [0, 1]
    assert [(step.stripe, step.start, step.stop) for step in steps] == [
        (1, BLOCK, 4 * BLOCK),
        (1, 5 * BLOCK, 6 * BLOCK),
    ]
    (step,) = decode_ranges(layout, 0, [{8}, frozenset(), frozenset()], parity)
    assert step.sources == (Part(1, 1, "zeros", 8 * BLOCK), Part(2, 2, "parity", 2 * BLOCK))


def test_an_error_names_the_block() -> None:
    layout = GroupLayout(3, 1, 4 * BLOCK)
    parity: dict[tuple[int, int], Bad] = {(s, 0): frozenset() for s in range(3)}
    with pytest.raises(UnrecoverableError, match=r"block 3 of the shard of member 0.* 1 of 2 chunks.*parity of member"):
        list(decode_ranges(layout, 0, [{3}, frozenset(), frozenset()], {**parity, (2, 0): {1}}))


def test_pieces_cover_a_range() -> None:
    step = DecodeRange(0, 10, 35, (Part(0, 1, "shard", 110),), (Part(1, 2, "parity", 10),))
    pieces = list(step.pieces(10))
    assert [(p.start, p.stop, p.nbytes) for p in pieces] == [(10, 20, 10), (20, 30, 10), (30, 35, 5)]
    assert [p.sources[0].offset for p in pieces] == [110, 120, 130]
    assert [p.wanted[0].offset for p in pieces] == [10, 20, 30]


@st.composite
def damaged_groups(draw: st.DrawFn) -> tuple[Group, list[Bytes], dict[tuple[int, int], Bytes]]:
    """An encoded group with up to m + 1 members lost and some blocks corrupt, and what it held before."""
    n = draw(st.integers(2, 6))
    m = draw(st.integers(1, n - 1))
    sizes = st.one_of(st.integers(1, 3 * BLOCK), st.integers(1, (n - m) * 2 * BLOCK))
    lengths = draw(st.lists(sizes, min_size=n, max_size=n))
    group = Group.encoded(lengths, m, seed=draw(st.integers(0, 9)))
    images = [image.copy() for image in group.images]
    parity = {slot: chunk.copy() for slot, chunk in group.parity.items()}
    for member in draw(st.sets(st.integers(0, n - 1), max_size=min(n, m + 1))):
        group.lose(member)
    for member, block in draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, 8)), max_size=4)):
        group.corrupt_shard(member, block)
    slots = st.tuples(st.integers(0, n - 1), st.integers(0, m - 1))
    for slot, position in draw(st.sets(st.tuples(slots, st.integers(0, 3)), max_size=3)):
        group.corrupt_parity(slot, position)
    return group, images, parity


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged_groups(), st.sampled_from([100_000, BLOCK, 1 << 30]))
def test_within_reach_all_is_recovered_beyond_it_raises(
    damaged: tuple[Group, list[Bytes], dict[tuple[int, int], Bytes]], limit: int
) -> None:
    group, images, parity = damaged
    layout = group.layout
    for member in range(layout.n):
        wanted = [(stripe, layout.index_of(member, stripe)) for stripe in layout.stripes_of(member)]
        steps = decode_ranges(layout, member, group.shards_left, group.parity_left)
        if all(group.recoverable(stripe, index) for stripe, index in wanted):
            before = group.images[member].copy()
            for step in steps:
                group.execute(step, limit)
            np.testing.assert_array_equal(group.images[member], images[member])
            group.images[member][:] = before
        else:
            with pytest.raises(UnrecoverableError, match="member"):
                list(steps)
    for stripe, row in parity:
        rows = parity_ranges(layout, stripe, [row], group.shards_left, group.parity_left)
        if group.recoverable(stripe, layout.k + row):
            before = group.parity[stripe, row].copy()
            for step in rows:
                group.execute(step, limit)
            np.testing.assert_array_equal(group.parity[stripe, row], parity[stripe, row])
            group.parity[stripe, row][:] = before
        else:
            with pytest.raises(UnrecoverableError, match="member"):
                list(rows)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), st.randoms(use_true_random=False)
)
def test_any_m_losses_are_survived_one_after_the_other(shape: tuple[int, int], chance: Random) -> None:
    """What is rebuilt serves the next rebuilding: losses do not add up."""
    n, m = shape
    group = Group.encoded([BLOCK + 17 * member + 1 for member in range(n)], m)
    images = [image.copy() for image in group.images]
    for _ in range(2):
        lost = chance.sample(range(n), m)
        for member in lost:
            group.lose(member)
        for member in lost:
            for step in decode_ranges(group.layout, member, group.shards_left, group.parity_left):
                group.execute(step)
            group.shards_left[member] = frozenset()
            for stripe, row in group.layout.parity_slots(member):
                for step in parity_ranges(group.layout, stripe, [row], group.shards_left, group.parity_left):
                    group.execute(step)
                group.parity_left[stripe, row] = frozenset()
        for image, original in zip(group.images, images, strict=True):
            np.testing.assert_array_equal(image, original)


def test_blocks_are_those_that_checksums_cover() -> None:
    assert kernel.BLOCK == BLOCK
