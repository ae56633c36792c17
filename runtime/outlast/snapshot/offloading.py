"""Putting a node's images of one generation into object storage, straight from the memory in which they are.

::

    find the seat's sealed images -> each: verify every block -> upload from the mapping -> still sealed as before?

Whatever is not verified is not uploaded, and what lost its seal meanwhile is not reported: an object of which nobody
was told is garbage, whatever it holds. Nothing of the node's memory is written or locked, so ranks copy into other
slots, and keepers encode, as if there were no upload; the images go one after the other, each in parallel parts, so the
store's parts are all the memory that it takes. Of two uploads that are asked for the later one ends the earlier.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from outlast.errors import ImageError, StaleAttemptError
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.image import ImageFile
from outlast.snapshot.keeper_store import Store
from outlast.snapshot.stored import ObjectTier, StoredImage, TransferLimits
from outlast.snapshot.wire import Deadline, ImageName

NO_TIER = "the job has no object tier: set spec.checkpoint.url"


@dataclass(frozen=True)
class UploadRequest:
    """Which images go where. ``url``: the job's own; ``bandwidth``: bytes a second, None for no limit; ``procs``: how
    many local ranks there are, None for those of which there are files."""

    attempt: Attempt
    generation: Generation
    seat: int
    url: str
    bandwidth: int | None
    procs: int | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UploadRequest:
        bandwidth, procs = data.get("bandwidth"), data.get("procs")
        return cls(
            attempt=Attempt(int(data["attempt"]), str(data["incarnation"])),
            generation=Generation.parse(data["generation"]),
            seat=int(data["seat"]),
            url=str(data["url"]),
            bandwidth=None if bandwidth is None else int(bandwidth),
            procs=None if procs is None else int(procs),
        )


def object_key(generation: Generation, rank: int) -> str:
    """Where a rank's image lies, below the job's URL."""
    return f"{generation}/rank-{rank:05d}.safetensors"


class Upload:
    """One run of an `UploadRequest`. Any thread may ``cancel`` it."""

    def __init__(self, store: Store, objects: ObjectTier, request: UploadRequest, deadline: Deadline) -> None:
        self._store = store
        self._objects = objects
        self._request = request
        self._deadline = deadline
        self._stopped = threading.Event()

    def run(self) -> dict[str, Any]:
        """Upload them all. Gives {images: `StoredImage` in JSON, bytes, seconds}.

        Raises ImageError when an image is not held, does not verify or loses its seal, StaleAttemptError when it was
        ended from outside, TransferError at the deadline, and what the object tier raises.
        """
        started = time.monotonic()
        with ExitStack() as stack:
            names = [self._name(local_rank) for local_rank in self._local_ranks()]
            images = [stack.enter_context(closing(self._store.find(name))) for name in names]
            stored = [self._upload(image) for image in images]
        sent = sum(image.size for image in stored)
        return {"images": [image.to_json() for image in stored], "bytes": sent, "seconds": time.monotonic() - started}

    def cancel(self) -> None:
        """End it soon, from any thread."""
        self._stopped.set()

    def _local_ranks(self) -> Sequence[int]:
        if self._request.procs is not None:
            return range(self._request.procs)
        return sorted({place.local_rank for place in self._store.places() if place.kind == "shard"})

    def _name(self, local_rank: int) -> ImageName:
        return ImageName("shard", local_rank, self._request.generation, self._request.seat)

    def _upload(self, image: ImageFile) -> StoredImage:
        stored = self._verified(image)
        limits = TransferLimits(self._request.bandwidth, cancelled=lambda: self._is_over(image))
        try:
            self._objects.upload(self._request.url, stored.key, image.view(0, stored.size), limits)
        except StaleAttemptError:
            self._check(image, stored)
            raise
        self._check(image, stored)
        return stored

    def _verified(self, image: ImageFile) -> StoredImage:
        """What the image will be in the store. Raises ImageError unless it is sealed and every block verifies."""
        request, meta = self._request, image.layout.meta
        digest, bad = image.digest, [block for block, good in enumerate(image.verify()) if not good]
        if bad:
            raise ImageError(f"{image.path}: {len(bad)} blocks do not verify, first {bad[0]}: not uploaded")
        try:
            rank, local_rank = int(meta["rank"]), int(meta["local_rank"])
        except (KeyError, ValueError) as error:
            raise ImageError(f"{image.path}: its header does not say its rank: {error!r}") from error
        key, size = object_key(request.generation, rank), image.layout.total_bytes
        return StoredImage(rank, request.seat, local_rank, key, size, str(digest))

    def _is_over(self, image: ImageFile) -> bool:
        late = time.monotonic() >= self._deadline.at
        return self._stopped.is_set() or late or image.generation != self._request.generation

    def _check(self, image: ImageFile, stored: StoredImage) -> None:
        """Raises unless it goes on as it began."""
        if self._stopped.is_set():
            raise StaleAttemptError(f"{self._name(stored.local_rank)}: the upload was ended from outside")
        if (image.generation, image.digest) != (self._request.generation, stored.checksum):
            raise ImageError(f"{self._name(stored.local_rank)} was overwritten while it was uploaded")
        self._deadline.on(f"{stored.key} to be uploaded").left()


class Uploads:
    """One upload at a time. Threads may share it."""

    def __init__(self) -> None:
        self._entering, self._running = threading.Lock(), threading.Lock()
        self._newest: Upload | None = None

    @contextmanager
    def alone(self, upload: Upload, deadline: Deadline) -> Iterator[None]:
        """Run ``upload`` within this block, after the one before it was ended. Raises TransferError when that does not
        leave before the deadline."""
        with self._entering:
            if self._newest is not None:
                self._newest.cancel()
            self._newest = upload
        if not self._running.acquire(timeout=deadline.left()):
            raise deadline.on("the upload before to end").error()
        try:
            yield
        finally:
            self._running.release()
