"""Tensors of one generation, read from the images that hold their bytes.

``Shards`` looks at a generation from one rank: its own image where the world is the one that wrote it, else rank 0's.
A leaf is read as that image has it, or, given the live tensor that it is for, as the part of the global tensor which
that holds: put together from the pieces of all old ranks. Headers of others are read when the first leaf needs them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from outlast.errors import ImageError, StateError
from outlast.protect.leaves import Leaf
from outlast.protect.plan import STATE, decode_state, part_range
from outlast.protect.regions import Box, Run, runs
from outlast.protect.tree import Json
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import BLOCK, ImageFile, Layout, block_checksums

BATCH_BYTES = 256 << 20
"""Tensors that are read together, so that neighbours in an image are one read."""
IMAGES_AT_ONCE = 4

Info = Mapping[str, Any]
T = TypeVar("T")
R = TypeVar("R")


class ShardReader(Protocol):
    """Reads bytes of one rank's image: a local file, a keeper's or an object. Only one thread uses it at a time."""

    def layout(self) -> Layout: ...

    def read_into(self, offset: int, target: memoryview) -> None: ...

    def read_many(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each target from its offset on."""
        ...


class LocalShard:
    """This node's own image file of one generation, verified once more: nobody trains on bytes that were not."""

    def __init__(self, path: pathlib.Path, generation: Generation) -> None:
        """Raises ImageError when the file is of another generation, or not sealed, or any block does not verify."""
        self._image = _open_image(path, generation)
        if not all(self._image.verify()):
            raise ImageError(f"{path} has blocks that do not verify")

    def layout(self) -> Layout:
        return self._image.layout

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self._image.view(offset, len(target))

    def read_many(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        for offset, target in reads:
            self.read_into(offset, target)

    def close(self) -> None:
        self._image.close()


class LocalPieces(LocalShard):
    """An image file on this node of which only parts are needed: blocks are verified when they are first read."""

    def __init__(self, path: pathlib.Path, generation: Generation) -> None:
        """Raises ImageError when the file is of another generation or not sealed."""
        self._image = _open_image(path, generation)
        self._sums = self._image.checksums()
        self._verified = np.zeros(len(self._sums), bool)

    def read_into(self, offset: int, target: memoryview) -> None:
        covered = self._image.layout.trailer_offset
        for block in range(offset // BLOCK, -(-min(offset + len(target), covered) // BLOCK)):
            if not self._verified[block]:
                view = self._image.view(block * BLOCK, min(BLOCK, covered - block * BLOCK))
                if block_checksums(view)[0] != self._sums[block]:
                    raise ImageError(f"{self._image.path}: block {block} does not verify")
                self._verified[block] = True
        super().read_into(offset, target)


def _open_image(path: pathlib.Path, generation: Generation) -> ImageFile:
    image = ImageFile.open(path)
    if image.generation != generation:
        raise ImageError(f"{path} holds generation {image.generation}, not {generation}")
    return image


@dataclass(frozen=True)
class Want:
    """A leaf to read: as the image has it, or (``like``) the part that this live leaf is of the global tensor.

    ``along``: a leaf that says where this one's piece lies, for plain tensors that are cut like that one.
    """

    name: str
    like: Leaf | None = None
    along: str | None = None


@dataclass(frozen=True)
class _Patch:
    """Bytes that were read with others around them: ``run`` of ``piece``, to be cut out of ``scratch``."""

    scratch: npt.NDArray[np.uint8]
    piece: Box
    run: Run


@dataclass
class _Assembly:
    """One tensor being put together in ``buffer``; ``reads``: (old rank, offset in its image, target)."""

    dtype: torch.dtype
    box: Box
    buffer: npt.NDArray[np.uint8]
    reads: list[tuple[int, int, memoryview]] = field(default_factory=list)
    patches: list[_Patch] = field(default_factory=list)

    def finish(self) -> torch.Tensor:
        width = self.dtype.itemsize
        for patch in self.patches:
            whole = self.buffer.reshape(*self.box.shape, width)
            first = [a - b for a, b in zip(patch.run.box.offset, self.box.offset, strict=True)]
            part = tuple(slice(a, a + n) for a, n in zip(first, patch.run.box.shape, strict=True))
            strides = (*(stride * width for stride in patch.piece.strides()), 1)
            whole[part] = np.lib.stride_tricks.as_strided(patch.scratch, (*patch.run.box.shape, width), strides)
        if not self.box.size:
            return torch.empty(self.box.shape, dtype=self.dtype)
        return torch.from_numpy(self.buffer).view(self.dtype).reshape(self.box.shape)


@dataclass
class Shards:
    """One generation as one rank sees it. ``open_shard(rank)`` is called, from any thread, for each other image.

    own: the image whose state this rank takes, and rank: whose it is; world: ranks that wrote the generation; resized:
    it is another number than now; turn: which of several equal pieces this rank reads; label: for errors.
    """

    own: ShardReader
    open_shard: Callable[[int], ShardReader]
    rank: int
    world: int = 1
    resized: bool = False
    turn: int = 0
    label: str = "the snapshot"
    _others: dict[int, ShardReader] = field(default_factory=dict)
    _wants: dict[str, Want] = field(default_factory=dict)
    _expected: dict[Want, None] = field(default_factory=dict)
    _ready: dict[Want, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def names(self) -> dict[str, Info]:
        """Leaf name -> the header's information about it."""
        return {entry.name: entry.info for entry in self.own.layout().entries if "leaf" in entry.info}

    def info(self, name: str) -> Info:
        """What the header says of a leaf. Raises StateError when it has none of that name."""
        info = self._info(self.rank, name)
        if info is None:
            raise StateError(f"{name} is not in {self.label}, whose state refers to it")
        return info

    def state(self) -> Json:
        """The JSON state."""
        entry = self.own.layout().entry(STATE)
        blob = bytearray(entry.nbytes)
        self.own.read_into(entry.offset, memoryview(blob))
        return decode_state(bytes(blob))

    def of(self, rank: int) -> Shards:
        """The same generation as another old rank had it."""
        return Shards(self._opened(rank), self._opened, rank, self.world, label=f"{self.label} (rank {rank})")

    def expect(self, wants: Iterable[Want]) -> None:
        """Announce what will be asked for, in that order, so that it can be read together."""
        self._expected = dict.fromkeys(wants)
        self._wants = {want.name: want for want in self._expected}

    def want(self, name: str) -> Want:
        """What was announced under this name; else the leaf as the image has it."""
        return self._wants.get(name) or Want(name)

    def tensor(self, want: Want | str) -> torch.Tensor:
        """A leaf on the CPU; by its name: as announced. Raises StateError when its pieces leave something out."""
        want = self.want(want) if isinstance(want, str) else want
        if want not in self._ready:
            self._read(want)
        return self._ready.pop(want)

    def open(self, ranks: Iterable[int]) -> None:
        """Open images and read their headers, several at a time."""
        missing = [rank for rank in ranks if rank != self.rank and rank not in self._others]
        for rank, shard in zip(missing, _at_once(self._open_one, missing), strict=True):
            self._others[rank] = shard

    def _open_one(self, rank: int) -> ShardReader:
        shard = self.open_shard(rank)
        shard.layout()
        return shard

    def _opened(self, rank: int) -> ShardReader:
        self.open([rank])
        return self._shard(rank)

    def _shard(self, rank: int) -> ShardReader:
        return self.own if rank == self.rank else self._others[rank]

    def _info(self, rank: int, name: str) -> Info | None:
        try:
            return self._shard(rank).layout().entry(name).info
        except KeyError:
            return None

    # -- reading a batch

    def _read(self, first: Want) -> None:
        """Read ``first``, and what is expected next, up to a batch."""
        self._expected.pop(first, None)
        batch, size = [first], self._bytes(first)
        for want in self._expected:
            size += self._bytes(want)
            if size > BATCH_BYTES:
                break
            batch.append(want)
        for want in batch[1:]:
            del self._expected[want]
        self.open(sorted({rank for want in batch for rank in self._needed(want)}))
        assemblies = [self._assemble(want) for want in batch]
        by_rank: dict[int, list[tuple[int, memoryview]]] = {}
        for rank, offset, target in (read for assembly in assemblies for read in assembly.reads):
            by_rank.setdefault(rank, []).append((offset, target))
        for _ in _at_once(lambda rank: self._shard(rank).read_many(by_rank[rank]), sorted(by_rank)):
            pass
        self._ready.update({want: assembly.finish() for want, assembly in zip(batch, assemblies, strict=True)})

    def _bytes(self, want: Want) -> int:
        return want.like.nbytes if want.like is not None else int(self.info(want.name)["nbytes"])

    def _needed(self, want: Want) -> Iterable[int]:
        """Old ranks whose images are looked at for a leaf."""
        return range(self.world) if self._is_spread(want) else self.info(want.name)["replicas"]

    def _is_spread(self, want: Want) -> bool:
        """Whether the live leaf needs another part than the own image has."""
        placed = self.info(want.along or want.name)
        return (
            want.like is not None
            and (want.like.distributed or bool(placed["distributed"]))
            and not (placed["distributed"] and _box(placed) == Box(want.like.offset, want.like.shape))
        )

    def _assemble(self, want: Want) -> _Assembly:
        info = self.info(want.name)
        spread = self._is_spread(want) and self._is_cut_alike(want)
        pieces = self._pieces(want) if spread else {_box(info): self.rank}
        box = Box(want.like.offset, want.like.shape) if spread and want.like is not None else _box(info)
        dtype: torch.dtype = getattr(torch, info["dtype"])
        assembly, found = _Assembly(dtype, box, np.empty(box.size * dtype.itemsize, np.uint8)), 0
        for piece, holder in pieces.items():
            part = piece.common(box) if box.size else None
            if part is not None:
                found += part.size
                self._add(assembly, want.name, piece, holder, part)
        if found != box.size:
            raise StateError(f"{want.name}: the images of {self.label} hold {found} of the {box.size} elements needed")
        return assembly

    def is_cut_like(self, name: str, other: str) -> bool:
        """Whether a plain leaf has, on every old rank, the shape of that rank's part of ``other``."""
        self.open(range(self.world))
        return self._is_cut_alike(Want(name, along=other))

    def _is_cut_alike(self, want: Want) -> bool:
        """Whether a plain leaf has, on every old rank, the shape of that rank's part of the one it may be cut like."""
        if want.along is None:
            return True
        pairs = [(self._info(rank, want.name), self._info(rank, want.along)) for rank in range(self.world)]
        return all(mine["shape"] == whose["shape"] for mine, whose in pairs if mine is not None and whose is not None)

    def _pieces(self, want: Want) -> dict[Box, int]:
        """Where the global tensor's pieces lie, and an old rank that holds each (with those that share it)."""
        first = self.info(want.along or want.name)
        if want.like is None or list(want.like.global_shape) != list(first["global_shape"]):
            raise StateError(f"{want.name} is {tuple(first['global_shape'])} in {self.label}, which does not fit")
        holders: dict[Box, list[int]] = {}
        for rank in range(self.world) if first["distributed"] else (self.rank,):
            placed = self._info(rank, want.along or want.name)
            if placed is not None and self._info(rank, want.name) is not None:
                holders.setdefault(_box(placed), []).append(rank)
        return {box: ranks[self.turn % len(ranks)] for box, ranks in holders.items() if box.size}

    def _add(self, assembly: _Assembly, name: str, piece: Box, holder: int, part: Box) -> None:
        """The reads for ``part`` of a piece that ``holder`` has."""
        width, target = assembly.dtype.itemsize, assembly.buffer.data
        for run in runs(piece, part, width):
            length = run.stop - run.start
            if length == run.box.size * width and assembly.box.holds_densely(run.box):
                start = assembly.box.place(run.box) * width
                self._add_reads(assembly, name, holder, run.start, target[start : start + length])
            else:
                scratch = np.empty(length, np.uint8)
                assembly.patches.append(_Patch(scratch, piece, run))
                self._add_reads(assembly, name, holder, run.start, scratch.data)

    def _add_reads(self, assembly: _Assembly, name: str, holder: int, start: int, target: memoryview) -> None:
        """Bytes of a leaf from ``start`` on, out of the parts that its replicas share."""
        info = self._info(holder, name)
        assert info is not None
        stop, replicas = start + len(target), info["replicas"]
        for index, rank in enumerate(replicas):
            first, last = part_range(info["nbytes"], index, len(replicas))
            lo, hi = max(start, first), min(stop, last)
            if lo < hi:
                offset = self._shard(rank).layout().entry(name).offset + lo - first
                assembly.reads.append((rank, offset, target[lo - start : hi - start]))


def _box(info: Info) -> Box:
    return Box(tuple(info["offset"]), tuple(info["shape"]))


def _at_once(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """``work`` on each item, a few at a time, in order; one alone in this very thread."""
    if len(items) <= 1:
        return map(work, items)
    with ThreadPoolExecutor(min(IMAGES_AT_ONCE, len(items)), thread_name_prefix="outlast-restore") as pool:
        return iter(list(pool.map(work, items)))
