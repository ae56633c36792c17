"""Reads parts of an image that lies in a store, and trusts none of it before its checksum was compared.

An object is an image as it was in memory. Its last bytes say how it is checked: the footer, and before it the XXH64 of
every 256 KiB block. Whole blocks are read, compared, and only then handed on. A request costs as much time as half a
MiB or more, so blocks that lie near each other are read together; several requests are under way at a time. Memory:
``parallel`` scratch buffers of ``SCRATCH`` bytes; large stretches of whole blocks go directly into their target.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from outlast.checkpoint.store import PARALLEL, PART_BYTES, Store
from outlast.errors import CheckpointError, ImageError
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import MAGIC
from outlast.snapshot.kernel import BLOCK, Checksums, block_count, xxh64_blocks
from outlast.snapshot.layout import FOOTER_BYTES, GENERATION_OFFSET, GENERATION_WIDTH, Layout, header_bytes

SCRATCH = 8 << 20
"""The longest stretch of blocks that is read at once to be handed on in parts."""
DIRECT = 4 << 20
"""From so many bytes on whole blocks are read straight into their target."""
GAP = 2 * BLOCK
"""Blocks that nobody wants are read with their neighbours up to so many bytes: another request would take longer."""

_FOOTER = struct.Struct("<8sQQQQ16x")
"""As ``outlast.snapshot.image`` writes it."""


@dataclass(frozen=True)
class _Opened:
    """What the ends of an object say of it."""

    layout: Layout
    sums: Checksums
    generation: Generation
    checksum: str


@dataclass(frozen=True)
class _Job:
    """One request: bytes [start, stop), whole blocks, into ``target``, or through scratch into ``parts``."""

    start: int
    stop: int
    target: memoryview | None
    parts: tuple[tuple[int, memoryview], ...] = ()


class ObjectShard:
    """One rank's image in ``store`` under ``key``. Nothing is read before it is asked for. For any thread.

    ``generation`` and ``checksum``: which image it must be (None: any). Raises CheckpointError that names object and
    block for bytes that are not right, and what the store raises (ObjectMissing, StoreUnavailable, StoreDenied).
    """

    def __init__(
        self,
        store: Store,
        key: str,
        generation: Generation | None = None,
        parallel: int = PARALLEL,
        checksum: str | None = None,
    ) -> None:
        self._store, self._key, self._wanted, self._parallel = store, key, generation, parallel
        self._wanted_checksum = checksum
        self._lock = threading.Lock()
        self._opened: _Opened | None = None

    def __str__(self) -> str:
        return f"{self._store.url}/{self._key}"

    def layout(self) -> Layout:
        """Where everything lies in it."""
        return self._open().layout

    @property
    def checksum(self) -> str:
        """XXH64 of its blocks' checksums, 16 hexadecimal digits: as the manifest has it."""
        return self._open().checksum

    @property
    def generation(self) -> Generation:
        """Which snapshot it holds."""
        return self._open().generation

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with what lies from ``offset`` on, before the trailer."""
        self.read_many([(offset, target)])

    def read_many(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each target from its offset on: ranges that share blocks or lie side by side are read together."""
        opened = self._open()
        covered = opened.layout.trailer_offset
        for offset, target in reads:
            if not 0 <= offset <= offset + len(target) <= covered:
                end = offset + len(target)
                raise CheckpointError(f"{self} has no bytes [{offset}, {end}) of state: there are {covered}")
        jobs = list(_jobs(reads, covered))
        if len(jobs) == 1:
            self._do(jobs[0], opened.sums)
        elif jobs:
            with ThreadPoolExecutor(min(self._parallel, len(jobs)), thread_name_prefix="outlast-read") as pool:
                for _ in pool.map(lambda job: self._do(job, opened.sums), jobs):
                    pass

    def _do(self, job: _Job, sums: Checksums) -> None:
        buffer = job.target if job.target is not None else np.empty(job.stop - job.start, np.uint8).data
        self._store.read_into(self._key, job.start, buffer)
        self._verify(job.start, buffer, sums)
        for offset, target in job.parts:
            target[:] = buffer[offset - job.start : offset - job.start + len(target)]

    def _verify(self, start: int, data: memoryview, sums: Checksums) -> None:
        """Compare whole blocks, the first of which begins at ``start``."""
        first, found = start // BLOCK, np.zeros(block_count(len(data)), np.uint64)
        xxh64_blocks(np.frombuffer(data, np.uint8).ctypes.data, len(data), found)
        bad = np.flatnonzero(found != sums[first : first + len(found)])
        if len(bad):
            block = first + int(bad[0])
            more = f", nor do {len(bad) - 1} of the {len(found) - 1} read with it" if len(bad) > 1 else ""
            raise CheckpointError(f"{self}: block {block} (from byte {block * BLOCK} on) does not verify{more}")

    # -- the ends of the object

    def _open(self) -> _Opened:
        with self._lock:
            if self._opened is None:
                self._opened = self._read_ends()
            return self._opened

    def _read_ends(self) -> _Opened:
        size = self._store.head(self._key).size
        tail = self._tail(size)
        footer = tail[-FOOTER_BYTES:]
        magic, n_blocks, covered, sums_digest, generation_digest = _FOOTER.unpack(footer[:-8])
        if magic != MAGIC or int.from_bytes(footer[-8:], "little") != xxhash.xxh64_intdigest(footer[:-8]):
            raise CheckpointError(f"{self} ends in no valid footer: it is no image, or a part of one")
        packed = self._checksums(size, covered, n_blocks, tail)
        if xxhash.xxh64_intdigest(packed) != sums_digest:
            raise CheckpointError(f"{self}: the checksums at its end are damaged")
        if self._wanted_checksum not in (None, f"{sums_digest:016x}"):
            text = f"checksum {sums_digest:016x}, not {self._wanted_checksum}"
            raise CheckpointError(f"{self} is another image than its manifest names: {text}")
        sums = np.frombuffer(packed, "<u8").astype(np.uint64)
        header = self._header(size, covered, sums)
        generation = self._generation(header, generation_digest)
        try:
            layout = Layout.parse(header, size)
        except ImageError as error:
            raise CheckpointError(f"{self}: {error}") from error
        return _Opened(layout, sums, generation, f"{sums_digest:016x}")

    def _tail(self, size: int) -> bytes:
        """The last bytes, enough for the checksums of 8 GiB."""
        if size < FOOTER_BYTES:
            raise CheckpointError(f"{self} has {size} bytes: it is no image")
        return self._fetch(size - min(size, BLOCK), min(size, BLOCK))

    def _checksums(self, size: int, covered: int, n_blocks: int, tail: bytes) -> bytes:
        length = 8 * n_blocks + FOOTER_BYTES
        if n_blocks != block_count(covered) or covered + length != size:
            raise CheckpointError(f"{self} has {size} bytes, but its footer tells of {covered + length}")
        packed = tail[-length:] if length <= len(tail) else self._fetch(covered, length)
        return packed[:-FOOTER_BYTES]

    def _header(self, size: int, covered: int, sums: Checksums) -> bytes:
        start = self._blocks(0, min(BLOCK, covered), sums)
        try:
            length = header_bytes(start[:8], size)
        except ImageError as error:
            raise CheckpointError(f"{self}: {error}") from error
        if length > len(start):
            start += self._blocks(BLOCK, min(block_count(length) * BLOCK, covered), sums)
        return start[:length]

    def _generation(self, header: bytes, digest: int) -> Generation:
        text = header[GENERATION_OFFSET : GENERATION_OFFSET + GENERATION_WIDTH]
        if xxhash.xxh64_intdigest(text) != digest:
            raise CheckpointError(f"{self}: the generation in its header is not the one it was sealed with")
        generation = Generation.parse(text.decode("ascii"))
        if self._wanted is not None and generation != self._wanted:
            raise CheckpointError(f"{self} holds generation {generation}, not {self._wanted}")
        return generation

    def _blocks(self, start: int, stop: int, sums: Checksums) -> bytes:
        data = bytearray(stop - start)
        self._store.read_into(self._key, start, memoryview(data))
        self._verify(start, memoryview(data), sums)
        return bytes(data)

    def _fetch(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self._store.read_into(self._key, offset, memoryview(data))
        return bytes(data)


def _jobs(reads: Iterable[tuple[int, memoryview]], covered: int) -> Iterable[_Job]:
    """The requests that serve ``reads`` of an image of which [0, covered) is state."""
    rest: list[tuple[int, memoryview]] = []
    for offset, target in reads:
        stop = offset + len(target)
        first = block_count(offset) * BLOCK
        last = stop if stop == covered else stop // BLOCK * BLOCK
        if last - first < DIRECT:
            rest.append((offset, target))
            continue
        for start in range(first, last, PART_BYTES):
            end = min(start + PART_BYTES, last)
            yield _Job(start, end, target[start - offset : end - offset])
        rest += [(offset, target[: first - offset]), (last, target[last - offset :])]
    yield from _together(sorted((part for part in rest if len(part[1])), key=lambda part: part[0]), covered)


def _together(parts: Iterable[tuple[int, memoryview]], covered: int) -> Iterable[_Job]:
    """Parts, by their place, with all others in blocks that touch theirs, within stretches of ``SCRATCH`` bytes."""
    start = stop = 0
    held: list[tuple[int, memoryview]] = []
    for offset, target in (piece for part in parts for piece in _within_stretches(*part)):
        first, last = offset // BLOCK * BLOCK, min(block_count(offset + len(target)) * BLOCK, covered)
        if held and (first > stop + GAP or first // SCRATCH != start // SCRATCH):
            yield _Job(start, stop, None, tuple(held))
            held = []
        if not held:
            start, stop = first, last
        stop = max(stop, last)
        held.append((offset, target))
    if held:
        yield _Job(start, stop, None, tuple(held))


def _within_stretches(offset: int, target: memoryview) -> Iterable[tuple[int, memoryview]]:
    while len(target):
        length = min(len(target), SCRATCH - offset % SCRATCH)
        yield offset, target[:length]
        offset, target = offset + length, target[length:]
