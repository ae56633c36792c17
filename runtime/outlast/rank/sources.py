"""Where a rank's restore reads images from, as the agent's ``restore`` message says.

In the world that wrote the generation a rank has its own image on its node, and reads what other ranks hold for it
through their keepers. In a direct restore (another world, or another job's checkpoint) images lie at keepers, on this
node, or in the object store, and every rank reads what it needs of each.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.checkpoint.reading import ObjectShard
from outlast.checkpoint.store import Store, open_store
from outlast.errors import (
    CheckpointError,
    ImageError,
    ObjectMissing,
    OutlastError,
    StateError,
    StoreDenied,
    StoreUnavailable,
    TransferError,
)
from outlast.protect.shards import LocalPieces, LocalShard, ShardReader, Shards
from outlast.rank.link import AgentLink
from outlast.snapshot.identity import Generation
from outlast.snapshot.layout import Layout
from outlast.snapshot.wire import Deadline, ImageName, KeeperClient

KEEPER_SECONDS = 60.0
"""The longest that a keeper may take for one request."""
REQUESTS_PER_OBJECT = 3
"""Under way at a time; several objects are read at once, and a store keeps so many connections in all."""
REQUEST_BYTES = 64 << 20
REQUEST_RANGES = 4096

_TROUBLES: Sequence[tuple[tuple[type[Exception], ...], str]] = (
    ((CheckpointError, ObjectMissing), "bad"),
    ((StoreDenied,), "denied"),
    ((StoreUnavailable, TransferError, ImageError, OSError), "unavailable"),
)
"""An image in memory that is gone or damaged is looked for anew by the next attempt: the checkpoint is not bad."""


@dataclass(frozen=True)
class Restore:
    """A ``restore`` message that has a plan. ``images``: where each is, by (old) rank."""

    generation: Generation
    images: Mapping[int, Mapping[str, Any]]
    direct: bool
    sources: Mapping[str, str]

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Restore:
        plan = message["plan"]
        images = {int(rank): where for rank, where in message["images"].items()}
        generation = Generation.parse(plan["generation"])
        return cls(generation, images, bool(plan.get("direct")), plan.get("sources", {}))

    def source(self, rank: int) -> str:
        """What ``ready`` says of where the state came from."""
        if not self.direct:
            return self.sources.get(str(rank), "memory-local")
        return "object" if all("url" in where for where in self.images.values()) else "memory-peer"

    def label(self) -> str:
        """For errors: which checkpoint, if it is one."""
        urls = {str(where["url"]) for where in self.images.values() if "url" in where} if self.direct else set()
        return (
            f"the checkpoint of generation {self.generation} at {', '.join(sorted(urls))}" if urls else "the snapshot"
        )


class RemoteShard:
    """Another rank's image, read through the keeper that holds it."""

    def __init__(self, client: KeeperClient, generation: Generation, local_rank: int, seat: int) -> None:
        self._client, self._image = client, ImageName("shard", local_rank, generation, seat)
        self._layout: Layout | None = None

    def layout(self) -> Layout:
        if self._layout is None:
            header = self._read(0, 8 + int.from_bytes(self._read(0, 8), "little"))
            self._layout = Layout.parse(header)
        return self._layout

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, target: memoryview) -> None:
        self.read_many([(offset, target)])

    def read_many(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        for batch in _requests(reads):
            deadline = Deadline.after(KEEPER_SECONDS, f"reading {self._image}")
            self._client.begin_read(self._image, _joined(batch), deadline)
            for _, target in batch:
                self._client.receive(target, deadline)
            self._client.confirm(self._image, deadline)


def _requests(reads: Sequence[tuple[int, memoryview]]) -> Iterator[list[tuple[int, memoryview]]]:
    """Reads as one request each: as many ranges and bytes as a keeper sends well within its time."""
    batch: list[tuple[int, memoryview]] = []
    size = 0
    for offset, target in reads:
        for start in range(0, len(target), REQUEST_BYTES):
            piece = target[start : start + REQUEST_BYTES]
            if batch and (size + len(piece) > REQUEST_BYTES or len(batch) == REQUEST_RANGES):
                yield batch
                batch, size = [], 0
            batch.append((offset + start, piece))
            size += len(piece)
    if batch:
        yield batch


def _joined(reads: Sequence[tuple[int, memoryview]]) -> list[tuple[int, int, str]]:
    """The ranges that a keeper is asked for: neighbours are one, whose bytes come in the same order."""
    ranges: list[tuple[int, int, str]] = []
    for offset, target in reads:
        if ranges and sum(ranges[-1][:2]) == offset:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + len(target), "")
        else:
            ranges.append((offset, len(target), ""))
    return ranges


class _Opener:
    """Opens images, from any thread; all are closed with ``stack``."""

    def __init__(self, restore: Restore, stack: contextlib.ExitStack) -> None:
        self._restore, self._stack = restore, stack
        self._token = pathlib.Path(os.environ["OUTLAST_TOKEN_FILE"]).read_text().strip()
        self._lock = threading.Lock()
        self._stores: dict[str, Store] = {}

    def whole(self, rank: int) -> ShardReader:
        """This rank's own image, all of which is needed."""
        where = self._restore.images.get(rank, {})
        if "path" not in where:
            raise StateError(f"the agent offers rank {rank} no image of its own on this node (got {where})")
        return self._local(LocalShard, where["path"])

    def part(self, rank: int) -> ShardReader:
        """An image of which some is needed."""
        where = self._restore.images[rank]
        if "url" in where:
            store = self._store(where["url"])
            return ObjectShard(
                store, where["key"], self._restore.generation, REQUESTS_PER_OBJECT, where.get("checksum")
            )
        if "path" in where:
            return self._local(LocalPieces, where["path"])
        client = KeeperClient(where["host"], where["port"], self._token, KEEPER_SECONDS)
        self._stack.callback(client.close)
        return RemoteShard(client, self._restore.generation, int(where["local_rank"]), int(where["seat"]))

    def _local(self, kind: Callable[[pathlib.Path, Generation], LocalShard], path: str) -> ShardReader:
        shard = kind(pathlib.Path(path), self._restore.generation)
        self._stack.callback(shard.close)
        return shard

    def _store(self, url: str) -> Store:
        with self._lock:
            if url not in self._stores:
                store = self._stores[url] = open_store(url)
                self._stack.callback(store.close)
            return self._stores[url]


@contextlib.contextmanager
def open_shards(restore: Restore, rank: int, world: int) -> Iterator[Shards]:
    """A generation as ``rank`` of ``world`` sees it; closes files and connections afterwards."""
    old_world = len(restore.images)
    resized = old_world != world
    base = 0 if resized else rank
    with contextlib.ExitStack() as stack:
        opener = _Opener(restore, stack)
        own = opener.part(base) if restore.direct else opener.whole(base)
        yield Shards(own, opener.part, base, old_world, resized, turn=rank, label=restore.label())


@contextlib.contextmanager
def telling_failures(restore: Restore, link: AgentLink) -> Iterator[None]:
    """Tell the agent when a direct restore fails for what it reads from, so that the job can do without it."""
    try:
        yield
    except (OutlastError, OSError) as error:
        trouble = next((trouble for kinds, trouble in _TROUBLES if isinstance(error, kinds)), None)
        if restore.direct and trouble is not None:
            link.send("restore-failed", generation=str(restore.generation), reason=str(error), trouble=trouble)
        raise
