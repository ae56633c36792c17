"""Where a rank's restore reads each rank's image from, as the agent's ``restore`` message says."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.errors import StateError
from outlast.protect.reload import LocalShard, ShardReader, Shards
from outlast.snapshot.identity import Generation
from outlast.snapshot.layout import Layout
from outlast.snapshot.wire import KeeperClient


class RemoteShard:
    """Another rank's image, read through the keeper that holds it."""

    def __init__(self, client: KeeperClient, generation: str, local_rank: int, seat: int) -> None:
        self._client, self._generation, self._local_rank, self._seat = client, generation, local_rank, seat
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
        self._client.read("shard", self._local_rank, self._generation, offset=offset, out=target, seat=self._seat)


@contextlib.contextmanager
def open_shards(message: Mapping[str, Any], rank: int) -> Iterator[Shards]:
    """The generation of a ``restore`` message; closes files and connections afterwards."""
    images, text = message["images"], message["plan"]["generation"]
    generation = Generation.parse(text)
    token = pathlib.Path(os.environ["OUTLAST_TOKEN_FILE"]).read_text().strip()
    own = images.get(str(rank), {})
    if "path" not in own:
        raise StateError(f"the agent offers rank {rank} no image of its own on this node (got {own})")
    with contextlib.ExitStack() as stack:

        def open_shard(other: int) -> ShardReader:
            where = images[str(other)]
            if "path" in where:
                shard = LocalShard(pathlib.Path(where["path"]), generation)
                stack.callback(shard.close)
                return shard
            client = stack.enter_context(contextlib.closing(KeeperClient(where["host"], where["port"], token, 60.0)))
            return RemoteShard(client, text, int(where["local_rank"]), int(where["seat"]))

        first = LocalShard(pathlib.Path(own["path"]), generation)
        stack.callback(first.close)
        yield Shards(first, open_shard, rank)
