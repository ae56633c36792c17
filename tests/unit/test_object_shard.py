"""Parts of images: which bytes they are, and that none is handed on whose checksum was not compared."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.reading import GAP as GAP_READ
from outlast.checkpoint.reading import SCRATCH, ObjectShard
from outlast.errors import CheckpointError, ImageError, ObjectMissing
from outlast.protect.regions import GAP, LONGEST, Box, runs
from outlast.protect.reload import LocalPieces
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import BLOCK
from support.shards import GENERATION, Objects, image

# --- boxes ------------------------------------------------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], list[Box]]:
    """A shape, and two ways to cut it into boxes along one dimension or two."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    return shape, draw(tilings(shape)), draw(tilings(shape))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    boxes = [Box((0,) * len(shape), shape)]
    for dim in draw(st.lists(st.integers(0, len(shape) - 1), max_size=2, unique=True)):
        size = -(-shape[dim] // draw(st.integers(1, 9)))
        parts = [(at, min(size, shape[dim] - at)) for at in range(0, shape[dim], size)]
        boxes = [
            Box((*box.offset[:dim], at, *box.offset[dim + 1 :]), (*box.shape[:dim], n, *box.shape[dim + 1 :]))
            for box in boxes
            for at, n in parts
        ]
    return boxes


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))


@given(cuts())
def test_pieces_of_one_cut_make_up_those_of_another(case: tuple[tuple[int, ...], list[Box], list[Box]]) -> None:
    shape, before, after = case
    whole = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    stored = {piece: np.ascontiguousarray(whole[slices(piece)]).tobytes() for piece in before}
    for wanted in after:
        got = np.full(shape, -1, np.int32)
        for piece in before:
            part = piece.common(wanted)
            for run in runs(piece, part, 4) if part else ():
                data = stored[piece][run.start : run.stop]
                assert len(data) == 4 * piece.span(run.box)
                strides = [4 * stride for stride in piece.strides()]
                got[slices(run.box)] = np.ndarray(run.box.shape, np.int32, data, 0, strides)
        assert np.array_equal(got[slices(wanted)], whole[slices(wanted)])


def test_rows_are_one_read_and_columns_are_not_one_for_each_row() -> None:
    piece = Box((0, 0), (1000, 512))
    assert len(list(runs(piece, Box((10, 0), (300, 512)), 4))) == 1
    assert len(list(runs(piece, Box((0, 10), (1000, 100)), 4))) == 1
    wide = Box((0, 0), (8, 1 << 20))
    far_apart = list(runs(wide, Box((0, 5), (8, 1000)), 4))
    assert [run.stop - run.start for run in far_apart] == [4000] * 8
    tall = Box((0, 0), (100_000, 512))
    for run in runs(tall, Box((0, 1), (100_000, 511)), 4):
        assert run.stop - run.start <= LONGEST
    assert GAP < LONGEST


# --- objects ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: pathlib.Path) -> bytes:
    """An image with a large tensor, many small ones and a large one again."""
    generator = torch.Generator().manual_seed(1)
    notes = {"a": torch.randn(1_500_000, generator=generator)}
    notes |= {f"s{index}": torch.randn(1000 + index, generator=generator) for index in range(200)}
    notes["z"] = torch.randn(700_001, generator=generator)
    return image(tmp_path, {"notes": notes})


def test_what_is_read_of_an_object_is_what_was_written(large: bytes) -> None:
    store = Objects(key=large)
    shard = ObjectShard(store, "key", GENERATION)
    layout = shard.layout()
    spent = sum(length for _, length in store.reads)
    assert spent <= layout.n_blocks * 8 + len(layout.header) + 3 * BLOCK
    assert shard.generation == GENERATION
    chosen = random.Random(4)
    for _ in range(60):
        reads, wanted = [], []
        for _ in range(chosen.randrange(1, 6)):
            length = chosen.choice([0, 1, 100, BLOCK, 3 * BLOCK + 7, chosen.randrange(5 << 20)])
            start = chosen.randrange(layout.trailer_offset - length + 1)
            reads.append((start, memoryview(bytearray(length))))
            wanted.append(large[start : start + length])
        shard.read_many(reads)
        assert [bytes(target) for _, target in reads] == wanted


def test_an_image_is_read_in_few_requests_and_no_block_twice(large: bytes) -> None:
    store = Objects(key=large)
    shard = ObjectShard(store, "key")
    entries = [entry for entry in shard.layout().entries if entry.nbytes]
    store.reads.clear()
    shard.read_many([(entry.offset, memoryview(bytearray(entry.nbytes))) for entry in entries])
    assert len(store.reads) <= 12
    assert sum(length for _, length in store.reads) <= shard.layout().trailer_offset
    assert all(offset % BLOCK == 0 for offset, _ in store.reads)
    small = [entry for entry in entries if entry.nbytes < 10_000]
    store.reads.clear()
    shard.read_many([(entry.offset, memoryview(bytearray(entry.nbytes))) for entry in small])
    assert max(length for _, length in store.reads) <= SCRATCH
    assert sum(length for _, length in store.reads) <= sum(entry.nbytes for entry in small) + 4 * BLOCK


@pytest.mark.parametrize(("apart", "requests"), [(0, 1), (GAP_READ, 1), (GAP_READ + BLOCK, 2)])
def test_what_lies_between_is_read_where_another_request_would_take_longer(
    large: bytes, apart: int, requests: int
) -> None:
    store = Objects(key=large)
    shard = ObjectShard(store, "key")
    shard.layout()
    store.reads.clear()
    first, second = memoryview(bytearray(BLOCK)), memoryview(bytearray(100))
    shard.read_many([(2 * BLOCK, first), (3 * BLOCK + apart, second)])
    assert len(store.reads) == requests
    assert bytes(first) == large[2 * BLOCK : 3 * BLOCK]
    assert bytes(second) == large[3 * BLOCK + apart : 3 * BLOCK + apart + 100]


def test_only_the_blocks_that_are_read_need_be_sound(large: bytes) -> None:
    damaged = bytearray(large)
    damaged[20 * BLOCK + 5] ^= 1
    shard = ObjectShard(Objects(key=bytes(damaged)), "key")
    shard.read_into(19 * BLOCK, memoryview(bytearray(BLOCK)))
    with pytest.raises(CheckpointError, match=r"s3://bucket/key: block 20 \(from byte 5242880 on\) does not verify"):
        shard.read_into(20 * BLOCK - 1, memoryview(bytearray(2)))
    with pytest.raises(CheckpointError, match=r"block 20 .* does not verify"):
        shard.read_into(10 * BLOCK, memoryview(bytearray(12 * BLOCK)))
    with pytest.raises(CheckpointError, match="has no bytes"):
        shard.read_into(len(large) - 10, memoryview(bytearray(10)))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda data: data[:-1], "no valid footer"),
        (lambda data: data[: len(data) // 2], "no valid footer"),
        (lambda data: b"", "0 bytes"),
        (lambda data: data[:100] + b"!" + data[101:], "block 0 .* does not verify"),
        (lambda data: data[:-100] + b"!" + data[-99:], "checksums at its end are damaged"),
        (lambda data: data[BLOCK:], "its footer tells of"),
    ],
)
def test_an_object_that_is_no_whole_image_is_refused(large: bytes, harm: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        ObjectShard(Objects(key=harm(large)), "key").layout()


def test_an_object_of_another_generation_or_none_is_refused(large: bytes) -> None:
    with pytest.raises(CheckpointError, match=f"holds generation {GENERATION}, not 2-cd-7"):
        ObjectShard(Objects(key=large), "key", Generation(2, 7, "cd")).layout()
    checksum = ObjectShard(Objects(key=large), "key").checksum
    ObjectShard(Objects(key=large), "key", checksum=checksum).layout()
    with pytest.raises(CheckpointError, match=f"another image than its manifest names: checksum {checksum}, not 00"):
        ObjectShard(Objects(key=large), "key", checksum="0" * 16).layout()
    with pytest.raises(ObjectMissing, match="bucket/key is not there"):
        ObjectShard(Objects(), "key").layout()


def test_local_images_are_verified_where_they_are_read(large: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "slot-0-0.img"
    damaged = bytearray(large)
    damaged[20 * BLOCK + 5] ^= 1
    path.write_bytes(damaged)
    pieces, target = LocalPieces(path, GENERATION), bytearray(BLOCK)
    pieces.read_into(19 * BLOCK, memoryview(target))
    assert bytes(target) == large[19 * BLOCK : 20 * BLOCK]
    with pytest.raises(ImageError, match="block 20 does not verify"):
        pieces.read_into(20 * BLOCK - 1, memoryview(bytearray(2)))
    with pytest.raises(ImageError, match="holds generation"):
        LocalPieces(path, Generation(2, 7, "cd"))
