"""The images of one node: what is held, what is sound, what there is room for. No sockets.

::

    slot-{local_rank}-{slot}.img     written by a rank (or by a rebuild)
    parity-{local_rank}-{slot}.img   written by this keeper
    *.img.rebuild                    an image that is being rebuilt; a leftover of a keeper that died is removed
    commit.json fence.json           the newest commit it was told, the attempt in force

A slot from ``GUEST_SLOT`` on is a guest's: an image of an old world's seat, for others to read until the next commit.

Files are looked up anew for every operation: a rank may replace its own at any time, and a mapping that is kept would
pin the memory of the old one. Only parity images, which nobody else writes, stay mapped.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.errors import CapacityError, ImageError, StaleAttemptError
from outlast.snapshot.fence import Fence, read_json, write_json
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import BLOCK, ImageFile, allocate
from outlast.snapshot.inventory import GUEST_SLOT, GroupInfo, HeldImage, Inventory, Kind
from outlast.snapshot.parity_build import ParityBuild, ParityRequest, parity_layout
from outlast.snapshot.wire import Deadline, ImageName

_FILE = re.compile(r"(slot|parity)-(\d+)-(\d+)\.img")
_PREFIX: Mapping[Kind, str] = {"shard": "slot", "parity": "parity"}
REBUILDING = ".rebuild"


@dataclass(frozen=True)
class Place:
    """Where an image lies: its kind, the local rank that it is of, and the slot."""

    kind: Kind
    local_rank: int
    slot: int

    @property
    def file_name(self) -> str:
        return f"{_PREFIX[self.kind]}-{self.local_rank}-{self.slot}.img"


class Store:
    """The memory directory of one node. ``max_memory``: bytes that all its images may take; None for no limit but the
    file system's. Threads may share it."""

    def __init__(self, node: str, memory_dir: Path, max_memory: int | None) -> None:
        self.node = node
        self.dir = memory_dir
        self.max_memory = max_memory
        memory_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in memory_dir.glob(f"*{REBUILDING}"):
            leftover.unlink()
        self.fence = Fence(memory_dir / "fence.json")
        self._lock = threading.RLock()
        self._builds: dict[Place, ParityBuild] = {}

    def path(self, place: Place) -> Path:
        return self.dir / place.file_name

    def places(self) -> Iterator[Place]:
        """All image files, in a fixed order."""
        for name in sorted(path.name for path in self.dir.iterdir()):
            if match := _FILE.fullmatch(name):
                yield Place("shard" if match[1] == "slot" else "parity", int(match[2]), int(match[3]))

    def find(self, name: ImageName) -> ImageFile:
        """The sealed image of that name. Raises ImageError that says what is held instead."""
        held = []
        for place in self.places():
            if (place.kind, place.local_rank) != (name.kind, name.local_rank):
                continue
            try:
                image = ImageFile.open(self.path(place))
            except (ImageError, FileNotFoundError):
                continue
            seat = image.layout.meta.get("seat")
            if image.generation == name.generation and (name.seat is None or seat == str(name.seat)):
                return image
            held.append(f"slot {place.slot}: seat {seat}, {image.generation or 'unsealed'}")
            image.close()
        raise ImageError(f"{self.node} does not hold {name} (held: {'; '.join(held) or 'none of that local rank'})")

    def status(self) -> dict[str, Any]:
        """What is held, without verifying it."""
        held = [image for place in self.places() if (image := self._look(place)) is not None]
        attempt = self.fence.current
        return {
            "node": self.node,
            "commit": self.commit,
            "attempt": attempt and str(attempt),
            "used": self.used(),
            "max_memory": self.max_memory,
            "available": self.available(),
            "images": [image.to_json() for image in held],
        }

    def inventory(self) -> tuple[Inventory, list[str]]:
        """Every sealed image, all its bytes verified; and, as text, what is wrong with those that are no use at all."""
        images, damaged = [], []
        for place in self.places():
            try:
                images.append(self._held(place, verify=True))
            except FileNotFoundError:
                continue
            except ImageError as error:
                damaged.append(f"{place.file_name}: {error}")
        return Inventory(self.node, tuple(images)), damaged

    @property
    def commit(self) -> str | None:
        """The newest commit that this keeper was told of."""
        stored = read_json(self.dir / "commit.json")
        return str(stored["generation"]) if stored else None

    def remember_commit(self, generation: Generation) -> None:
        """For people and /status: recovery trusts what it verifies."""
        write_json(self.dir / "commit.json", {"generation": str(generation)})

    def used(self) -> int:
        """Bytes of all image files."""
        return sum(_size(path) for path in self.dir.iterdir() if ".img" in path.name)

    def available(self) -> int:
        """Bytes that the node's images may take in all: those there are, and what there is room for."""
        stat, used = os.statvfs(self.dir), self.used()
        room = used + stat.f_bavail * stat.f_frsize
        return room if self.max_memory is None else min(room, self.max_memory)

    def require(self, path: Path, nbytes: int) -> None:
        """Make sure that ``path`` may become ``nbytes`` long. Raises CapacityError that says how much is missing."""
        needed, available = self.used() - _size(path) + nbytes, self.available()
        if needed > available:
            raise CapacityError(
                f"{self.node}: {path.name} needs {nbytes} bytes; with it the node's images take {needed} bytes, but "
                f"{available} are available ({self._limit()}): {needed - available} bytes are missing. Raise "
                "snapshot.maxMemory or the memory of the node, or use less parity or more nodes"
            )

    def allocate(self, path: Path, nbytes: int) -> mmap.mmap:
        """A new file of ``nbytes``, mapped. Raises CapacityError."""
        with self._lock:
            self.require(path, nbytes)
            return allocate(path, nbytes)

    def parity_build(self, request: ParityRequest, deadline: Deadline) -> ParityBuild | None:
        """The build of a parity image, begun if need be; None when the image is there and sound.

        Raises StaleAttemptError when the slot is used for a newer generation, CapacityError, TransferError.
        """
        place = Place("parity", request.local_rank, request.slot)
        with self._lock:
            former = self._builds.get(place)
            if former and former.request == request and not former.sealed:
                return former
            if former:
                self._give_up(former, request, deadline)
                del self._builds[place]
            if self._sound(place, request):
                return None
            build = ParityBuild(self._parity_image(place, request, former), request)
            self._builds[place] = build
            return build

    def drop_leftovers(self, committed: Generation, slots: int, procs: int, deadline: Deadline) -> int:
        """Remove what is of no use once ``committed`` is: guests of other generations, images of slots and local ranks
        that the job does not have, and parity of groups that are no more. How many images that were.
        """
        places = list(self.places())
        useless = {place for place in places if place.local_rank >= procs or slots <= place.slot < GUEST_SLOT}
        useless |= {place for place in places if place.slot >= GUEST_SLOT and self._generation(place) != committed}
        useless |= self._stale_parity(committed)
        for place in useless:
            self._remove(place, deadline)
        return len(useless)

    def _stale_parity(self, committed: Generation) -> set[Place]:
        """Parity of earlier attempts that no build will take the place of, since this node's group is another now."""
        places = [place for place in self.places() if place.kind == "parity"]
        held = {place: image for place in places if (image := self._look(place)) is not None}
        groups = {_seats(image) for image in held.values() if image.generation == committed}
        older = {place for place, image in held.items() if image.generation.attempt < committed.attempt}
        return {place for place in older if _seats(held[place]) not in groups}

    def _give_up(self, former: ParityBuild, request: ParityRequest, deadline: Deadline) -> None:
        """End the slot's former build, unless it is the newer of the two."""
        generation = former.request.generation
        if former.request.attempt == request.attempt and generation > request.generation:
            raise StaleAttemptError(f"slot {request.slot} is used for generation {generation} already")
        former.cancel(deadline)

    def _remove(self, place: Place, deadline: Deadline) -> None:
        with self._lock:
            if place in self._builds:
                build = self._builds.pop(place)
                build.cancel(deadline)
                build.image.close()
            self.path(place).unlink(missing_ok=True)

    def _generation(self, place: Place) -> Generation | None:
        image = self._look(place)
        return None if image is None else image.generation

    def _look(self, place: Place) -> HeldImage | None:
        """What is held there, without verifying it; None when that is nothing."""
        try:
            return self._held(place, verify=False)
        except (ImageError, FileNotFoundError):
            return None

    def _held(self, place: Place, *, verify: bool) -> HeldImage:
        """Raises ImageError when it is unsealed or its header or trailer are damaged."""
        image = ImageFile.open(self.path(place))
        try:
            generation, meta = image.generation, image.layout.meta
            if generation is None:
                raise ImageError("not sealed")
            bad = tuple(i for i, good in enumerate(image.verify()) if not good) if verify else ()
            if bad and bad[0] * BLOCK < image.layout.data_offset:
                raise ImageError("its header is damaged")
            group = GroupInfo.from_json(json.loads(meta["group"])) if place.kind == "parity" else None
            if image.generation != generation:
                raise ImageError("it was overwritten while it was verified")
            return HeldImage(
                node=self.node,
                seat=int(meta["seat"]),
                local_rank=place.local_rank,
                slot=place.slot,
                generation=generation,
                kind=place.kind,
                length=image.layout.total_bytes,
                bad_blocks=bad,
                group=group,
                world=int(meta.get("world", 0)),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ImageError(f"its header is no snapshot's: {error!r}") from error
        finally:
            image.close()

    def _sound(self, place: Place, request: ParityRequest) -> bool:
        """Whether the image asked for is there already, every block of it."""
        try:
            held = self._held(place, verify=False)
            if (held.generation, held.group) != (request.generation, request.group):
                return False
            return not self._held(place, verify=True).bad_blocks
        except (ImageError, FileNotFoundError):
            return False

    def _parity_image(self, place: Place, request: ParityRequest, former: ParityBuild | None) -> ImageFile:
        path, layout = self.path(place), parity_layout(request.group, request.local_rank)
        if former and former.image.layout == layout and path.exists():
            return former.image
        if former:
            former.image.close()
        self.require(path, layout.total_bytes)
        return ImageFile.create(path, layout)

    def _limit(self) -> str:
        return f"the file system of {self.dir}" if self.max_memory is None else f"maxMemory {self.max_memory}"


def _seats(parity: HeldImage) -> tuple[int, ...]:
    return parity.group.seats if parity.group else ()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
