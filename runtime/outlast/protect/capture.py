"""One snapshot of one rank: planned at most once per set of leaves, staged at the boundary, copied behind training.

The boundary stages what anything may change (eager leaves, JSON state); the copier then fills the image in the
background while forward and backward run; whoever is about to change parameters waits first (lazy copy after
DataStates-LLM; the waiting is ``outlast.rank.snapshots.Window``'s). ``Capture`` itself touches neither the network nor
the job's control.
"""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from outlast.errors import CapacityError
from outlast.protect.leaves import Collected, Collector, Leaf, dump
from outlast.protect.plan import STATE, Cut, Part, make_parts, state_capacity, state_entry
from outlast.protect.replicas import bytes_of
from outlast.protect.tree import flatten
from outlast.snapshot.copier import Copier, CopyTicket, Piece
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import ImageFile, Layout, plan_layout

MOST_FAILED_PLANS = 2
"""In a row; after that, tensors that come and go are stored whole instead of planned for again."""


@dataclass(frozen=True)
class Seat:
    """Where this rank's images live and what their headers say."""

    memory_dir: pathlib.Path
    rank: int
    world: int
    seat: int
    local_rank: int

    def image_path(self, slot: int) -> pathlib.Path:
        return self.memory_dir / f"slot-{self.local_rank}-{slot}.img"

    def meta(self) -> dict[str, str]:
        return {
            "kind": "shard",
            "rank": str(self.rank),
            "world": str(self.world),
            "seat": str(self.seat),
            "local_rank": str(self.local_rank),
        }


@dataclass(frozen=True)
class Moment:
    """All state at one boundary: live leaves and the JSON around them."""

    collected: Collected
    state: bytes

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        return self.collected.leaves

    def lazy_keys(self) -> frozenset[str]:
        return frozenset(leaf.key for leaf in self.leaves.values() if leaf.lazy)


@dataclass(frozen=True)
class SnapshotPlan:
    """Which part of which leaf goes where. ``voted``: the keys of the leaves that ranks compared for the cut."""

    signature: tuple[Any, ...]
    voted: frozenset[str]
    parts: tuple[Part, ...]
    layout: Layout
    cut: Cut
    eager: Mapping[str, Leaf]
    pieces: tuple[Piece, ...]
    """What the copier reads of lazy leaves: the same objects for as long as the signature stays the same."""


class Capture:
    """Takes snapshots of one rank's protected objects."""

    def __init__(self, collector: Collector, seat: Seat, copier: Copier | None = None) -> None:
        self.collector, self.seat = collector, seat
        self.copier = copier or Copier()
        self.plan: SnapshotPlan | None = None
        self.unsteady: frozenset[str] = frozenset()
        """Keys of lazy leaves that came or went since the plan was made, when plans before it had failed for that."""
        self._failed = 0
        self._seen: frozenset[str] | None = None
        self._images: dict[int, ImageFile] = {}
        self._made: set[int] = set()  # slots whose file this process made or took over
        self._allocating = threading.Lock()
        self._stages: dict[str, torch.Tensor] = {}

    def observe(self, extra: Mapping[str, Any]) -> Moment:
        """Look at all protected objects now; ``extra`` (the session's own state) is stored beside them."""
        collected = self.collector.collect()
        tensors: list[tuple[str, torch.Tensor]] = []
        session = dump(flatten(dict(extra), "__session__", tensors))
        for name, tensor in tensors:
            collected.leaves[name] = Leaf(name, tensor, False, tuple(tensor.shape), (0,) * tensor.dim(), False)
        objects = ",".join(f"{dump(key)}:{text}" for key, text in collected.state.items())
        state = f'{{"objects":{{{objects}}},"weights":{self.collector.weights},"session":{session}}}'
        return Moment(collected, state.encode())

    def needs_plan(self, moment: Moment) -> bool:
        """Whether ranks must agree (again) on how replicated state is cut. Ask once at each boundary to be copied.

        A leaf that was not voted on may be stored whole, but one that the cut names must be there: others hold the rest
        of it. So plans that fail in a row are kept until leaves stay the same from one such boundary to the next.
        """
        keys, plan = moment.lazy_keys(), self.plan
        same_as_before, self._seen = keys == self._seen, keys
        self.unsteady = frozenset()
        if plan is None or keys == plan.voted:
            self._failed = 0
            return plan is None
        if self._failed >= MOST_FAILED_PLANS:
            self.unsteady = keys ^ plan.voted
            if not same_as_before and plan.cut.keys() <= keys:
                return False
        self._failed += 1
        return True

    def votable(self, moment: Moment) -> frozenset[str]:
        """Keys of the lazy leaves that a plan may count on: they were there at the boundary before, if one is known."""
        keys = moment.lazy_keys()
        return keys if self._seen is None else keys & self._seen

    def make_plan(self, moment: Moment, cut: Cut, voted: frozenset[str] | None = None) -> SnapshotPlan:
        """Lay out the image for the leaves of this moment and the cut that the ranks agreed on.

        voted: the keys they compared for it; None for those of all lazy leaves.
        """
        parts = tuple(make_parts(moment.leaves, cut, self.seat.rank))
        entries = [state_entry(state_capacity(len(moment.state))), *(part.entry() for part in parts)]
        layout = plan_layout(entries, self.seat.meta())
        voted = moment.lazy_keys() if voted is None else voted
        self.plan = _plan(moment, parts, layout, cut, voted)
        return self.plan

    def start(self, moment: Moment, generation: Generation, slot: int, *, fresh: bool) -> CopyTicket:
        """Stage eager state now and copy the rest in the background. Raises CapacityError when tmpfs is full."""
        plan = self._current_plan(moment)
        image = self._image(slot, plan.layout, fresh=fresh)
        eager: dict[str, Any] = {STATE: self._state_blob(moment.state, plan.layout.entry(STATE).nbytes)}
        for name in plan.eager:
            eager[name] = self._stage(moment.leaves[name])
        return self.copier.start(image, generation, eager, plan.pieces)

    def _current_plan(self, moment: Moment) -> SnapshotPlan:
        """The plan, laid out anew when leaves have another form or the state outgrew its room (the cut stays)."""
        plan = self.plan
        assert plan is not None
        leaves, parts = moment.leaves, plan.parts
        same = len(parts) == len(leaves) and all(_fits(part.leaf, leaves.get(part.leaf.name)) for part in parts)
        if not same or len(moment.state) + 8 > plan.layout.entry(STATE).nbytes:
            return self.make_plan(moment, plan.cut, plan.voted)
        if plan.signature != moment.collected.signature():
            moved = tuple(replace(part, leaf=leaves[part.leaf.name]) for part in parts)
            plan = self.plan = _plan(moment, moved, plan.layout, plan.cut, plan.voted)
        return plan

    def prepare(self, slot: int, *, fresh: bool) -> None:
        """Allocate and fault in the slot's file ahead of its boundary: fresh pages cost ten times the copy."""
        if self.plan is not None:
            self._image(slot, self.plan.layout, fresh=fresh)

    def _image(self, slot: int, layout: Layout, *, fresh: bool) -> ImageFile:
        with self._allocating:
            image = self._images.get(slot)
            if image is not None and image.layout == layout and not (fresh and slot not in self._made):
                return image
            if image is not None:
                self._images.pop(slot).close()
            image = self._images[slot] = ImageFile.create(self.seat.image_path(slot), layout, fresh=fresh)
            self._made.add(slot)
            return image

    def _stage(self, leaf: Leaf) -> memoryview:
        stage = self._stages.get(leaf.name)
        if stage is None or stage.shape != leaf.tensor.shape or stage.dtype != leaf.tensor.dtype:
            stage = torch.empty(leaf.tensor.shape, dtype=leaf.tensor.dtype, device="cpu")
            self._stages[leaf.name] = stage
        stage.copy_(leaf.tensor)
        return bytes_of(stage).data

    @staticmethod
    def _state_blob(state: bytes, capacity: int) -> memoryview:
        blob = np.zeros(capacity, np.uint8)
        blob[:8] = np.frombuffer(len(state).to_bytes(8, "little"), np.uint8)
        blob[8 : 8 + len(state)] = np.frombuffer(state, np.uint8)
        return blob.data

    def close(self) -> None:
        for image in self._images.values():
            image.close()
        self._images.clear()


def _plan(moment: Moment, parts: tuple[Part, ...], layout: Layout, cut: Cut, voted: frozenset[str]) -> SnapshotPlan:
    eager = {part.leaf.name: part.leaf for part in parts if not part.leaf.lazy}
    pieces = tuple(
        Piece(part.leaf.name, part.leaf.tensor, part.start, part.stop)
        for part in parts
        if part.leaf.lazy and part.stop > part.start
    )
    return SnapshotPlan(moment.collected.signature(), voted, parts, layout, cut, eager, pieces)


def _fits(planned: Leaf, live: Leaf | None) -> bool:
    return live is planned or (live is not None and _form(live) == _form(planned))


def _form(leaf: Leaf) -> tuple[Any, ...]:
    """All that an image's header says of a leaf."""
    return leaf.key, leaf.lazy, leaf.global_shape, leaf.distributed, leaf.device


def _shared(share: Mapping[str, Any], needed: int) -> str:
    """Names the part of a file system that several nodes have in common, and the sum of what they need."""
    nodes, part = int(share["nodes"]), int(share["bytes"])
    return (
        f"each node's part of the tmpfs that {nodes} local nodes share ({nodes * part / 2**20:.0f} MiB are free, they "
        f"need {nodes * needed / 2**20:.0f} MiB in all)"
    )


def check_capacity(
    memory_dir: pathlib.Path, image_bytes: int, held_bytes: int, limits: Mapping[str, Any], ranks: int
) -> None:
    """Refuse to go on when a node's memory cannot hold ``slots`` images and their parity.

    image_bytes: of one rank; held_bytes: what this node's files occupy already; limits: {"slots", "parity", "group",
    "max_memory" or None, "share": {"bytes", "nodes"} of nodes that share the file system}; ranks: on this node. Raises
    CapacityError that says how much is missing.
    """
    slots, parity, group = int(limits.get("slots", 2)), int(limits.get("parity", 0)), int(limits.get("group", 1))
    overhead = parity / (group - parity) if group > parity else 0.0
    needed = int(slots * ranks * image_bytes * (1 + overhead))
    stat = os.statvfs(memory_dir)
    available = stat.f_bavail * stat.f_frsize + held_bytes
    where = f"{memory_dir} (tmpfs)"
    maximum = limits.get("max_memory")
    if maximum is not None and int(maximum) < available:
        available, where = int(maximum), "spec.snapshot.maxMemory"
    share = limits.get("share")
    if share is not None and int(share["bytes"]) < available:
        available, where = int(share["bytes"]), _shared(share, needed)
    if needed > available:
        raise CapacityError(
            f"snapshots need {needed / 2**20:.0f} MiB a node ({slots} slots x {ranks} ranks x "
            f"{image_bytes / 2**20:.1f} MiB x {1 + overhead:.2f} with parity), but {where} holds "
            f"{available / 2**20:.0f} MiB: {(needed - available) / 2**20:.0f} MiB are missing. "
            f"Give more memory, fewer ranks a node or less parity"
        )
