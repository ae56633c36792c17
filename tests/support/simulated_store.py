"""A simulated object store with the driver's part in it: claims, images, checkpoints, outages, bad objects."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from outlast.messages.events import StoreTrouble
from outlast.messages.instructions import CommitCheckpoint
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.stored import StoredCheckpoint, StoredImage

URL = "s3://bucket/default/job"


@dataclass
class SimStore:
    """``trouble``: what every request meets now; ``images``: (generation, rank) of objects, True when they are sound;
    ``line``: the checkpoints, oldest first; ``owner``: who has claimed them; ``foreign``: what another job lends, and
    ``lender``: what requests to that one's store meet."""

    upload_s: float = 0.3
    trouble: StoreTrouble | None = None
    images: dict[tuple[Generation, int], bool] = field(default_factory=dict)
    line: list[StoredCheckpoint] = field(default_factory=list)
    foreign: list[StoredCheckpoint] = field(default_factory=list)
    quarantined: list[Generation] = field(default_factory=list)
    lender: StoreTrouble | None = None
    owner: int | None = None
    attempt: Attempt | None = None
    keep: int = 3
    committed: list[Generation] = field(default_factory=list)

    def recover(self) -> None:
        """Whatever was the matter is over."""
        self.trouble = None

    def claim(self, owner: int, attempt: Attempt) -> StoreTrouble | None:
        """Claim for a controller; what is the matter, if anything."""
        if self.trouble is None and self.owner is not None and owner < self.owner:
            return "lost"
        if self.trouble is None:
            self.owner, self.attempt = owner, attempt
        return self.trouble

    def unseen(self) -> str:
        """Why what another job lends cannot be had, "" when it can or does not matter."""
        if not self.foreign or self.restorable():
            return ""
        return f"the lender is {self.lender}" if self.lender else "what restoreFrom names is damaged"

    def restorable(self) -> tuple[StoredCheckpoint, ...]:
        """What ``Claimed`` says: those that lack no object."""
        whole = [c for c in self.line if all((c.generation, image.rank) in self.images for image in c.images)]
        lent = [c for c in self.foreign if c.generation not in self.quarantined and self.lender is None]
        return (*reversed(whole), *lent)

    def put(self, generation: Generation, seat: int, procs: int, length: int) -> tuple[StoredImage, ...]:
        """The images of a seat arrive."""
        images = []
        for local in range(procs):
            rank = seat * procs + local
            self.images[generation, rank] = True
            images.append(StoredImage(rank, seat, local, f"{generation}/rank-{rank:05d}.safetensors", length, "0" * 16))
        return tuple(images)

    def commit(self, owner: int, order: CommitCheckpoint) -> StoredCheckpoint | StoreTrouble:
        """Move the head forward."""
        if self.trouble is not None:
            return self.trouble
        if owner != self.owner:
            return "lost"
        assert len(order.images) == order.nodes * order.procs == len({image.rank for image in order.images})
        assert all((order.generation, image.rank) in self.images for image in order.images), "an image is missing"
        for old in [old for old in self.line if old.generation.step >= order.generation.step]:
            self._supersede(old, order.generation)
        found = StoredCheckpoint(order.generation, URL, order.nodes, order.procs, order.images, order.about)
        self.line.append(found)
        self.committed.append(order.generation)
        for old in self.line[: -self.keep]:
            self.drop(old)
        self.line = self.line[-self.keep :]
        return found

    def _supersede(self, old: StoredCheckpoint, new: Generation) -> None:
        """The same is replaced, and an abandoned branch ends; an attempt itself only moves forward."""
        assert old.generation <= new, f"{new} is committed after {old.generation}"
        self.line.remove(old)
        if old.generation != new:
            self.drop(old)

    def drop(self, checkpoint: StoredCheckpoint) -> None:
        """Delete the objects of one."""
        for image in checkpoint.images:
            self.images.pop((checkpoint.generation, image.rank), None)

    def quarantine(self, generation: Generation) -> None:
        """Take it out of the line."""
        self.quarantined.append(generation)
        self.line = [checkpoint for checkpoint in self.line if checkpoint.generation != generation]

    def read(self, generation: Generation, rank: int, foreign: bool) -> StoreTrouble | None:
        """Read one image; what is the matter, if anything."""
        if self.trouble is not None or foreign:
            return self.trouble
        return None if self.images.get((generation, rank)) else "bad"

    def spoil(self, position: int = -1, *, lose: bool = False) -> None:
        """Flip bytes in an image of a checkpoint of the line, or lose the image."""
        if not -len(self.line) <= position < len(self.line):
            return
        key = (self.line[position].generation, self.line[position].images[-1].rank)
        if lose:
            self.images.pop(key, None)
        elif key in self.images:
            self.images[key] = False

    def lend(self, step: int, nodes: int, procs: int, about: dict[str, str] | None = None) -> StoredCheckpoint:
        """Another job's checkpoint to begin with."""
        generation = Generation(7, step, "f" * 16)
        ranks = range(nodes * procs)
        images = tuple(StoredImage(rank, *divmod(rank, procs), f"{rank}", 1 << 20, "0" * 16) for rank in ranks)
        found = StoredCheckpoint(generation, "s3://bucket/other", nodes, procs, images, about or {}, foreign=True)
        self.foreign.append(replace(found))
        return found
