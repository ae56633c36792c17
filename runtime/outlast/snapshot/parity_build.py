"""One parity image while it is made: its rows arrive in pieces, from this keeper's own encoding and from its peers.

Blocks are hashed as soon as they are there, while they are in cache, so that sealing costs only the blocks that lie
across the border of two rows. The image is sealed by whoever completes the last row.

Call order: ``with build.writing(slot, cancel, deadline) as row`` (None: that row is complete already); then
``row.next`` (a place to fill) and ``row.advance`` (it is filled, hash it) until the end, then ``row.complete``. A row
that is left without ``complete`` was not written. A second writer of a row replaces the first.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlast.errors import StaleAttemptError, TransferError
from outlast.snapshot.erasure import parity_entry
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.image import BLOCK, Entry, ImageFile, Layout, plan_layout
from outlast.snapshot.inventory import GroupInfo
from outlast.snapshot.kernel import xxh64_blocks
from outlast.snapshot.wire import Deadline

Slot = tuple[int, int]
"""(stripe, row)."""


@dataclass(frozen=True)
class ParityRequest:
    """Which parity image an attempt wants made: for ``group.index``'s node, of one local rank, in one slot."""

    attempt: Attempt
    generation: Generation
    slot: int
    local_rank: int
    group: GroupInfo

    def to_json(self) -> dict[str, Any]:
        return {
            "attempt": self.attempt.number,
            "incarnation": self.attempt.incarnation,
            "generation": str(self.generation),
            "slot": self.slot,
            "local_rank": self.local_rank,
            "group": self.group.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ParityRequest:
        attempt = Attempt(int(data["attempt"]), str(data["incarnation"]))
        generation, group = Generation.parse(data["generation"]), GroupInfo.from_json(data["group"])
        return cls(attempt, generation, int(data["slot"]), int(data["local_rank"]), group)


def parity_layout(group: GroupInfo, local_rank: int) -> Layout:
    """The image of the parity that member ``group.index`` holds."""
    layout = group.layout()
    entries = [
        Entry(parity_entry(stripe, row), "U8", (layout.chunk,), layout.chunk, {"stripe": stripe, "row": row})
        for stripe, row in layout.parity_slots(group.index)
    ]
    seat = str(group.seats[group.index])
    meta = {"kind": "parity", "seat": seat, "local_rank": str(local_rank), "group": json.dumps(group.to_json())}
    return plan_layout(entries, meta)


class ParityBuild:
    """The image of one generation under construction. Breaks the file's seal at once. Threads may share it."""

    def __init__(self, image: ImageFile, request: ParityRequest) -> None:
        self.image = image
        self.request = request
        self._changed = threading.Condition()
        self._missing = set(request.group.layout().parity_slots(request.group.index))
        self._writers: dict[Slot, RowWriter] = {}
        self._checksums = np.zeros(image.layout.n_blocks, np.uint64)
        self._hashed = np.zeros(image.layout.n_blocks, np.bool_)
        self._cancelled = False
        image.begin(request.generation)

    @property
    def sealed(self) -> bool:
        """Whether all rows are there."""
        return not self._missing

    @contextmanager
    def writing(self, slot: Slot, cancel: Callable[[], None], deadline: Deadline) -> Iterator[RowWriter | None]:
        """Write one row within this block; ``cancel`` is called to make the block end.

        Raises StaleAttemptError when the build was given up, TransferError when the row's former writer does not leave.
        """
        writer = self._claim(slot, cancel, deadline)
        try:
            yield writer
        finally:
            with self._changed:
                if writer and self._writers.get(slot) is writer:
                    del self._writers[slot]
                self._changed.notify_all()

    def wait_sealed(self, deadline: Deadline, stopped: Callable[[], bool]) -> None:
        """Wait for all rows. Raises TransferError that names the missing ones, StaleAttemptError if given up."""
        with self._changed:
            while not self.sealed:
                self._check()
                if stopped():
                    raise StaleAttemptError(
                        f"generation {self.request.generation}: the encoding was ended from outside"
                    )
                left = deadline.on(f"parity of generation {self.request.generation}: {self._describe_missing()}").left()
                self._changed.wait(left)

    def wake(self) -> None:
        """Let ``wait_sealed`` look at its ``stopped`` again."""
        with self._changed:
            self._changed.notify_all()

    def cancel(self, deadline: Deadline) -> None:
        """Give it up, and wait until no one writes any more. Raises TransferError when a writer does not leave."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
            for writer in list(self._writers.values()):
                writer.cancel()
            while self._writers:
                self._changed.wait(deadline.on(f"writers of generation {self.request.generation} to stop").left())

    def complete(self, writer: RowWriter) -> None:
        """All bytes of the writer's row are there."""
        with self._changed:
            self._check()
            if self._writers.get(writer.slot) is not writer:
                raise TransferError(f"stripe {writer.slot[0]}, row {writer.slot[1]} has another writer now")
            if len(self._missing) == 1:
                self._seal()
            self._missing.discard(writer.slot)
            self._changed.notify_all()

    def hash_blocks(self, first: int, stop: int) -> None:
        """Hash blocks [first, stop) of the file, which have their final bytes."""
        start, end = first * BLOCK, min(stop * BLOCK, self.image.layout.trailer_offset)
        xxh64_blocks(self.image.address + start, end - start, self._checksums[first:stop])
        self._hashed[first:stop] = True

    def _claim(self, slot: Slot, cancel: Callable[[], None], deadline: Deadline) -> RowWriter | None:
        with self._changed:
            while True:
                self._check()
                if slot not in self._missing:
                    return None
                if slot not in self._writers:
                    break
                self._writers[slot].cancel()
                self._changed.wait(deadline.on(f"the former writer of parity {slot} to stop").left())
            writer = RowWriter(self, slot, cancel)
            self._writers[slot] = writer
            return writer

    def _seal(self) -> None:
        for block in np.flatnonzero(~self._hashed).tolist():
            self.hash_blocks(block, block + 1)
        self.image.seal(self._checksums)

    def _check(self) -> None:
        if self._cancelled:
            raise StaleAttemptError(f"generation {self.request.generation}: its parity is not made any more")

    def _describe_missing(self) -> str:
        group = self.request.group
        layout = group.layout()
        makers = {layout.parity_member(stripe, 0) for stripe, _ in self._missing}
        return "rows from seats " + ", ".join(str(group.seats[member]) for member in sorted(makers))


class RowWriter:
    """Who fills one row, front to back."""

    def __init__(self, build: ParityBuild, slot: Slot, cancel: Callable[[], None]) -> None:
        entry = build.image.layout.entry(parity_entry(*slot))
        self.slot = slot
        self.cancel = cancel
        self.length = entry.nbytes
        self._build = build
        self._position, self._stop = entry.offset, entry.stop
        self._next_block = -(-entry.offset // BLOCK)

    def next(self, nbytes: int) -> memoryview:
        """The place of the next ``nbytes`` bytes, or of what is left."""
        return self._build.image.view(self._position, min(nbytes, self._stop - self._position))

    def advance(self, nbytes: int) -> None:
        """They are filled."""
        self._position += nbytes
        block = self._position // BLOCK
        if block > self._next_block:
            self._build.hash_blocks(self._next_block, block)
            self._next_block = block

    def complete(self) -> None:
        """All are filled, with right bytes. Raises ValueError when some are missing, and like the build."""
        if self._position != self._stop:
            raise ValueError(f"{self._stop - self._position} bytes of parity {self.slot} are missing")
        self._build.complete(self)
