"""The checkpoint cycle of a job: the newest committed snapshot goes to the object store, one at a time. Pure.

::

    RESTING --due: Upload to all seats--> UPLOADING --Uploaded by all--> COMMITTING --CheckpointCommitted--> RESTING
                                          UPLOADING --UploadFailed by one, all have answered--> RESTING, a pause
                                                                 COMMITTING --CheckpointFailed--> RESTING, a pause

Nothing here holds training back. The slot of the generation on its way is ``pinned``, so that snapshots take turns in
the others. What is due while one is under way is skipped and counted, never queued; what failed is tried again with
the generation that is newest by then. A new attempt drops what was on its way: its fence ends the uploads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from outlast.controller.settings import CheckpointConfig
from outlast.controller.snapshot_work import Committed
from outlast.messages.events import CheckpointFailed, StoreTrouble, Uploaded, UploadFailed
from outlast.messages.instructions import CommitCheckpoint, Emit, Instruction, Upload
from outlast.snapshot.identity import Generation
from outlast.snapshot.stored import StoredCheckpoint, StoredImage

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 120.0
DENIED_PAUSE_S = 60.0
"""Somebody has to do something first."""
MUST_ACT = "(this does not pass by itself: a person must act)"
"""Said of what the store denies."""
AGAIN_S = 60.0
"""Nodes that have not answered for so long are told again: a call to an agent may fail while the agent lives on."""
SAME_REASON_S = 60.0
"""The same failure again is no news for so long."""


class Transfer(StrEnum):
    """What is under way."""

    RESTING = "resting"
    UPLOADING = "uploading"
    COMMITTING = "committing"


@dataclass
class CheckpointTotals:
    """Over all attempts of this controller. ``skipped``: intervals that ended without a checkpoint being begun;
    ``failed``: those begun and not completed; ``last_step``: of the newest that was completed."""

    count: int = 0
    skipped: int = 0
    failed: int = 0
    bytes: int = 0
    last_step: int | None = None
    last_error: str | None = None
    newest: Generation | None = None
    newest_at: float | None = None


@dataclass
class _Work:
    """The checkpoint under way. ``waiting``: nodes that have neither uploaded nor failed; ``failure``: the first;
    ``told_at``: when nodes were told last."""

    generation: Generation
    slot: int
    nodes: tuple[str, ...]
    waiting: set[str]
    began: float
    images: dict[str, tuple[StoredImage, ...]] = field(default_factory=dict)
    failure: tuple[str, StoreTrouble] | None = None
    told_at: float = -math.inf


class CheckpointCycle:
    """``interval``: seconds from one checkpoint to the next, asked where the config says neither steps nor seconds.

    Every method returns what is to be done.
    """

    def __init__(self, config: CheckpointConfig, procs: int, interval: Callable[[float], float]) -> None:
        self.config = config
        self.stage = Transfer.RESTING
        self.work: _Work | None = None
        self.totals = CheckpointTotals()
        self.about: dict[str, Any] = {}
        self._procs, self._interval = procs, interval
        self._done: tuple[Generation, dict[str, tuple[StoredImage, ...]]] | None = None
        self._damaged: set[Generation] = set()
        self._owed = False
        self._due_at: float | None = None
        self._multiple: int | None = None
        self._retry_at = -math.inf
        self._failures = 0
        self._urgent = False
        self._told: tuple[str, float] = ("", -math.inf)

    @property
    def pinned(self) -> int | None:
        """The slot that is being read."""
        return self.work.slot if self.work is not None else None

    def uploaded_by(self, node: str, generation: Generation) -> bool:
        """Whether a node's part of it is in the store."""
        held: list[tuple[Generation, Mapping[str, object]]] = [self._done] if self._done is not None else []
        held += [(self.work.generation, self.work.images)] if self.work is not None else []
        return any(known == generation and node in images for known, images in held)

    def damaged(self, generation: Generation) -> bool:
        """Whether a node cannot read its image of it."""
        return generation in self._damaged

    def drop(self) -> None:
        """A new attempt: what is under way ends with the old one."""
        self._rest()
        self._done = None
        self._multiple = None

    # --- begin ------------------------------------------------------------------------------------------------------

    def tick(
        self,
        newest: Committed | None,
        stored: StoredCheckpoint | None,
        nodes: tuple[str, ...],
        now: float,
        urgent: bool,
    ) -> list[Instruction]:
        """Begin a checkpoint of ``newest`` when one is due, or at once when it is ``urgent``.

        ``stored``: the newest in the store; ``nodes``: those with seats, none while the store is not claimed.
        """
        if urgent and not self._urgent:
            self._retry_at = -math.inf  # what failed before says little about now
        self._urgent = urgent
        step = newest.generation.step if newest is not None else 0
        newer = newest is not None and self._newer(newest.generation, stored)
        if self._due(step, stored, now, known=bool(nodes)):
            ready = bool(newer and nodes) and self.work is None and now >= self._retry_at
            self.totals.skipped += not ready
            self._owed = self._owed or self.work is None
        if self.stage is Transfer.UPLOADING:
            return self._tell_again(now)
        if newest is None or not newer or not nodes or self.work is not None or now < self._retry_at:
            return []
        return self._begin(newest, nodes, now) if self._owed or urgent or self._failures else []

    def _newer(self, generation: Generation, stored: StoredCheckpoint | None) -> bool:
        return generation not in self._damaged and (stored is None or stored.generation < generation)

    def _due(self, step: int, stored: StoredCheckpoint | None, now: float, known: bool) -> bool:
        """Whether one more interval has ended. ``known``: that ``stored`` is what is there."""
        every = self.config.interval_steps
        if every is not None:
            before = self._multiple
            if before is None and not known:
                return False
            if before is None:
                before = stored.generation.step // every if stored is not None else 0
            self._multiple = max(before, step // every)
            return self._multiple > before
        seconds = self.config.interval_s
        if seconds is None:
            seconds = self._interval(now)
        if self._due_at is None or now < self._due_at + seconds:
            self._due_at = now if self._due_at is None else self._due_at
            return False
        self._due_at = max(self._due_at + seconds, now - seconds)
        return True

    def _begin(self, newest: Committed, nodes: tuple[str, ...], now: float) -> list[Instruction]:
        generation = newest.generation
        done = self._done[1] if self._done is not None and self._done[0] == generation else {}
        waiting = set(nodes) - set(done)
        self.work = work = _Work(generation, newest.slot, nodes, waiting, now, dict(done), told_at=now)
        self.stage, self._owed, self._done = Transfer.UPLOADING, False, None
        fields = {"generation": str(generation), "step": generation.step}
        line = Emit("checkpoint-started", f"step {generation.step} goes to the store", fields)
        return [line, *(self._upload(tuple(n for n in nodes if n in waiting)) if waiting else self._commit(work))]

    def _upload(self, nodes: tuple[str, ...], *, again: bool = False) -> list[Instruction]:
        work, config = self.work, self.config
        return [Upload(nodes, work.generation, config.url, config.bandwidth, again)] if work is not None else []

    def _tell_again(self, now: float) -> list[Instruction]:
        work = self.work
        if work is None or now < work.told_at + AGAIN_S:
            return []
        work.told_at = now
        return self._upload(tuple(name for name in work.nodes if name in work.waiting), again=True)

    # --- upload -----------------------------------------------------------------------------------------------------

    def uploaded(self, event: Uploaded) -> list[Instruction]:
        """A node's images are in the store."""
        work = self._awaited(event.node, event.generation)
        if work is None:
            return []
        work.waiting.discard(event.node)
        work.images[event.node] = event.images
        return self._answered(work)

    def upload_failed(self, event: UploadFailed, now: float) -> list[Instruction]:
        """A node could not upload: nor will the whole be, but others are read to the end first."""
        work = self._awaited(event.node, event.generation)
        if work is None:
            return []
        work.waiting.discard(event.node)
        if event.trouble == "bad":
            self._damaged.add(work.generation)
        told = self._fail(work, f"{event.node}: {event.reason}", event.trouble, now) if work.failure is None else []
        return told + self._answered(work)

    def keeper_back(self, node: str) -> list[Instruction]:
        """A node's keeper or agent is another one: what it was told to upload is told again."""
        work = self.work
        if work is None or self.stage is not Transfer.UPLOADING or node not in work.waiting:
            return []
        if work.failure is None:
            return self._upload((node,))
        work.waiting.discard(node)
        return self._answered(work)

    def awaits(self, node: str, generation: Generation) -> bool:
        """Whether it is not known yet what became of this node's part."""
        return self._awaited(node, generation) is not None

    def _awaited(self, node: str, generation: Generation) -> _Work | None:
        work = self.work
        return work if work is not None and work.generation == generation and node in work.waiting else None

    def _answered(self, work: _Work) -> list[Instruction]:
        if work.waiting:
            return []
        if work.failure is None:
            return self._commit(work)
        self._done = (work.generation, work.images)
        self._rest()
        return []

    # --- commit -----------------------------------------------------------------------------------------------------

    def _commit(self, work: _Work) -> list[Instruction]:
        self.stage = Transfer.COMMITTING
        images = sorted((image for own in work.images.values() for image in own), key=lambda image: image.rank)
        return [CommitCheckpoint(work.generation, len(work.nodes), self._procs, tuple(images), dict(self.about))]

    def committed(self, checkpoint: StoredCheckpoint, now: float) -> list[Instruction]:
        """It is complete, though perhaps of an attempt that has ended since."""
        totals, work, generation = self.totals, self.work, checkpoint.generation
        seconds = None
        if work is not None and work.generation == generation:
            seconds = round(now - work.began, 3)
            self._rest()
            self._failures, self._told, totals.last_error = 0, ("", -math.inf), None
        size = sum(image.size for image in checkpoint.images)
        totals.count += 1
        totals.bytes += size
        totals.newest, totals.newest_at, totals.last_step = generation, now, generation.step
        fields = {"generation": str(generation), "step": generation.step, "bytes": size, "seconds": seconds}
        after = "" if seconds is None else f" after {seconds:.1f} s"
        return [Emit("checkpoint-committed", f"step {generation.step} is in the store{after}", fields)]

    def commit_failed(self, event: CheckpointFailed, now: float) -> list[Instruction]:
        """The manifest or the head could not be written: the images alone are no checkpoint."""
        work = self.work
        if work is None or self.stage is not Transfer.COMMITTING or work.generation != event.generation:
            return []
        told = self._fail(work, event.reason, event.trouble, now)
        self._rest()
        self._done = None if event.trouble == "bad" else (work.generation, work.images)
        return told

    # --- failure ----------------------------------------------------------------------------------------------------

    def _fail(self, work: _Work, reason: str, trouble: StoreTrouble, now: float) -> list[Instruction]:
        work.failure = (reason, trouble)
        self._failures += 1
        self.totals.failed += 1
        self.totals.last_error = reason
        pause_s = self._pause_s(work.generation, trouble)
        self._retry_at = now + pause_s
        if self._told[0] == reason and now - self._told[1] < SAME_REASON_S:
            return []
        self._told = (reason, now)
        what = f"tried again in {pause_s:.0f} s" if pause_s else "the next snapshot is tried"
        act = f" {MUST_ACT}" if trouble == "denied" else ""
        text = f"step {work.generation.step} is not in the store: {reason}{act}; {what}"
        fields = {"generation": str(work.generation), "step": work.generation.step}
        return [Emit("checkpoint-failed", text, {**fields, "reason": reason, "trouble": trouble})]

    def _pause_s(self, generation: Generation, trouble: StoreTrouble) -> float:
        if generation in self._damaged:
            return 0.0
        if trouble == "denied":
            return DENIED_PAUSE_S
        if self._urgent:
            return FIRST_PAUSE_S
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._failures - 1, 10))

    def _rest(self) -> None:
        self.work, self.stage = None, Transfer.RESTING
