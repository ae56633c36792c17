"""Images of objects that live in this process, and a store in memory to read them from."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from outlast.checkpoint.store import ObjectInfo
from outlast.errors import CheckpointError, ObjectMissing
from outlast.protect import rng
from outlast.protect.capture import Capture, Seat
from outlast.protect.leaves import Collector
from outlast.snapshot.identity import Generation

GENERATION = Generation(1, 5, "ab" * 8)


class Objects:
    """A store in memory that notes what is read."""

    def __init__(self, **objects: bytes) -> None:
        self.url = "s3://bucket"
        self.objects: dict[str, bytes] = dict(objects)
        self.reads: list[tuple[int, int]] = []

    def head(self, key: str) -> ObjectInfo:
        if key not in self.objects:
            raise ObjectMissing(f"{self.url}/{key} is not there")
        return ObjectInfo(key, len(self.objects[key]), "etag", 0.0)

    def read_into(self, key: str, offset: int, target: memoryview, cancelled: Any = None) -> None:
        self.reads.append((offset, len(target)))
        data = self.objects[key][offset : offset + len(target)]
        if len(data) != len(target):
            raise CheckpointError(f"{self.url}/{key} ends before")
        target[:] = data

    def get(self, key: str) -> tuple[bytes, str]:
        self.head(key)
        return self.objects[key], str(hash(self.objects[key]))

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        self.objects[key] = data
        return str(hash(data))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return (self.head(key) for key in sorted(self.objects) if key.startswith(prefix))

    def close(self) -> None:
        """Nothing is held."""


def image(folder: pathlib.Path, objects: dict[str, Any], rank: int = 0, world: int = 1, cut: Any = None) -> bytes:
    """The bytes of a rank's image; the file stays as slot-RANK-0.img."""
    capture = Capture(Collector(objects), Seat(folder, rank, world, rank, rank))
    moment = capture.observe({"step": 5, "rng": rng.capture(), "ddp": [], "environment": {}})
    lazy = {leaf.key: tuple(range(world)) for leaf in moment.leaves.values() if leaf.lazy}
    capture.make_plan(moment, (lazy if cut is None else cut) if world > 1 else {})
    capture.start(moment, GENERATION, 0, fresh=False).wait(60)
    capture.close()
    capture.copier.close()
    return (folder / f"slot-{rank}-0.img").read_bytes()
