"""What the snapshot cycle is at, and what it has brought: values without decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from outlast.controller.parity import ParityRound
from outlast.snapshot.identity import Generation


class Stage(StrEnum):
    """What is under way."""

    RESTING = "resting"
    PLANNING = "planning"
    COPYING = "copying"
    ENCODING = "encoding"
    COMMITTING = "committing"
    CLOSED = "closed"


@dataclass
class Work:
    """The generation under way. ``waiting``: ranks (planning, copying) or nodes (committing) that have not answered."""

    generation: Generation
    slot: int
    permitted_at: float
    restored: bool = False
    hold: bool = False
    waiting_ranks: set[int] = field(default_factory=set)
    waiting_nodes: set[str] = field(default_factory=set)
    lengths: dict[int, int] = field(default_factory=dict)
    bytes: int = 0
    stall_s: float = 0.0
    copy_began: float | None = None
    copied_at: float | None = None
    deadline: float = 0.0
    parity: ParityRound | None = None


@dataclass(frozen=True)
class Committed:
    """A generation that is whole on the nodes with seats, the slot that it has, and its images' lengths by rank."""

    generation: Generation
    slot: int
    lengths: Mapping[int, int]


@dataclass
class SnapshotTotals:
    """Over all attempts: what was committed. ``stall_s``: the longest of all ranks for each snapshot, summed."""

    count: int = 0
    bytes: int = 0
    stall_s: float = 0.0
    newest: Generation | None = None
    newest_at: float | None = None
