"""Getting a rank's image back onto this node: fetched whole (from a keeper or from object storage), decoded from its
group, or repaired in place.

A new image is made beside its final name and moved there only when all its bytes verify against its own trailer, so
that a keeper killed meanwhile leaves nothing that could be taken for an image. A damaged image of the node's own is
repaired where it is, without breaking its seal: its sound blocks serve others at the same time, and its bad ones are
used by no one. What is decoded is pulled in pieces, one stream for each source, in the order of the plan.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.errors import (
    CapacityError,
    ImageError,
    RequestError,
    StaleAttemptError,
    StoreUnavailable,
    UnrecoverableError,
)
from outlast.snapshot.codec import Codec
from outlast.snapshot.erasure import DecodeRange, GroupLayout, Part, decode_ranges, parity_entry
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.image import BLOCK, ImageFile, block_checksums
from outlast.snapshot.inventory import GroupInfo, Kind, RankRestore
from outlast.snapshot.keeper_store import REBUILDING, Place, Store
from outlast.snapshot.offloading import NO_TIER
from outlast.snapshot.peers import Peers
from outlast.snapshot.stored import ObjectTier, TransferLimits
from outlast.snapshot.wire import Deadline, ImageName, KeeperClient, ReadRange

PIECE = 512 * 1024
FETCH_PIECE = 4 << 20
_Stream = tuple[int, Kind]
_View = Callable[[int, int], memoryview]


@dataclass(frozen=True)
class RebuildRequest:
    """Which image of which generation this node is to have. fresh: do not reuse the memory of the slot's file, since
    a former writer may still write to it."""

    attempt: Attempt
    generation: Generation
    restore: RankRestore
    fresh: bool

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RebuildRequest:
        return cls(
            attempt=Attempt(int(data["attempt"]), str(data["incarnation"])),
            generation=Generation.parse(data["generation"]),
            restore=RankRestore.from_json(data["restore"]),
            fresh=bool(data.get("fresh", False)),
        )

    @property
    def place(self) -> Place:
        return Place("shard", self.restore.local_rank, self.restore.slot)

    @property
    def name(self) -> ImageName:
        return ImageName("shard", self.restore.local_rank, self.generation, self.restore.seat)


class Rebuilding:
    """One run of a `RebuildRequest`; ``peers`` are keyed by node. Any thread may ``cancel`` it."""

    def __init__(
        self,
        store: Store,
        peers: Peers[str],
        request: RebuildRequest,
        deadline: Deadline,
        objects: ObjectTier | None = None,
    ) -> None:
        self._store = store
        self._objects = objects
        self._peers = peers
        self._request = request
        self._deadline = deadline
        self._stopped = threading.Event()
        self._received = 0

    def run(self) -> dict[str, Any]:
        """Make the image and verify it. Gives {bytes received, seconds}.

        Raises UnrecoverableError when the plan's sources do not suffice, ImageError when a source is gone or the result
        does not verify, CapacityError, TransferError, StaleAttemptError; StoreError and CheckpointError for what is to
        come from object storage.
        """
        started, restore = time.monotonic(), self._request.restore
        with self._peers:
            if restore.source == "memory-local":
                self._store.find(self._request.name).close()
            elif restore.holder == self._store.node:
                self._repair()
            else:
                self._make()
        return {"bytes": self._received, "seconds": time.monotonic() - started}

    def cancel(self) -> None:
        """End it soon, from any thread."""
        self._stopped.set()
        self._peers.shutdown()

    def _repair(self) -> None:
        """Decode the bad blocks of the node's own image, in place. What fails to verify then counts as absent."""
        image = ImageFile.open(self._store.path(self._request.place), writable=True)
        self._check_identity(image)
        repaired = False
        try:
            self._decode(image.view)
            self._check_repaired(image)
            repaired = True
        finally:
            if not repaired:
                image.unseal()
            image.close()

    def _check_repaired(self, image: ImageFile) -> None:
        expected = image.checksums()
        for block in self._own_bad_blocks():
            stop = min((block + 1) * BLOCK, image.layout.trailer_offset)
            if block_checksums(image.view(block * BLOCK, stop - block * BLOCK))[0] != expected[block]:
                raise ImageError(f"{self._request.name}: block {block} does not verify after its repair")

    def _own_bad_blocks(self) -> Sequence[int]:
        restore = self._request.restore
        bad = restore.shard_availability()[restore.group.index] if restore.group else None
        return sorted(bad or ())

    def _make(self) -> None:
        """Fetch or decode the whole image under another name, verify it, and move it into place."""
        restore, path = self._request.restore, self._store.path(self._request.place)
        draft = path.with_name(path.name + REBUILDING)
        try:
            whole = memoryview(self._draft(path, draft))
            if restore.source == "object":
                self._fetch_object(whole)
            elif restore.holder is not None:
                self._fetch(restore.holder, whole)
            if restore.source == "memory-decode":
                self._decode(lambda offset, length: whole[offset : offset + length])
            self._verify(draft)
            self._check()
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _verify(self, draft: Path) -> None:
        image = ImageFile.open(draft)
        self._check_identity(image)
        bad = [block for block, good in enumerate(image.verify()) if not good]
        wanted, found = self._request.restore.checksum, image.digest
        image.close()
        if wanted not in (None, found):
            raise ImageError(f"{self._request.name}: the stored image is not the one that its manifest names: {found}")
        if bad:
            raise ImageError(f"{self._request.name}: {len(bad)} blocks do not verify after the rebuild, first {bad[0]}")

    def _draft(self, path: Path, draft: Path) -> mmap.mmap:
        """A file to rebuild into: the memory of the slot's former file when that has the size, else new.

        What the store is to give may not come: then the slot's file is left alone as long as there is room beside it.
        """
        length = self._request.restore.length
        if self._request.restore.source == "object":
            with contextlib.suppress(CapacityError):
                return self._store.allocate(draft, length)
        if not self._request.fresh and path.exists() and path.stat().st_size == length:
            path.replace(draft)
            with draft.open("r+b") as file:
                return mmap.mmap(file.fileno(), length)
        path.unlink(missing_ok=True)
        return self._store.allocate(draft, length)

    def _fetch(self, node: str, out: memoryview) -> None:
        client = self._peers.client(node, self._deadline)
        client.begin_read(self._request.name, [(0, len(out), "")], self._deadline)
        for start in range(0, len(out), FETCH_PIECE):
            self._check()
            client.receive(out[start : start + FETCH_PIECE], self._deadline)
        client.confirm(self._request.name, self._deadline)
        self._received += len(out)

    def _fetch_object(self, out: memoryview) -> None:
        restore = self._request.restore
        if self._objects is None:
            raise RequestError(f"{self._store.node}: {NO_TIER}")
        if restore.url is None or restore.key is None:
            raise UnrecoverableError(f"{self._request.name}: the plan names no object for it")
        limits = TransferLimits(cancelled=self._is_over)
        try:
            self._objects.fetch(restore.url, restore.key, out, limits)
        except StaleAttemptError as error:
            self._check()
            late = f"{restore.url}/{restore.key} did not come within {self._deadline.seconds:g} s"
            raise StoreUnavailable(late) from error
        self._received += len(out)

    def _is_over(self) -> bool:
        return self._stopped.is_set() or time.monotonic() >= self._deadline.at

    def _decode(self, view: _View) -> None:
        restore = self._request.restore
        group = restore.group
        if group is None:
            raise UnrecoverableError(f"{self._request.name}: the plan names no group to decode it from")
        layout = group.layout()
        shards, parity = restore.shard_availability(), restore.parity_availability()
        steps = [piece for step in decode_ranges(layout, group.index, shards, parity) for piece in step.pieces(PIECE)]
        streams = self._open_streams(group, steps)
        codec = Codec(layout.k, layout.m)
        buffers = [memoryview(bytearray(PIECE)) for _ in range(layout.k)]
        for piece in steps:
            self._check()
            self._decode_piece(codec, piece, streams, buffers, view)
        for stream, client in streams.items():
            client.confirm(self._source_name(group, stream), self._deadline)

    def _decode_piece(
        self,
        codec: Codec,
        piece: DecodeRange,
        streams: Mapping[_Stream, KeeperClient],
        buffers: Sequence[memoryview],
        view: _View,
    ) -> None:
        size = piece.nbytes
        present: dict[int, memoryview | None] = {}
        for part, buffer in zip(piece.sources, buffers, strict=True):
            present[part.index] = None
            if part.kind != "zeros":
                data = present[part.index] = buffer[:size]
                streams[part.member, part.kind].receive(data, self._deadline)
                self._received += size
        wanted = piece.wanted
        codec.decode(present, [part.index for part in wanted], [view(part.offset, size) for part in wanted])

    def _open_streams(self, group: GroupInfo, steps: Sequence[DecodeRange]) -> dict[_Stream, KeeperClient]:
        """A connection for each source image, on which its pieces come in the order of ``steps``."""
        layout, nodes = group.layout(), {(s.member, s.kind): s.node for s in self._request.restore.sources}
        ranges: dict[_Stream, list[ReadRange]] = {}
        for step in steps:
            for part in step.sources:
                if part.kind != "zeros":
                    _append(ranges.setdefault((part.member, part.kind), []), _range(layout, step, part))
        streams = {}
        for stream, wanted in ranges.items():
            client = streams[stream] = self._peers.client(nodes[stream], self._deadline, stream)
            client.begin_read(self._source_name(group, stream), wanted, self._deadline)
        return streams

    def _source_name(self, group: GroupInfo, stream: _Stream) -> ImageName:
        member, kind = stream
        return ImageName(kind, self._request.restore.local_rank, self._request.generation, group.seats[member])

    def _check_identity(self, image: ImageFile) -> None:
        restore, meta = self._request.restore, image.layout.meta
        wanted = {"kind": "shard", "seat": str(restore.seat), "local_rank": str(restore.local_rank)}
        found = {key: meta.get(key) for key in wanted}
        if image.generation != self._request.generation or found != wanted:
            raise ImageError(f"{image.path} is {found}, generation {image.generation}: not {self._request.name}")

    def _check(self) -> None:
        if self._stopped.is_set():
            raise StaleAttemptError(f"{self._request.name}: the rebuild was ended from outside")


def _range(layout: GroupLayout, step: DecodeRange, part: Part) -> ReadRange:
    entry = parity_entry(step.stripe, part.index - layout.k) if part.kind == "parity" else ""
    return part.offset, step.nbytes, entry


def _append(ranges: list[ReadRange], new: ReadRange) -> None:
    """Add a range, as part of the last one where it goes on from there."""
    if ranges and ranges[-1][2] == new[2] and ranges[-1][0] + ranges[-1][1] == new[0]:
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + new[1], new[2])
    else:
        ranges.append(new)
