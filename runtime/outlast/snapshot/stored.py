"""What is known of a checkpoint when a restore is planned: which images of which generation lie in which store. Pure.

A checkpoint is one generation's images as they were in memory, so whatever can read an image from a keeper can read it
from a store. JSON by ``to_json`` and ``from_json`` (which raises ValueError, KeyError or TypeError for anything else).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from outlast.snapshot.identity import Generation

Json = dict[str, Any]


@dataclass(frozen=True)
class StoredImage:
    """One rank's image in a store. ``key`` is relative to the job's own URL; ``size`` in bytes; ``checksum``: XXH64 of
    the image's block checksums, 16 hexadecimal digits, as in its footer."""

    rank: int
    seat: int
    local_rank: int
    key: str
    size: int
    checksum: str

    def to_json(self) -> Json:
        return {
            "rank": self.rank,
            "seat": self.seat,
            "local_rank": self.local_rank,
            "key": self.key,
            "size": self.size,
            "checksum": self.checksum,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoredImage:
        return cls(
            rank=int(data["rank"]),
            seat=int(data["seat"]),
            local_rank=int(data["local_rank"]),
            key=str(data["key"]),
            size=int(data["size"]),
            checksum=str(data["checksum"]),
        )


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint. ``url``: the job's own, ``<store>/<namespace>/<name>``; ``nodes`` times ``procs`` ranks
    wrote it; ``about``: fingerprints and the mesh, as its manifest has them; ``foreign``: it is another job's (of
    ``restoreFrom``), so that its generation means nothing among this job's own."""

    generation: Generation
    url: str
    nodes: int
    procs: int
    images: tuple[StoredImage, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    foreign: bool = False

    @property
    def world(self) -> int:
        """Ranks that wrote it."""
        return self.nodes * self.procs

    def to_json(self) -> Json:
        return {
            "generation": str(self.generation),
            "url": self.url,
            "nodes": self.nodes,
            "procs": self.procs,
            "images": [image.to_json() for image in self.images],
            "about": dict(self.about),
            "foreign": self.foreign,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoredCheckpoint:
        return cls(
            generation=Generation.parse(data["generation"]),
            url=str(data["url"]),
            nodes=int(data["nodes"]),
            procs=int(data["procs"]),
            images=tuple(StoredImage.from_json(image) for image in data["images"]),
            about=dict(data.get("about", {})),
            foreign=bool(data.get("foreign", False)),
        )


@dataclass(frozen=True)
class TransferLimits:
    """``bandwidth``: bytes a second for all transfers of the process together, None for no limit; ``patience_s``: how
    long a store that does not answer is asked again; ``cancelled``: whether the work is not wanted any more."""

    bandwidth: int | None = None
    patience_s: float = 120.0
    cancelled: Callable[[], bool] = lambda: False


class ObjectTier(Protocol):
    """What a keeper is given to reach object storage: the snapshot tier itself knows no store.

    ``url`` is a job's own URL and ``key`` relative to it. ``cancelled`` is asked between pieces; when it says yes the
    call ends with StaleAttemptError and leaves nothing that could be taken for an object. Both raise StoreError
    (StoreUnavailable after retrying for ``patience_s``; StoreDenied at once), CheckpointError for bytes that cannot be
    right, and may be called from several threads.
    """

    def upload(self, url: str, key: str, data: memoryview, limits: TransferLimits) -> None:
        """Make the object ``key`` out of ``data``, which stays as it is meanwhile, without a second copy in memory."""
        ...

    def fetch(self, url: str, key: str, target: memoryview, limits: TransferLimits) -> None:
        """Fill ``target`` with the object, which must have exactly that size (CheckpointError if not)."""
        ...

    def trouble(self) -> str | None:
        """Why transfers wait for the store, as it said last; None while none waits."""
        ...
