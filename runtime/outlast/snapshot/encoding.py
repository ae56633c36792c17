"""Making parity: one node's part of the encoding of one generation.

Member s of a group encodes stripe s: it pulls the stripe's k chunks from their holders, computes m rows, keeps row 0
and pushes the others to the members that store them, all of it in pieces, so that a stripe of any size takes k + m
pieces of memory, and so that a piece is encoded, hashed and sent while it is in cache. TCP's own flow control is the
pipeline: holders send ahead as far as socket buffers go.

What was pulled counts only after its holder has confirmed that it still holds that generation, after the last byte: a
rank that overwrites a slot breaks its seal first. Rows are declared complete after that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from outlast.errors import OutlastError, RequestError, StaleAttemptError, TransferError
from outlast.snapshot.codec import Codec
from outlast.snapshot.erasure import DecodeRange, GroupLayout, encode_ranges
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import GroupInfo
from outlast.snapshot.keeper_store import Store
from outlast.snapshot.parity_build import ParityBuild, ParityRequest, RowWriter
from outlast.snapshot.peers import Peers
from outlast.snapshot.wire import Channel, Deadline, ImageName, KeeperClient

PIECE = 512 * 1024
"""Bytes of each chunk that are in hand at a time (128 KiB was slower; 256 KiB to 1 MiB differ less than runs do)."""


@dataclass(frozen=True)
class EncodeRequest:
    """A node's part in protecting a generation.

    ``groups`` has for each local rank the group, with this node's own ``index``; ``targets`` are the members whose
    parity images are to be made, by default all.
    """

    attempt: Attempt
    generation: Generation
    slot: int
    groups: Mapping[int, GroupInfo]
    targets: frozenset[int]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncodeRequest:
        seats, parity, index = tuple(data["group"]["seats"]), int(data["group"]["parity"]), int(data["index"])
        targets = data.get("targets")
        return cls(
            attempt=Attempt(int(data["attempt"]), str(data["incarnation"])),
            generation=Generation.parse(data["generation"]),
            slot=int(data["slot"]),
            groups={
                int(local_rank): GroupInfo(seats, parity, tuple(lengths), index)
                for local_rank, lengths in sorted(data["group"]["lengths"].items())
            },
            targets=frozenset(range(len(seats)) if targets is None else targets),
        )

    def for_member(self, local_rank: int, member: int) -> ParityRequest:
        """The parity image of a member."""
        group = replace(self.groups[local_rank], index=member)
        return ParityRequest(self.attempt, self.generation, self.slot, local_rank, group)


class Encoding:
    """One run of `EncodeRequest`; ``peers`` are keyed by member. Any thread may ``cancel`` it."""

    def __init__(self, store: Store, peers: Peers[int], request: EncodeRequest, deadline: Deadline) -> None:
        self._store = store
        self._peers = peers
        self._request = request
        self._deadline = deadline
        self._stopped = threading.Event()
        self._builds: dict[int, ParityBuild] = {}

    def run(self) -> dict[str, Any]:
        """Encode, push, and wait until the own parity images are sealed. Gives {bytes encoded, seconds}.

        Raises CapacityError, StaleAttemptError, ImageError when a member does not hold its image of the generation,
        TransferError when a peer is gone or its rows do not come before the deadline.
        """
        started, encoded = time.monotonic(), 0
        protected = {rank: group for rank, group in self._request.groups.items() if group.parity}
        for local_rank, group in protected.items():
            self._begin(local_rank, group)
        with self._peers:
            for local_rank, group in protected.items():
                encoded += self._encode(local_rank, group)
        for build in self._builds.values():
            build.wait_sealed(self._deadline, self._stopped.is_set)
        return {"bytes": encoded, "seconds": time.monotonic() - started}

    def cancel(self) -> None:
        """End it soon, from any thread."""
        self._stopped.set()
        self._peers.shutdown()
        for build in list(self._builds.values()):
            build.wake()

    def _begin(self, local_rank: int, group: GroupInfo) -> None:
        if group.index in self._request.targets:
            request = self._request.for_member(local_rank, group.index)
            build = self._store.parity_build(request, self._deadline)
            if build:
                self._builds[local_rank] = build

    def _encode(self, local_rank: int, group: GroupInfo) -> int:
        """The stripe that is this member's to encode, of one local rank; how many bytes were pulled."""
        layout, build = group.layout(), self._builds.get(local_rank)
        with ExitStack() as stack:
            own = None
            if build:
                own = stack.enter_context(build.writing((group.index, 0), self.cancel, self._deadline))
            pushes = self._open_pushes(local_rank, group.index, layout)
            if own is None and not pushes:
                return 0
            sources = self._open_sources(local_rank, group, layout)
            _Stripe(layout, group.index, own, pushes, sources, self._deadline).run(self._check)
            for member, client in sources.items():
                client.confirm(self._source_name(group, member, local_rank), self._deadline)
            for client in pushes.values():
                client.put_done(self._deadline)
            if own:
                own.complete()
        return sum(layout.data_bytes(member, group.index) for member in sources)

    def _open_pushes(self, local_rank: int, stripe: int, layout: GroupLayout) -> dict[int, KeeperClient]:
        """By row, the connections on which a holder waits for it."""
        pushes = {}
        for row in range(1, layout.m):
            member = layout.parity_member(stripe, row)
            if member not in self._request.targets:
                continue
            client = self._peers.client(member, self._deadline)
            request = self._request.for_member(local_rank, member).to_json()
            if client.put(self._deadline, **request, stripe=stripe, row=row):
                pushes[row] = client
        return pushes

    def _open_sources(self, local_rank: int, group: GroupInfo, layout: GroupLayout) -> dict[int, KeeperClient]:
        """By member, the connections on which the stripe's data comes."""
        sources = {}
        for member in layout.data_members(group.index):
            nbytes, chunk = layout.data_bytes(member, group.index), layout.chunk_of(member, group.index)
            if nbytes and chunk is not None:
                client = self._peers.client(member, self._deadline)
                name = self._source_name(group, member, local_rank)
                client.begin_read(name, [(chunk * layout.chunk, nbytes, "")], self._deadline)
                sources[member] = client
        return sources

    def _source_name(self, group: GroupInfo, member: int, local_rank: int) -> ImageName:
        return ImageName("shard", local_rank, self._request.generation, group.seats[member])

    def _check(self) -> None:
        if self._stopped.is_set():
            raise StaleAttemptError(f"generation {self._request.generation}: the encoding was ended from outside")


class _Stripe:
    """The pieces of one stripe on their way: received, encoded, kept or pushed."""

    def __init__(
        self,
        layout: GroupLayout,
        stripe: int,
        own: RowWriter | None,
        pushes: Mapping[int, KeeperClient],
        sources: Mapping[int, KeeperClient],
        deadline: Deadline,
    ) -> None:
        self._ranges = encode_ranges(layout, stripe)
        self._own, self._pushes, self._sources, self._deadline = own, pushes, sources, deadline
        self._codec = Codec(layout.k, layout.m)
        self._data = {member: memoryview(bytearray(PIECE)) for member in sources}
        self._rows = {row: memoryview(bytearray(PIECE)) for row in pushes}
        self._wanted = [layout.k + row for row in ([0] if own else []) + list(pushes)]

    def run(self, check: Callable[[], None]) -> None:
        for step in self._ranges:
            for piece in step.pieces(PIECE):
                check()
                self._piece(piece)

    def _piece(self, piece: DecodeRange) -> None:
        size = piece.nbytes
        present: dict[int, memoryview | None] = {}
        for part in piece.sources:
            present[part.index] = None
            if part.kind != "zeros":
                data = present[part.index] = self._data[part.member][:size]
                self._sources[part.member].receive(data, self._deadline)
        rows = {row: buffer[:size] for row, buffer in self._rows.items()}
        out = ([self._own.next(size)] if self._own else []) + list(rows.values())
        self._codec.decode(present, self._wanted, out)
        if self._own:
            self._own.advance(size)
        for row, client in self._pushes.items():
            client.send(rows[row], self._deadline)


def receive_parity(store: Store, channel: Channel, message: Mapping[str, Any], deadline: Deadline) -> None:
    """Answer a peer's push: say whether it is wanted, then take its bytes into place.

    Raises, before it was said to be wanted, StaleAttemptError, CapacityError, TransferError. After that the connection
    is shut down when anything goes wrong, since it is in the middle of the bytes.
    """
    request, slot = ParityRequest.from_json(message), (int(message["stripe"]), int(message["row"]))
    if slot not in request.group.layout().parity_slots(request.group.index):
        raise RequestError(f"parity {slot} is not held by member {request.group.index} of its group")
    with store.fence.writing(request.attempt, channel.shutdown), ExitStack() as stack:
        build = store.parity_build(request, deadline)
        row = stack.enter_context(build.writing(slot, channel.shutdown, deadline)) if build else None
        channel.send({"ok": True, "want": row is not None}, deadline)
        if row:
            try:
                _receive_row(channel, row, deadline)
            except OutlastError:
                channel.shutdown()


def _receive_row(channel: Channel, row: RowWriter, deadline: Deadline) -> None:
    left = row.length
    while left:
        place = row.next(PIECE)
        channel.recv_into(place, deadline)
        row.advance(len(place))
        left -= len(place)
    if channel.recv(deadline).get("op") != "put_done":
        raise TransferError(f"{channel.peer}: no put_done after the bytes of a row")
    row.complete()
    channel.send({"ok": True}, deadline)
